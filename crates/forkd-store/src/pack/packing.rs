//! From a store to a pack.
//!
//! The manifest comes first and holds the digests of everything, so everything is read twice: once to find the
//! data and hash it, once to compress it. The files are held open in between; a snapshot that is removed
//! meanwhile is packed all the same.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;
use std::path::Path;

use forkd_types::{Digest, Tag};

use super::PackProgress;
use super::error::PackError;
use super::manifest::{MANIFEST_JSON, Manifest, PackedBlob, PackedFile, PackedSnapshot};
use super::member::{self, BLOCK, SparseHead, padded};
use super::sparse_map::{Run, SparseMap};
use crate::snapshots::Snapshot;
use crate::store::Store;
use crate::{Result, StoreError};

/// The compression levels there are: those of zstd that need no more memory to decompress than it allows by
/// itself.
pub const LEVELS: RangeInclusive<i32> = 1..=19;
/// The level unless another is asked for.
pub const DEFAULT_LEVEL: i32 = 3;

/// How much is read at a time.
const CHUNK: usize = 1 << 20;

/// How a snapshot is packed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PackOptions {
    /// What to say about it.
    pub description: Option<String>,
    /// What to say it was baked from.
    pub base_image: Option<String>,
    /// Compression level, one of [`LEVELS`].
    pub level: i32,
    /// Compressing threads; as many as there are processors when absent. The result does not depend on it.
    pub threads: Option<u32>,
}

impl Default for PackOptions {
    fn default() -> Self {
        Self { description: None, base_image: None, level: DEFAULT_LEVEL, threads: None }
    }
}

/// A snapshot that is ready to be written as a pack: everything is open and hashed.
#[derive(Debug)]
pub struct Pack {
    manifest: Manifest,
    manifest_json: Vec<u8>,
    members: Vec<Member>,
    level: i32,
    threads: u32,
}

#[derive(Debug)]
struct Member {
    path: String,
    file: File,
    bytes: u64,
    /// `None` when the content is all there.
    map: Option<SparseMap>,
}

impl Store {
    /// Opens and hashes the snapshot `tag` and all that it derives from.
    ///
    /// # Errors
    /// As [`Store::chain`]; [`PackError::Level`]; [`StoreError::Damaged`] when a description or machine state is not
    /// what was written. Layers and blobs are checked where the pack is taken in.
    pub fn pack(
        &self,
        tag: &Tag,
        options: &PackOptions,
        mut progress: impl FnMut(PackProgress<'_>),
    ) -> Result<Pack, PackError> {
        if !LEVELS.contains(&options.level) {
            return Err(PackError::Level { level: options.level });
        }
        let chain = self.chain(tag)?;
        let mut reader = Reader { members: Vec::new(), done_bytes: 0, total_bytes: 0, progress: &mut progress };
        let mut opened = Vec::new();
        for snapshot in &chain {
            let names = [crate::SNAPSHOT_JSON].into_iter().chain(snapshot.meta.files());
            for name in names {
                opened.push((snapshot, name.to_owned(), open(&snapshot.dir.join(name))?));
            }
        }
        let blobs: BTreeSet<Digest> = chain.iter().flat_map(|snapshot| snapshot.meta.blobs()).collect();
        let blobs = blobs.into_iter().map(|blob| {
            let opened = self.blob(&blob)?.ok_or(StoreError::BlobNotFound { digest: blob })?;
            Ok::<_, StoreError>((blob, opened.file))
        });
        let blobs = blobs.collect::<Result<Vec<_>>>()?;
        let files = opened.iter().map(|(.., file)| file).chain(blobs.iter().map(|(_, file)| file));
        reader.total_bytes = files.map(|file| file.metadata().map_or(0, |metadata| metadata.len())).sum();

        let mut snapshots: Vec<PackedSnapshot> =
            chain.iter().map(|snapshot| PackedSnapshot { tag: snapshot.meta.tag.clone(), files: Vec::new() }).collect();
        for (snapshot, name, file) in opened {
            let packed = snapshots.iter_mut().find(|packed| packed.tag == snapshot.meta.tag).expect("one of the chain");
            let entry = reader.file(snapshot, name, file)?;
            packed.files.push(entry);
        }
        let blobs = blobs.into_iter().map(|(blob, file)| reader.blob(blob, file)).collect::<Result<_, _>>()?;
        let members = reader.members;
        let created = chain.last().expect("a chain has a head").meta.created_at_unix;
        let PackOptions { description, base_image, level, threads } = options.clone();
        let manifest = Manifest::new(created, description, base_image, snapshots, blobs)?;
        Pack::new(manifest, members, level, threads)
    }
}

/// Reads files for the first time.
struct Reader<'a> {
    members: Vec<Member>,
    done_bytes: u64,
    total_bytes: u64,
    progress: &'a mut dyn FnMut(PackProgress<'_>),
}

impl Reader<'_> {
    fn file(&mut self, snapshot: &Snapshot, name: String, file: File) -> Result<PackedFile, PackError> {
        let path = snapshot.dir.join(&name);
        let mut entry = PackedFile { name, bytes: 0, data_bytes: 0, digest: snapshot.digest };
        let expected = match entry.name.as_str() {
            crate::SNAPSHOT_JSON => Some(snapshot.digest),
            crate::VMSTATE => Some(snapshot.meta.vmstate.digest),
            _ => None,
        };
        let member = format!("snapshots/{}/{}", snapshot.meta.tag, entry.name);
        (entry.bytes, entry.data_bytes, entry.digest) = self.read(&path, member, file, entry.is_sparse())?;
        match expected {
            Some(expected) if expected != entry.digest => {
                let reason = format!("{} has digest {}, {expected} was written", entry.name, entry.digest);
                Err(StoreError::Damaged { tag: snapshot.meta.tag.clone(), dir: snapshot.dir.clone(), reason }.into())
            }
            _ => Ok(entry),
        }
    }

    fn blob(&mut self, blob: Digest, file: File) -> Result<PackedBlob, PackError> {
        let member = format!("blobs/{}", blob.hex());
        let (bytes, data_bytes, digest) = self.read(Path::new(&member), member.clone(), file, true)?;
        Ok(PackedBlob { blob, bytes, data_bytes, digest })
    }

    /// Its length, how much of it is data, and the digest for the manifest.
    fn read(&mut self, path: &Path, member: String, file: File, sparse: bool) -> Result<(u64, u64, Digest), PackError> {
        let failed = |error: io::Error| StoreError::io("read", path)(error);
        let bytes = file.metadata().map_err(failed)?.len();
        let (done_bytes, total_bytes) = (self.done_bytes, self.total_bytes);
        let mut progress =
            |at| (self.progress)(PackProgress { what: "reading", done_bytes: done_bytes + at, total_bytes });
        let (map, digest) = if sparse {
            let (map, digest) = SparseMap::of(&file, &mut progress).map_err(failed)?;
            (Some(map), digest)
        } else {
            let mut hasher = blake3::Hasher::new();
            copy(&file, Run { offset: 0, len: bytes }, &mut |piece| {
                hasher.update(piece);
                Ok(())
            })
            .map_err(failed)?;
            progress(bytes);
            (None, Digest::from_bytes(*hasher.finalize().as_bytes()))
        };
        let data_bytes = map.as_ref().map_or(bytes, SparseMap::data_bytes);
        self.members.push(Member { path: member, file, bytes, map });
        self.done_bytes += bytes;
        Ok((bytes, data_bytes, digest))
    }
}

impl Pack {
    fn new(manifest: Manifest, mut members: Vec<Member>, level: i32, threads: Option<u32>) -> Result<Self, PackError> {
        let order: Vec<String> = manifest.paths().collect();
        members.sort_by_key(|member| order.iter().position(|path| *path == member.path));
        let manifest_json = manifest.to_json()?;
        let processors = std::thread::available_parallelism().map_or(1, |count| count.get() as u32);
        Ok(Self { manifest, manifest_json, members, level, threads: threads.unwrap_or(processors).max(1) })
    }

    /// What is in it.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Bytes of the archive before it is compressed.
    pub fn archive_bytes(&self) -> Result<u64, PackError> {
        let mut total = BLOCK as u64 + padded(self.manifest_json.len() as u64) + END.len() as u64;
        for member in &self.members {
            total += member.head()?.len() as u64 + padded(member.stored_bytes());
        }
        Ok(total)
    }

    /// Writes the pack.
    ///
    /// # Errors
    /// [`PackError::Output`] when `out` takes no more; what it has got by then is no pack.
    pub fn write(&self, mut out: impl Write, mut progress: impl FnMut(PackProgress<'_>)) -> Result<(), PackError> {
        let total_bytes = self.archive_bytes()?;
        let manifest = plain_member(MANIFEST_JSON, &self.manifest_json)?;
        out.write_all(&frame(&manifest, self.level).map_err(PackError::Output)?).map_err(PackError::Output)?;

        let mut done_bytes = manifest.len() as u64;
        let mut encoder = zstd::Encoder::new(out, self.level).map_err(PackError::Output)?;
        encoder.include_checksum(true).map_err(PackError::Output)?;
        // The same bytes come out however many threads there are, but others than without any.
        encoder.multithread(self.threads).map_err(PackError::Output)?;
        encoder.set_pledged_src_size(Some(total_bytes - done_bytes)).map_err(PackError::Output)?;
        for member in &self.members {
            let mut put = |bytes: &[u8]| {
                encoder.write_all(bytes)?;
                done_bytes += bytes.len() as u64;
                progress(PackProgress { what: &member.path, done_bytes, total_bytes });
                Ok(())
            };
            member.write(&mut put)?;
        }
        encoder.write_all(&END).map_err(PackError::Output)?;
        let mut out = encoder.finish().map_err(PackError::Output)?;
        out.flush().map_err(PackError::Output)?;
        progress(PackProgress { what: "done", done_bytes: total_bytes, total_bytes });
        Ok(())
    }
}

/// The end of an archive.
pub(super) const END: [u8; 2 * BLOCK] = [0; 2 * BLOCK];

/// A small member whole: header, content, padding.
pub(super) fn plain_member(path: &str, content: &[u8]) -> Result<Vec<u8>, PackError> {
    let mut member = member::plain(path, content.len() as u64)?.to_vec();
    member.extend_from_slice(content);
    member.resize(padded(member.len() as u64) as usize, 0);
    Ok(member)
}

/// One zstd frame of its own.
pub(super) fn frame(bytes: &[u8], level: i32) -> io::Result<Vec<u8>> {
    let mut compressor = zstd::bulk::Compressor::new(level)?;
    compressor.include_checksum(true)?;
    compressor.compress(bytes)
}

impl Member {
    /// Bytes of content that the archive holds.
    fn stored_bytes(&self) -> u64 {
        self.map.as_ref().map_or(self.bytes, |map| map.to_text().len() as u64 + map.data_bytes())
    }

    fn head(&self) -> Result<Vec<u8>, PackError> {
        match &self.map {
            Some(_) => Ok(SparseHead::new(&self.path, self.bytes, self.stored_bytes())?.to_bytes()),
            None => Ok(member::plain(&self.path, self.bytes)?.to_vec()),
        }
    }

    fn write(&self, put: &mut impl FnMut(&[u8]) -> io::Result<()>) -> Result<(), PackError> {
        put(&self.head()?).map_err(PackError::Output)?;
        let whole = [Run { offset: 0, len: self.bytes }];
        let runs = match &self.map {
            Some(map) => {
                put(&map.to_text()).map_err(PackError::Output)?;
                map.runs.as_slice()
            }
            None => &whole,
        };
        let mut output = None;
        for run in runs {
            let copied = copy(&self.file, *run, &mut |piece| {
                put(piece).map_err(|error| {
                    let kind = error.kind();
                    output = Some(error);
                    kind.into()
                })
            });
            copied.map_err(|error| match output.take() {
                Some(error) => PackError::Output(error),
                None => StoreError::io("read", &self.path)(error).into(),
            })?;
        }
        let stored = self.stored_bytes();
        put(&[0; BLOCK][..(padded(stored) - stored) as usize]).map_err(PackError::Output)
    }
}

/// Hands on the content of `run` piece by piece.
fn copy(file: &File, run: Run, take: &mut impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK.min(run.len as usize)];
    let mut at = run.offset;
    while at < run.end() {
        let piece = (run.end() - at).min(CHUNK as u64) as usize;
        file.read_exact_at(&mut buffer[..piece], at)?;
        take(&buffer[..piece])?;
        at += piece as u64;
    }
    Ok(())
}

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(StoreError::io("open", path))
}
