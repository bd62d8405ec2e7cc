//! Memory limits by cgroup v2.
//!
//! A host without a unified hierarchy, or without the memory controller in it, cannot limit; the
//! sandbox then runs without its limit and the log says so.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use forkd_types::ByteSize;
use rustix::fs::{Mode, OFlags};

/// Makes groups for sandboxes below one directory.
#[derive(Clone, Debug)]
pub(crate) struct Cgroups {
    root: PathBuf,
}

impl Cgroups {
    /// Groups below `root`, which is made when first needed.
    pub(crate) fn below(root: PathBuf) -> Self {
        Self { root }
    }

    /// Makes a group called `name` with a memory limit and opens its directory.
    pub(crate) fn limited(&self, name: &str, memory: ByteSize) -> io::Result<OwnedFd> {
        self.prepare_root()?;
        let group = self.root.join(name);
        fs::create_dir(&group).or_else(accept_existing)?;
        fs::write(group.join("memory.max"), memory.bytes().to_string())?;
        Ok(rustix::fs::open(&group, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
    }

    /// Removes the group called `name`, which must have no process left.
    pub(crate) fn remove(&self, name: &str) {
        match fs::remove_dir(self.root.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(group = name, %error, "cannot remove cgroup");
            }
            _ => {}
        }
    }

    /// Removes groups that are empty; those with live processes stay.
    pub(crate) fn sweep(&self) {
        let Ok(entries) = self.root.read_dir() else { return };
        for entry in entries.flatten().filter(|entry| entry.path().is_dir()) {
            let _ = fs::remove_dir(entry.path());
        }
    }

    fn prepare_root(&self) -> io::Result<()> {
        let parent = self.root.parent().unwrap_or(Path::new("/"));
        if !parent.join("cgroup.controllers").exists() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("{} is not a cgroup v2 hierarchy", parent.display()),
            ));
        }
        fs::write(parent.join("cgroup.subtree_control"), "+memory")?;
        fs::create_dir(&self.root).or_else(accept_existing)?;
        fs::write(self.root.join("cgroup.subtree_control"), "+memory")
    }
}

fn accept_existing(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::AlreadyExists { Ok(()) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_the_hierarchy_says_so() {
        let dir = tempfile::tempdir().expect("tempdir");
        let groups = Cgroups::below(dir.path().join("forkd"));
        let error = groups.limited("sb-1", ByteSize::mib(64)).expect_err("an ordinary directory");
        assert!(error.to_string().contains("not a cgroup v2 hierarchy"), "{error}");
    }
}
