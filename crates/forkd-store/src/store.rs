//! Opening a store, and its directories.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use forkd_types::Tag;

use crate::durable;
use crate::lock::RootLock;
use crate::pack::arrival;
use crate::{Result, StoreError};

/// An open store. Clones share it; it closes with the last clone and the last thing staged in it.
///
/// Calls block on the file system. They may be made from several threads at once.
#[derive(Clone, Debug)]
pub struct Store {
    pub(crate) shared: Arc<Shared>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    root: PathBuf,
    staged: AtomicU64,
    /// Held while the set of published snapshots and blobs changes, so that "has no children" and
    /// "is not referenced" stay true until the removal they allow. Holds the tags being written.
    changes: Mutex<Changes>,
    _lock: RootLock,
}

/// What only the holder of the change lock may look at.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    /// Tags of snapshots that are being written; one may be there twice.
    pub(crate) writing: Vec<Tag>,
    /// What in staging could not be deleted yet.
    undeleted: Vec<PathBuf>,
}

impl Store {
    /// Opens the store in `root`, making the directory when it is missing, and finishing or removing
    /// what an earlier process left unfinished.
    ///
    /// # Errors
    /// [`StoreError::Locked`] when another process, or this one, has it open.
    pub fn open(root: &Path) -> Result<Self> {
        make_dir(root)?;
        let root = root.canonicalize().map_err(StoreError::io("resolve", root))?;
        let lock = RootLock::acquire(&root)?;
        let shared = Shared { root, staged: AtomicU64::new(0), changes: Mutex::default(), _lock: lock };
        for dir in [shared.snapshots(), shared.blobs(), shared.staging(), shared.arriving()] {
            make_dir(&dir)?;
        }
        durable::sync_dir(&shared.root)?;
        arrival::finish_all(&shared)?;
        shared.sweep()?;
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The store's directory.
    pub fn root(&self) -> &Path {
        &self.shared.root
    }

    /// Bytes free to this process on the store's file system.
    pub fn free_bytes(&self) -> Result<u64> {
        let stat = rustix::fs::statvfs(self.root()).map_err(StoreError::io("read the free space of", self.root()))?;
        Ok(stat.f_bavail * stat.f_frsize)
    }
}

impl Shared {
    pub(crate) fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }

    pub(crate) fn staging(&self) -> PathBuf {
        self.root.join("staging")
    }

    pub(crate) fn arriving(&self) -> PathBuf {
        self.root.join("arriving")
    }

    pub(crate) fn snapshot(&self, tag: &Tag) -> PathBuf {
        self.snapshots().join(tag)
    }

    /// A path in staging that nothing has yet. Unique in this process, and no other has the store open.
    pub(crate) fn staging_path(&self, what: &str) -> PathBuf {
        self.staging().join(format!("{}-{what}", self.staged.fetch_add(1, Ordering::Relaxed)))
    }

    pub(crate) fn changes(&self) -> MutexGuard<'_, Changes> {
        // Every step under the lock is one rename or one push: a panic leaves nothing half-done.
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves `path` out of sight in one step and returns where it is now, to be deleted.
    pub(crate) fn bury(&self, path: &Path, what: &str) -> Result<PathBuf> {
        let grave = self.staging_path(what);
        durable::move_new(path, &grave)?;
        Ok(grave)
    }

    /// Deletes something in staging that is nobody's any more. What cannot be deleted now is tried again with
    /// what comes next, and swept at the next opening: whoever removed it is done either way.
    pub(crate) fn discard(&self, path: PathBuf) {
        let mut undeleted = std::mem::take(&mut self.changes().undeleted);
        undeleted.push(path);
        undeleted.retain(|path| remove_all(path).is_err());
        self.changes().undeleted.extend(undeleted);
    }

    fn sweep(&self) -> Result<()> {
        let staging = self.staging();
        let failed = |error: io::Error| StoreError::io("sweep", &staging)(error);
        for entry in staging.read_dir().map_err(failed)? {
            remove_all(&entry.map_err(failed)?.path())?;
        }
        Ok(())
    }
}

/// How often a directory is emptied that gains files meanwhile. A writer that nobody waits for any more creates
/// a few files at most, none of them twice.
const EMPTYINGS: usize = 16;

/// Removes a file or a tree, without following links; it may be gone already.
pub(crate) fn remove_all(path: &Path) -> Result<()> {
    for last in 1..=EMPTYINGS {
        let removed = match fs::symlink_metadata(path) {
            Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
            Ok(_) => fs::remove_file(path),
            Err(error) => Err(error),
        };
        match removed {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty && last < EMPTYINGS => {}
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(StoreError::io("remove", path)(error));
            }
            _ => break,
        }
    }
    Ok(())
}

/// Makes a directory, if it is not there, that only its owner may enter: snapshots hold guests' memory.
pub(crate) fn make_dir(path: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(StoreError::io("create directory", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_opening_is_refused_and_names_the_holder() {
        let dir = tempfile::tempdir().expect("tempdir");
        let store = Store::open(dir.path()).expect("open");
        let error = Store::open(dir.path()).expect_err("locked");
        assert!(matches!(error, StoreError::Locked { holder: Some(pid), .. } if pid == std::process::id()), "{error}");
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        drop(store);
        Store::open(dir.path()).expect("open again");
    }

    #[test]
    fn a_directory_that_gains_files_while_it_is_removed_goes_all_the_same() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("0-py");
        for _ in 0..50 {
            fs::create_dir(&path).expect("mkdir");
            // A writer that is not dead yet.
            let writer = {
                let path = path.clone();
                std::thread::spawn(move || {
                    (0..10).take_while(|index| fs::File::create_new(path.join(index.to_string())).is_ok()).count()
                })
            };
            remove_all(&path).expect("removed");
            writer.join().expect("no panic");
            assert!(!path.exists());
        }
    }

    #[test]
    fn what_could_not_be_deleted_goes_with_the_next() {
        let dir = tempfile::tempdir().expect("tempdir");
        let store = Store::open(dir.path()).expect("open");
        // Below a file nothing can be looked for, as below a broken directory.
        let (stuck, next) = (dir.path().join("staging/0-py/file"), dir.path().join("staging/1-py"));
        fs::write(dir.path().join("staging/0-py"), "in the way").expect("write");
        fs::write(&next, "x").expect("write");
        store.shared.discard(stuck.clone());
        assert_eq!(store.shared.changes().undeleted, std::slice::from_ref(&stuck));
        fs::remove_file(dir.path().join("staging/0-py")).expect("remove");
        fs::create_dir_all(&stuck).expect("mkdir");
        store.shared.discard(next.clone());
        assert!(!stuck.exists() && !next.exists() && store.shared.changes().undeleted.is_empty());
    }

    #[test]
    fn leftovers_are_swept_and_symlinks_among_them_not_followed() {
        let dir = tempfile::tempdir().expect("tempdir");
        let outside = dir.path().join("outside");
        fs::create_dir_all(&outside).expect("mkdir");
        fs::write(outside.join("precious"), "x").expect("write");
        let root = dir.path().join("store");
        drop(Store::open(&root).expect("open"));
        fs::create_dir_all(root.join("staging/7-py/sub")).expect("mkdir");
        fs::write(root.join("staging/8-blob"), "x").expect("write");
        std::os::unix::fs::symlink(&outside, root.join("staging/9-link")).expect("symlink");
        Store::open(&root).expect("open");
        assert_eq!(root.join("staging").read_dir().expect("list").count(), 0);
        assert!(outside.join("precious").exists());
    }
}
