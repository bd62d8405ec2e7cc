//! One group: its processes, what happened to them, and its end.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

use super::CgroupError;

/// How often, and how long apart, a group whose processes were just ended is tried to be removed.
const REMOVAL_TRIES: u32 = 100;
const REMOVAL_PAUSE: Duration = Duration::from_millis(10);

/// A group that is this process's to remove.
///
/// It is removed when this is dropped, unless processes are in it: then it stays, with them. What holds a running
/// machine may thus be dropped when the daemon ends, and the next daemon finds the group by its process.
#[derive(Debug)]
pub struct Group {
    path: PathBuf,
    directory: OwnedFd,
}

/// How often something happened to the memory of a group: `memory.events`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MemoryEvents {
    /// The processes were slowed down because they were above `memory.high`.
    pub high: u64,
    /// The limit was reached, and nothing more could be reclaimed.
    pub oom: u64,
    /// A process was ended for want of memory, the group's or the host's.
    ///
    /// The kernel counts before it sends the signal, so whoever saw the process end sees the count too.
    pub oom_kill: u64,
}

impl MemoryEvents {
    fn parse(text: &str) -> Self {
        let count = |key: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
            line.and_then(|count| count.trim().parse().ok()).unwrap_or_default()
        };
        Self { high: count("high"), oom: count("oom"), oom_kill: count("oom_kill") }
    }
}

impl Group {
    pub(super) fn open(path: PathBuf) -> Result<Self, CgroupError> {
        let directory = open(&path)?;
        Ok(Self { path, directory })
    }

    /// The descriptor with which a process is born into the group.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        self.directory.try_clone()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves a process into the group, all of its threads.
    pub fn take_in(&self, pid: i32) -> Result<(), CgroupError> {
        write(self.path.join("cgroup.procs"), &pid.to_string())
    }

    /// What happened to its memory so far.
    pub fn memory_events(&self) -> MemoryEvents {
        fs::read_to_string(self.path.join("memory.events")).map(|text| MemoryEvents::parse(&text)).unwrap_or_default()
    }

    /// Bytes that its processes have charged to it, if the kernel says.
    pub fn memory_current(&self) -> Option<u64> {
        fs::read_to_string(self.path.join("memory.current")).ok()?.trim().parse().ok()
    }

    /// Ends every process that is left and removes the group; blocks until they have ended.
    pub fn dissolve(&self) -> Result<(), CgroupError> {
        let mut tries = 0;
        loop {
            match fs::remove_dir(&self.path) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && tries < REMOVAL_TRIES => {
                    tries += 1;
                    // Kernels from 5.14 have it; before, whoever is in there is waited for only.
                    let _ = fs::write(self.path.join("cgroup.kill"), "1");
                    std::thread::sleep(REMOVAL_PAUSE);
                }
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(CgroupError::Group { action: "remove", path: self.path.clone(), source: error });
                }
                _ => return Ok(()),
            }
        }
    }

    /// Sets one limit.
    pub(super) fn limit(&self, file: &'static str, text: &str) -> Result<(), CgroupError> {
        // Where the kernel does not account for swap there is nothing to limit.
        if file == "memory.swap.max" && text == "0" && !self.path.join(file).exists() {
            return Ok(());
        }
        write(self.path.join(file), text)
    }
}

/// Opens the directory of a group.
pub(super) fn open(path: &Path) -> Result<OwnedFd, CgroupError> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(|error| CgroupError::Group {
        action: "open",
        path: path.to_owned(),
        source: error.into(),
    })
}

/// Writes to a file of a group.
pub(super) fn write(path: PathBuf, text: &str) -> Result<(), CgroupError> {
    fs::write(&path, text).map_err(|source| CgroupError::Limit { path, value: text.to_owned(), source })
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_by_their_whole_name() {
        let text = "low 0\nhigh 3\nmax 17\noom 2\noom_kill 1\noom_group_kill 1\n";
        assert_eq!(MemoryEvents::parse(text), MemoryEvents { high: 3, oom: 2, oom_kill: 1 });
        assert_eq!(MemoryEvents::parse("oom_kill x\nhigher 9\n"), MemoryEvents::default());
    }
}
