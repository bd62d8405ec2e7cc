//! Scratch directories: removed when dropped, swept when their maker died.
//!
//! A directory `build-N` is in use exactly while somebody holds a lock on `build-N.lock` beside it.
//! Making one and sweeping happen under a lock on `.sweep`, so a directory is never swept between
//! its making and its locking.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::FlockOperation;

use crate::{ImageError, Result};

const PREFIX: &str = "build-";

/// A directory for the making of one thing.
#[derive(Debug)]
pub(crate) struct ScratchDir {
    path: PathBuf,
    lock_path: PathBuf,
    _lock: File,
}

impl ScratchDir {
    /// Makes a directory in `parent`, removing there what dead makers left.
    pub(crate) fn new(parent: &Path) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        fs::create_dir_all(parent).map_err(ImageError::io("create directory", parent))?;
        let sweep_path = parent.join(".sweep");
        let sweep_lock = open_lock(&sweep_path)?;
        rustix::fs::flock(&sweep_lock, FlockOperation::LockExclusive).map_err(ImageError::io("lock", &sweep_path))?;
        sweep(parent)?;
        loop {
            let name = format!("{PREFIX}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let path = parent.join(&name);
            match fs::create_dir(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(ImageError::io("create directory", &path)(error)),
            }
            let lock_path = parent.join(format!("{name}.lock"));
            let lock = open_lock(&lock_path)?;
            rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
                .map_err(ImageError::io("lock", &lock_path))?;
            return Ok(Self { path, lock_path, _lock: lock });
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        // What cannot be removed now is swept by the next maker.
        if remove_tree(&self.path).is_ok() {
            let _ = fs::remove_file(&self.lock_path);
        }
    }
}

fn open_lock(path: &Path) -> Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(ImageError::io("open the lock file", path))
}

fn sweep(parent: &Path) -> Result<()> {
    for entry in parent.read_dir().map_err(ImageError::io("list", parent))? {
        let path = entry.map_err(ImageError::io("list", parent))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !name.starts_with(PREFIX) || name.ends_with(".lock") {
            continue;
        }
        let lock_path = parent.join(format!("{name}.lock"));
        let lock = open_lock(&lock_path)?;
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() && remove_tree(&path).is_ok() {
            let _ = fs::remove_file(&lock_path);
        }
    }
    Ok(())
}

/// Removes a tree, unless a file system is mounted in it: a killed bootstrap may have left the
/// host's own `/sys` or `/dev` there.
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    let path = match path.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    if let Some(mount) = mount_below(&path)? {
        return Err(io::Error::other(format!("{mount} is still mounted")));
    }
    fs::remove_dir_all(path)
}

fn mount_below(path: &Path) -> io::Result<Option<String>> {
    let mounts = fs::read("/proc/self/mountinfo")?;
    let prefix = [path.as_os_str().as_bytes(), b"/"].concat();
    let point = |line: &[u8]| line.split(|&byte| byte == b' ').nth(4).map(<[u8]>::to_vec);
    let found = mounts.split(|&byte| byte == b'\n').filter_map(point).find(|point| point.starts_with(&prefix));
    Ok(found.map(|point| String::from_utf8_lossy(&point).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scratch_dir_is_swept_only_after_its_maker_is_gone() {
        let parent = tempfile::tempdir().expect("tempdir");
        let live = ScratchDir::new(parent.path()).expect("scratch");
        let dead = parent.path().join("build-1-0");
        fs::create_dir_all(dead.join("root/etc")).expect("mkdir");
        fs::write(parent.path().join("build-1-0.lock"), "").expect("write");
        fs::create_dir(parent.path().join("mine")).expect("mkdir");
        let other = ScratchDir::new(parent.path()).expect("scratch");
        assert!(live.path().is_dir() && other.path().is_dir() && live.path() != other.path());
        assert!(!dead.exists() && !parent.path().join("build-1-0.lock").exists());
        assert!(parent.path().join("mine").is_dir());
        let gone = live.path().to_owned();
        drop(live);
        assert!(!gone.exists() && other.path().is_dir());
    }
}
