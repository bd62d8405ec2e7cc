//! Files that are about to be uploaded: kernels, initramfs images and root disks, with their digests.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use forkd_types::Digest;
use serde::{Deserialize, Serialize};

use crate::client::{Client, Encoding, copy_sparse};
use crate::progress::Progress;

/// How often a bar is moved.
const REDRAW: Duration = Duration::from_millis(100);

/// A local file and the digest of its logical content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Blob {
    path: PathBuf,
    digest: Digest,
    bytes: u64,
}

/// What is noted of a file so that its digest need not be computed again: the digest, and
/// what must still be true of the file for it to hold.
#[derive(Serialize, Deserialize, PartialEq, Eq, Clone, Debug)]
struct Note {
    bytes: u64,
    modified_ns: i128,
    inode: u64,
    digest: Option<Digest>,
}

impl Blob {
    /// Computes the digest of `path`, or takes it from the note of an earlier time in `notes`.
    pub(crate) async fn of(path: PathBuf, what: &str, notes: &Path, progress: &Progress) -> anyhow::Result<Self> {
        let step = progress.quick_step(format!("Digest of the {what}"));
        let position = Arc::new(AtomicU64::new(0));
        let (seen, notes) = (Arc::clone(&position), notes.to_owned());
        let task = tokio::task::spawn_blocking(move || Self::hash(path, &notes, &seen));
        tokio::pin!(task);
        let mut redraw = tokio::time::interval(REDRAW);
        loop {
            tokio::select! {
                done = &mut task => return done.context("the background task was cancelled")?,
                _ = redraw.tick() => step.set_position(position.load(Ordering::Relaxed)),
            }
        }
    }

    /// A file whose digest whoever wrote it knows.
    pub(crate) fn known(path: PathBuf, digest: Digest) -> anyhow::Result<Self> {
        let bytes = fs::metadata(&path).with_context(|| format!("could not read {}", path.display()))?.len();
        Ok(Self { path, digest, bytes })
    }

    /// The digest, for requests that name the blob.
    pub(crate) fn digest(&self) -> Digest {
        self.digest
    }

    fn hash(path: PathBuf, notes: &Path, position: &AtomicU64) -> anyhow::Result<Self> {
        let shown = path.display().to_string();
        let reading = || format!("could not read {shown}");
        let path = path.canonicalize().with_context(reading)?;
        let metadata = fs::metadata(&path).with_context(reading)?;
        let mut note = Note {
            bytes: metadata.len(),
            modified_ns: i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec()),
            inode: metadata.ino(),
            digest: None,
        };
        let note_path = note_path(notes, &path);
        let known = read_note(&note_path).filter(|known| Note { digest: None, ..known.clone() } == note);
        if let Some(digest) = known.and_then(|known| known.digest) {
            return Ok(Self { path, digest, bytes: note.bytes });
        }
        let mut hasher = Hasher(blake3::Hasher::new());
        copy_sparse(fs::File::open(&path).with_context(reading)?, &mut hasher, position).with_context(reading)?;
        let digest = Digest::from_bytes(*hasher.0.finalize().as_bytes());
        note.digest = Some(digest);
        // A directory that cannot be written only costs the time to compute it again.
        let _ = fs::create_dir_all(notes).and_then(|()| fs::write(&note_path, serde_json::to_vec(&note)?));
        Ok(Self { path, digest, bytes: note.bytes })
    }

    /// Sends the blob unless the daemon has it.
    pub(crate) async fn upload(&self, client: &Client, what: &str, progress: &Progress) -> anyhow::Result<()> {
        if client.has_blob(&self.digest).await? {
            return Ok(());
        }
        let step = progress.step(format!("Uploading the {what}"));
        step.set_bytes(self.bytes);
        let encoding = if client.address().is_unix() { Encoding::Raw } else { Encoding::Zstd };
        let sent = Arc::new(AtomicU64::new(0));
        let upload = client.upload_blob(&self.digest, &self.path, encoding, Arc::clone(&sent));
        tokio::pin!(upload);
        let mut redraw = tokio::time::interval(REDRAW);
        let mut read = 0;
        loop {
            tokio::select! {
                done = &mut upload => break done.with_context(|| format!("could not upload the {what}"))?,
                _ = redraw.tick(), if read < self.bytes => {
                    read = sent.load(Ordering::Relaxed);
                    step.set_position(read);
                    if read == self.bytes {
                        step.wait_for("the daemon checks what it got");
                    }
                }
            }
        }
        step.done(format_args!("Uploaded the {what}, {}", forkd_types::ByteSize(self.bytes)));
        Ok(())
    }
}

/// The note on the file at the absolute `path`: named by a hash, as notes of many places share one
/// directory.
fn note_path(notes: &Path, path: &Path) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    notes.join(blake3::hash(path.as_os_str().as_bytes()).to_hex().as_str())
}

fn read_note(path: &Path) -> Option<Note> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

struct Hasher(blake3::Hasher);

impl Write for Hasher {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_digest_is_remembered_until_the_file_changes() {
        let directory = tempfile::tempdir().expect("scratch directory");
        let path = directory.path().join("disk");
        fs::write(&path, b"one").expect("write");
        let notes = directory.path().join("notes");
        let of = || Blob::of(path.clone(), "disk", &notes, &Progress::Quiet);
        let first = of().await.expect("readable");
        assert_eq!(first.digest(), Digest::from_bytes(*blake3::hash(b"one").as_bytes()));

        // The note is believed: a forged digest comes back.
        let note = note_path(&notes, &path.canonicalize().expect("it exists"));
        let mut forged = read_note(&note).expect("a note was left");
        forged.digest = Some(Digest::from_bytes([7; 32]));
        fs::write(&note, serde_json::to_vec(&forged).expect("plain data")).expect("write");
        assert_eq!(of().await.expect("readable").digest(), Digest::from_bytes([7; 32]));

        // Until the file changes.
        fs::write(&path, b"other").expect("write");
        assert_eq!(of().await.expect("readable").digest(), Digest::from_bytes(*blake3::hash(b"other").as_bytes()));
    }
}
