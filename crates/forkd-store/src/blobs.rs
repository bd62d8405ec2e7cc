//! Blobs: immutable files named by the BLAKE3 of their content.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use forkd_types::{Digest, Tag};
use rustix::io::Errno;

use crate::disk_usage;
use crate::durable::{self, Moved};
use crate::snapshots::Listed;
use crate::sparse::{SparseWriter, next_extent};
use crate::store::Store;
use crate::{Result, StoreError};

/// A blob, opened for reading.
#[derive(Debug)]
pub struct Blob {
    /// Its path in the store.
    pub path: PathBuf,
    /// The file; stays readable when the blob is removed.
    pub file: File,
    /// Logical size in bytes.
    pub size: u64,
}

/// A blob in a listing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlobEntry {
    /// Its digest.
    pub digest: Digest,
    /// Logical size in bytes.
    pub size: u64,
    /// What it occupies on disk.
    pub stored_bytes: u64,
    /// When it entered the store.
    pub entered: SystemTime,
}

/// A blob being written, front to back. Dropping it unfinished removes it.
///
/// Runs of zeros become holes; the digest is of the logical content.
pub struct BlobWriter {
    store: Store,
    staged: StagedFile,
    /// `None` after a failed write: what is in the file is then unknown.
    writer: Option<SparseWriter>,
}

/// Removes its file when dropped, unless the file moved on.
#[derive(Debug)]
struct StagedFile {
    store: Store,
    path: PathBuf,
}

impl Drop for StagedFile {
    fn drop(&mut self) {
        self.store.shared.discard(self.path.clone());
    }
}

impl Store {
    /// Begins a blob.
    pub fn stage_blob(&self) -> Result<BlobWriter> {
        let (staged, file) = self.stage_file()?;
        Ok(BlobWriter { store: self.clone(), staged, writer: Some(SparseWriter::new(file)) })
    }

    /// Takes a copy of the file at `path` into the store and returns its digest.
    ///
    /// On a file system with reflinks the copy shares the original's blocks; elsewhere only the
    /// parts that hold data are read. The digest is that of the copy, so a file that changes
    /// meanwhile cannot make a blob lie about itself.
    pub fn import_file(&self, path: &Path) -> Result<Digest> {
        let failed = StoreError::io("read", path);
        let source = File::open(path).map_err(StoreError::io("open", path))?;
        let (staged, file) = self.stage_file()?;
        match rustix::fs::ioctl_ficlone(&file, &source) {
            Ok(()) => {
                let mut hasher = blake3::Hasher::new();
                hash_sparse(&file, &mut hasher).map_err(StoreError::io("hash", &staged.path))?;
                return self.publish_blob(staged, Digest::from_bytes(*hasher.finalize().as_bytes()));
            }
            // Another file system, or one without reflinks: copy.
            Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS | Errno::PERM) => {}
            Err(error) => return Err(StoreError::io("clone into the store", path)(error)),
        }
        let mut writer = SparseWriter::new(file);
        let mut sink = SinkError::default();
        for_each_part(&source, |part| {
            match part {
                Part::Data(bytes) => writer.write_all(bytes),
                Part::Zeros(count) => writer.zeros(count),
            }
            .map_err(|error| sink.note(error))
        })
        .map_err(|error| match sink.0.take() {
            Some(write) => StoreError::io("write", &staged.path)(write),
            None => failed(error),
        })?;
        let (_, digest, _) = writer.finish().map_err(StoreError::io("write", &staged.path))?;
        self.publish_blob(staged, digest)
    }

    /// Opens a blob, or `None` when there is none of that digest.
    pub fn blob(&self, digest: &Digest) -> Result<Option<Blob>> {
        let path = self.blob_path(digest);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::io("open", &path)(error)),
        };
        let size = file.metadata().map_err(StoreError::io("stat", &path))?.len();
        Ok(Some(Blob { path, file, size }))
    }

    /// Removes a blob that no snapshot names.
    ///
    /// # Errors
    /// [`StoreError::BlobInUse`] with the snapshots that name it, [`StoreError::UnknownReferences`]
    /// while a snapshot is unreadable, [`StoreError::BlobNotFound`].
    pub fn remove_blob(&self, digest: &Digest) -> Result<()> {
        let changes = self.shared.changes();
        if let Some(users) = self.blob_users()?.remove(digest) {
            return Err(StoreError::BlobInUse { digest: *digest, users });
        }
        let path = self.blob_path(digest);
        match path.symlink_metadata() {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::BlobNotFound { digest: *digest });
            }
            Err(error) => return Err(StoreError::io("remove", &path)(error)),
        }
        let grave = self.shared.bury(&path, "blob")?;
        drop(changes);
        self.shared.discard(grave);
        Ok(())
    }

    /// All blobs, by digest.
    pub fn list_blobs(&self) -> Result<Vec<BlobEntry>> {
        let dir = self.shared.blobs();
        let failed = |error: io::Error| StoreError::io("list", &dir)(error);
        let mut found = Vec::new();
        for entry in dir.read_dir().map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            let Ok(digest) = format!("blake3:{}", name.to_string_lossy()).parse() else { continue };
            match entry.metadata() {
                Ok(metadata) => found.push(BlobEntry {
                    digest,
                    size: metadata.len(),
                    stored_bytes: disk_usage::of_file(&metadata),
                    entered: metadata.modified().map_err(failed)?,
                }),
                // Removed since the directory was read.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(error)),
            }
        }
        found.sort_by_key(|blob| blob.digest);
        Ok(found)
    }

    /// Blobs that no snapshot names.
    ///
    /// A blob that a boot in progress will name only when it is done is among them; a collector
    /// spares what entered the store recently and what its own boots use.
    pub fn unreferenced_blobs(&self) -> Result<Vec<BlobEntry>> {
        let _changes = self.shared.changes();
        let used: BTreeSet<Digest> = self.blob_users()?.into_keys().collect();
        Ok(self.list_blobs()?.into_iter().filter(|blob| !used.contains(&blob.digest)).collect())
    }

    /// Which snapshots name which blobs.
    fn blob_users(&self) -> Result<BTreeMap<Digest, Vec<Tag>>> {
        let mut users: BTreeMap<Digest, Vec<Tag>> = BTreeMap::new();
        let mut unreadable = Vec::new();
        for listed in self.published()? {
            match listed {
                Listed::Ready { snapshot, .. } => {
                    for digest in snapshot.meta.blobs() {
                        users.entry(digest).or_default().push(snapshot.meta.tag.clone());
                    }
                }
                Listed::Failed { tag, .. } => unreadable.push(tag),
                Listed::Writing { .. } => {}
            }
        }
        if unreadable.is_empty() { Ok(users) } else { Err(StoreError::UnknownReferences { tags: unreadable }) }
    }

    pub(crate) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.shared.blobs().join(digest.hex())
    }

    fn stage_file(&self) -> Result<(StagedFile, File)> {
        let path = self.shared.staging_path("blob");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(StoreError::io("create", &path))?;
        Ok((StagedFile { store: self.clone(), path }, file))
    }

    fn publish_blob(&self, staged: StagedFile, digest: Digest) -> Result<Digest> {
        durable::seal_file(&staged.path)?;
        // A blob that is there already has the same content; ours goes when `staged` drops. A
        // collector may remove it between the two steps, hence the lock.
        let _changes = self.shared.changes();
        match durable::move_new(&staged.path, &self.blob_path(&digest))? {
            Moved::Done | Moved::Taken => Ok(digest),
        }
    }
}

impl BlobWriter {
    /// Logical bytes written so far.
    pub fn written(&self) -> u64 {
        self.writer.as_ref().map_or(0, SparseWriter::len)
    }

    /// Flushes the blob to disk and gives it its name. Writing the same content again is no error
    /// and stores nothing new.
    ///
    /// # Errors
    /// [`StoreError::DigestMismatch`] when `expected` is another digest; nothing is kept then.
    pub fn finish(mut self, expected: Option<Digest>) -> Result<Digest> {
        let path = &self.staged.path;
        let writer = self.writer.take().ok_or_else(|| io::Error::other("an earlier write to it failed"));
        let (_, digest, _) = writer.and_then(SparseWriter::finish).map_err(StoreError::io("write", path))?;
        match expected {
            Some(expected) if expected != digest => Err(StoreError::DigestMismatch { expected, actual: digest }),
            _ => self.store.publish_blob(self.staged, digest),
        }
    }
}

impl Write for BlobWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let writer = self.writer.as_mut().ok_or_else(|| io::Error::other("an earlier write to this blob failed"))?;
        writer.write(bytes).map_err(|error| {
            self.writer = None;
            io::Error::new(error.kind(), format!("cannot write {}: {error}", self.staged.path.display()))
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Remembers that it was the writing side of a copy that failed.
#[derive(Default)]
struct SinkError(Option<io::Error>);

impl SinkError {
    fn note(&mut self, error: io::Error) -> io::Error {
        let kind = error.kind();
        self.0 = Some(error);
        kind.into()
    }
}

/// A part of a file's logical content.
enum Part<'a> {
    Data(&'a [u8]),
    Zeros(u64),
}

/// Walks the logical content of `file` front to back, skipping over holes without reading them.
fn for_each_part(file: &File, mut take: impl FnMut(Part<'_>) -> io::Result<()>) -> io::Result<()> {
    let end = file.metadata()?.len();
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < end {
        let extent = next_extent(file, at, end)?;
        take(Part::Zeros(extent.start - at))?;
        at = extent.start;
        let hole = extent.end;
        while at < hole {
            let want = (hole - at).min(buffer.len() as u64) as usize;
            file.read_exact_at(&mut buffer[..want], at)?;
            take(Part::Data(&buffer[..want]))?;
            at += want as u64;
        }
    }
    Ok(())
}

/// Hashes the logical content of `file`; the zeros of holes are not read.
pub(crate) fn hash_sparse(file: &File, hasher: &mut blake3::Hasher) -> io::Result<()> {
    for_each_part(file, |part| {
        match part {
            Part::Data(bytes) => {
                hasher.update(bytes);
            }
            Part::Zeros(count) => {
                io::copy(&mut io::repeat(0).take(count), hasher)?;
            }
        }
        Ok(())
    })
}
