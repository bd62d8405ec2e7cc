//! A machine's directory: where its files lie, and the lock that serialises what changes them.
//!
//! ```text
//! <data>/machine/<name>/
//!   machine.json   description, tokens, the running QEMU
//!   disk.img       the data disk, sparse; survives stop and start
//!   config/        what the machine reads when it boots, written at every start
//!   console.log    the console of the last start
//!   console.previous.log   the console of the start before, which is where a machine that was healed died
//!   qmp.sock       QEMU's control socket
//!   qemu.log       what QEMU said
//!   lock           held while the machine is started, stopped or removed
//! ```

use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::error::MachineError;
use crate::progress::{Report, step};

const MAX_NAME: usize = 40;

/// Where one machine's files lie.
#[derive(Clone, Debug)]
pub(crate) struct MachineDirectory {
    path: PathBuf,
    /// Shared by all machines of this data directory: kernels, root disks, initramfs images.
    cache: PathBuf,
}

/// Held while the machine is changed. Dropping it lets the next one in, as does the end of the process.
#[derive(Debug)]
pub(crate) struct MachineLock {
    _file: File,
}

impl MachineDirectory {
    pub(crate) fn new(data: &Path, name: &str) -> Result<Self, MachineError> {
        let mut characters = name.chars();
        let plain = characters.next().is_some_and(|first| first.is_ascii_alphabetic())
            && characters.all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
        if !plain || name.len() > MAX_NAME {
            return Err(MachineError::BadName { name: name.to_owned() });
        }
        let data = std::path::absolute(data).map_err(MachineError::file("find", data))?;
        Ok(Self { path: data.join("machine").join(name), cache: data.join("cache") })
    }

    pub(crate) fn exists(&self) -> bool {
        self.record().exists()
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn cache(&self) -> &Path {
        &self.cache
    }

    pub(crate) fn record(&self) -> PathBuf {
        self.path.join("machine.json")
    }

    pub(crate) fn disk(&self) -> PathBuf {
        self.path.join("disk.img")
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.path.join("config")
    }

    pub(crate) fn console(&self) -> PathBuf {
        self.path.join("console.log")
    }

    /// Where the console goes when the machine is started again.
    pub(crate) fn previous_console(&self) -> PathBuf {
        self.path.join("console.previous.log")
    }

    /// Takes the lock, waiting for whoever has it. Makes the directory if need be.
    pub(crate) fn lock(&self, report: Report<'_>) -> Result<MachineLock, MachineError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.path)
            .map_err(MachineError::file("create", &self.path))?;
        let path = self.path.join("lock");
        let file = fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(MachineError::file("open", &path))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            step(report, "waiting for another forkd that is starting or stopping the machine");
            loop {
                match flock(&file, FlockOperation::LockExclusive) {
                    Ok(()) => break,
                    Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(MachineError::file("lock", &path)(error.into())),
                }
            }
        }
        Ok(MachineLock { _file: file })
    }

    /// Removes everything. The lock's file goes with it: a waiter then holds a lock on nothing, finds
    /// no machine and says so.
    pub(crate) fn remove(&self, _lock: &MachineLock) -> Result<(), MachineError> {
        fs::remove_dir_all(&self.path).map_err(MachineError::file("remove", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn names_that_could_leave_the_directory_are_refused() {
        let data = Path::new("/data");
        let directory = MachineDirectory::new(data, "default").expect("plain");
        assert_eq!(directory.path(), Path::new("/data/machine/default"));
        for bad in ["", "..", "a/b", ".hidden", "-x", "a b", "1st", &"a".repeat(41)] {
            assert!(matches!(MachineDirectory::new(data, bad), Err(MachineError::BadName { .. })), "{bad:?}");
        }
    }

    #[test]
    fn a_second_user_of_the_lock_waits_and_says_so() {
        let data = tempfile::tempdir().expect("temporary directory");
        let directory = MachineDirectory::new(data.path(), "m").expect("plain");
        let held = directory.lock(&mut |_| panic!("nobody to wait for")).expect("free");
        let (said, hear) = mpsc::channel();
        let other = directory.clone();
        let waiter = std::thread::spawn(move || {
            let lock = other.lock(&mut |news| said.send(news).expect("heard")).expect("in the end");
            drop(lock);
        });
        hear.recv_timeout(Duration::from_secs(5)).expect("says that it waits");
        assert!(!waiter.is_finished());
        drop(held);
        waiter.join().expect("gets it");
    }
}
