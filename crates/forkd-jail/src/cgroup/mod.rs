//! Groups of processes and their limits, by cgroup v2.
//!
//! [`Tree`] owns where the groups are; [`Group`] is one of them; [`GroupLimits`] says what its processes may take.

mod device;
mod group;
mod limits;
mod tree;

use std::io;
use std::path::PathBuf;

pub use device::DeviceNumber;
pub use group::{Group, MemoryEvents};
pub use limits::{GroupLimits, IoLimits};
pub use tree::Tree;

/// Whose groups lie beside each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Sandbox,
    Zygote,
    Helpers,
}

impl Kind {
    fn directory(self) -> &'static str {
        match self {
            Self::Sandbox => "sandboxes",
            Self::Zygote => "zygotes",
            Self::Helpers => "helpers",
        }
    }
}

/// Why processes cannot be limited.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The host has no unified hierarchy there.
    #[error(
        "{} is not in a cgroup v2 hierarchy; boot the host with systemd.unified_cgroup_hierarchy=1, name the place \
         of one with --cgroup, or do without limits with --limits off",
        path.display()
    )]
    NotV2 {
        /// Where one was looked for.
        path: PathBuf,
    },
    /// A controller is not there.
    #[error(
        "the {controller} controller is not available in {}: it is bound to cgroup v1, off on the kernel's command \
         line, or not delegated; `cat {}/cgroup.controllers` lists those there are",
        path.display(), path.display()
    )]
    NoController {
        /// The group above the one to be limited.
        path: PathBuf,
        /// The controller.
        controller: &'static str,
    },
    /// This process may not make groups there.
    #[error(
        "cannot make limited groups in {}: {source}; run the daemon as root, or delegate a group to its user \
         (Delegate=yes in a systemd unit) and name it with --cgroup",
        path.display()
    )]
    NotDelegated {
        /// The group.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Other processes are in the group itself.
    #[error(
        "{} has processes in it, and so cannot have limited groups below; name an empty one with --cgroup",
        path.display()
    )]
    Occupied {
        /// The group.
        path: PathBuf,
    },
    /// Disk limits need one disk to be about.
    #[error(
        "disk rates cannot be limited: the state directory is not on a block device of its own (in memory, on a \
         network, or made of several devices); leave disk_read_bps and the like out, or move --state-dir"
    )]
    NoDevice,
    /// A limit was not accepted.
    #[error("cannot write {value:?} to {}", path.display())]
    Limit {
        /// The file.
        path: PathBuf,
        /// What was written.
        value: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A group cannot be made, opened or removed.
    #[error("cannot {action} the control group {}", path.display())]
    Group {
        /// What was attempted.
        action: &'static str,
        /// The group.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}
