//! The daemon's own part of the hierarchy.
//!
//! ```text
//! /sys/fs/cgroup/forkd      given to the daemon, or made by it
//!   ├─ sandboxes/<id>       one machine each, with its limits
//!   ├─ zygotes/<tag>        one monitor each that is forked from
//!   └─ helpers              frozen copies, writers of snapshots, boots
//! ```
//!
//! A group that has others below it holds no processes itself; the kernel insists on that.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::device::DeviceNumber;
use super::group::{Group, open, write};
use super::limits::GroupLimits;
use super::{CgroupError, Kind};

/// What is used of the kernel's controllers. Memory and processes are indispensable.
const WANTED: [&str; 4] = ["memory", "pids", "cpu", "io"];
const NEEDED: [&str; 2] = ["memory", "pids"];

/// The magic number of a cgroup v2 file system.
const CGROUP2: i64 = 0x6367_7270;

/// Makes and finds groups.
#[derive(Debug)]
pub struct Tree {
    root: PathBuf,
    controllers: BTreeSet<String>,
    device: Option<DeviceNumber>,
    helpers: OwnedFd,
}

impl Tree {
    /// Takes charge of the group `root`, which is made if it is not there. Disk limits are for the disk below
    /// `scratch`.
    ///
    /// # Errors
    /// The text says what the host lacks and how to mend it.
    pub fn prepare(root: &Path, scratch: &Path) -> Result<Self, CgroupError> {
        let parent = root
            .parent()
            .filter(|parent| parent.is_absolute())
            .ok_or_else(|| CgroupError::NotV2 { path: root.to_owned() })?;
        let v2 = rustix::fs::statfs(parent).is_ok_and(|found| found.f_type == CGROUP2);
        if !v2 {
            return Err(CgroupError::NotV2 { path: parent.to_owned() });
        }
        let offered = words(&parent.join("cgroup.controllers"));
        if let Some(missing) = NEEDED.iter().find(|controller| !offered.contains(**controller)) {
            return Err(CgroupError::NoController { path: parent.to_owned(), controller: missing });
        }
        let controllers: Vec<&str> = WANTED.into_iter().filter(|controller| offered.contains(*controller)).collect();
        enable(parent, &controllers)?;
        make(root)?;
        enable(root, &controllers)?;
        for kind in [Kind::Sandbox, Kind::Zygote, Kind::Helpers] {
            make(&root.join(kind.directory()))?;
        }
        for kind in [Kind::Sandbox, Kind::Zygote] {
            enable(&root.join(kind.directory()), &controllers)?;
        }
        let controllers = controllers.into_iter().map(str::to_owned).collect();
        let helpers = open(&root.join(Kind::Helpers.directory()))?;
        Ok(Self { root: root.to_owned(), controllers, device: DeviceNumber::of_disk_below(scratch), helpers })
    }

    /// Whether `limits` can be set here.
    ///
    /// # Errors
    /// The limit that cannot be, and why.
    pub fn check(&self, limits: &GroupLimits) -> Result<(), CgroupError> {
        if let Some(controller) = limits.controllers().find(|controller| !self.controllers.contains(*controller)) {
            return Err(CgroupError::NoController { path: self.root.clone(), controller });
        }
        if !limits.io.is_empty() && self.device.is_none() {
            return Err(CgroupError::NoDevice);
        }
        Ok(())
    }

    /// Makes the group of one machine, of which all processes end when the kernel must end one for want of memory.
    pub fn sandbox(&self, name: &str, limits: &GroupLimits) -> Result<Group, CgroupError> {
        self.check(limits)?;
        let group = self.fresh(Kind::Sandbox, name)?;
        group.limit("memory.oom.group", "1")?;
        for (file, text) in limits.files(self.device) {
            group.limit(file, &text)?;
        }
        Ok(group)
    }

    /// Makes the group of a monitor that is forked from.
    pub fn zygote(&self, name: &str) -> Result<Group, CgroupError> {
        self.fresh(Kind::Zygote, name)
    }

    /// The group of what serves one request or holds still. It is never removed.
    pub fn helpers(&self) -> BorrowedFd<'_> {
        self.helpers.as_fd()
    }

    /// Moves a process into the group of [`helpers`](Self::helpers).
    pub fn take_in_helper(&self, pid: i32) -> Result<(), CgroupError> {
        let path = self.root.join(Kind::Helpers.directory()).join("cgroup.procs");
        write(path, &pid.to_string())
    }

    /// The group of a machine that an earlier daemon made, found by its process.
    pub fn group_of(&self, pid: i32) -> Option<Group> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let name = sandbox_in(&text)?;
        Group::open(self.root.join(Kind::Sandbox.directory()).join(name)).ok()
    }

    /// The group of a machine of which only the name is known still.
    pub fn remaining(&self, name: &str) -> Option<Group> {
        Group::open(self.root.join(Kind::Sandbox.directory()).join(name)).ok()
    }

    /// Removes groups without processes; those with some stay.
    pub fn sweep(&self) {
        for kind in [Kind::Sandbox, Kind::Zygote] {
            let Ok(entries) = self.root.join(kind.directory()).read_dir() else { continue };
            for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
                let _ = fs::remove_dir(entry.path());
            }
        }
    }

    /// A group called `name`; an empty one that was left behind is replaced, so that its limits are gone.
    fn fresh(&self, kind: Kind, name: &str) -> Result<Group, CgroupError> {
        let path = self.root.join(kind.directory()).join(name);
        let made = match fs::create_dir(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                fs::remove_dir(&path).and_then(|()| fs::create_dir(&path))
            }
            made => made,
        };
        made.map_err(|source| CgroupError::Group { action: "make", path: path.clone(), source })?;
        Group::open(path)
    }
}

/// The name of the sandbox's group in a `/proc/<pid>/cgroup`.
fn sandbox_in(text: &str) -> Option<&str> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    let (above, name) = path.rsplit_once('/')?;
    (above.rsplit('/').next() == Some(Kind::Sandbox.directory()) && !name.is_empty()).then_some(name)
}

fn make(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(CgroupError::NotDelegated { path: path.to_owned(), source: error })
        }
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            Err(CgroupError::Group { action: "make", path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

/// Lets the groups below `path` be limited by `controllers`.
fn enable(path: &Path, controllers: &[&str]) -> Result<(), CgroupError> {
    let file = path.join("cgroup.subtree_control");
    let there = words(&file);
    let missing: Vec<String> = controllers
        .iter()
        .filter(|controller| !there.contains(**controller))
        .map(|controller| format!("+{controller}"))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let write = || fs::write(&file, missing.join(" "));
    let outcome = match write() {
        // In a container the daemon may be in that very group itself, which then cannot have limited ones below.
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => step_aside(path).and_then(|()| write()),
        outcome => outcome,
    };
    outcome.map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            CgroupError::NotDelegated { path: path.to_owned(), source }
        }
        io::ErrorKind::ResourceBusy => CgroupError::Occupied { path: path.to_owned() },
        _ => CgroupError::Group { action: "enable controllers in", path: path.to_owned(), source },
    })
}

/// Moves this process out of `path` into a group of its own below.
fn step_aside(path: &Path) -> io::Result<()> {
    let own = path.join("forkd-daemon");
    fs::create_dir(&own).or_else(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => Ok(()),
        _ => Err(error),
    })?;
    fs::write(own.join("cgroup.procs"), std::process::id().to_string())
}

fn words(file: &Path) -> BTreeSet<String> {
    fs::read_to_string(file).unwrap_or_default().split_whitespace().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_is_no_hierarchy_is_refused_with_the_mend() {
        let dir = tempfile::tempdir().expect("tempdir");
        let error =
            Tree::prepare(&dir.path().join("forkd"), dir.path()).expect_err("an ordinary directory").to_string();
        assert!(error.contains("systemd.unified_cgroup_hierarchy=1") && error.contains("--limits off"), "{error}");
        assert!(!dir.path().join("forkd").exists(), "nothing was made");
        assert!(Tree::prepare(Path::new("forkd"), dir.path()).is_err(), "a relative path");
    }

    #[test]
    fn the_group_of_a_machine_is_told_from_others() {
        let found = |text| sandbox_in(text);
        assert_eq!(found("1:name=x:/a\n0::/forkd/sandboxes/sb-7-0001\n"), Some("sb-7-0001"));
        assert_eq!(found("0::/forkd/zygotes/py\n"), None);
        assert_eq!(found("0::/\n"), None);
        assert_eq!(found("0::/forkd/sandboxes/\n"), None);
        assert_eq!(found("3:memory:/sandboxes/x\n"), None, "a group of v1");
    }
}
