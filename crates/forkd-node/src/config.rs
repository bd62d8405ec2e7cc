//! What a node is told at start.

use std::path::{Path, PathBuf};
use std::time::Duration;

use forkd_types::ByteSize;

use crate::networks::NetworkSettings;

/// Settings of a node. [`NodeConfig::new`] gives every duration and limit its default.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Directory of the state database, sockets, consoles and scratch files.
    pub state_dir: PathBuf,
    /// Root of the snapshot store; the state directory unless said otherwise.
    pub store_root: PathBuf,
    /// The monitor program.
    pub vmm: PathBuf,
    /// The KVM device.
    pub kvm: PathBuf,
    /// Whether sandboxes are limited.
    pub limits: LimitsMode,
    /// The daemon's own cgroup v2 directory, in which every monitor gets a group.
    pub cgroup_root: PathBuf,
    /// Memory of the host that no sandbox is to have.
    pub memory_reserve: ByteSize,
    /// How many times the rest of the host's memory may be promised by memory limits.
    pub memory_overcommit: f64,
    /// Whether sandboxes have networks; none unless asked for.
    pub network: NetworkSettings,
    /// How long one child may take from its fork until its agent has answered.
    pub child_deadline: Duration,
    /// How many children of one spawn come up at the same time.
    pub spawn_concurrency: usize,
    /// How long a zygote may take to have its snapshot mapped.
    pub zygote_deadline: Duration,
    /// A zygote that nobody forked for this long is stopped.
    pub zygote_idle: Duration,
    /// How long the record and console of a sandbox that stopped by itself are kept.
    pub keep_stopped: Duration,
    /// How long writing a snapshot's files may take.
    pub snapshot_deadline: Duration,
    /// The most bytes of output that a buffered `exec` collects.
    pub exec_output_limit: usize,
    /// How many branches may be under way at a time.
    pub branch_concurrency: usize,
    /// A workspace that was made without saying so is suspended when nothing was run in it for this long.
    pub workspace_idle: Option<Duration>,
    /// The agent program that becomes `/init` of guests that this host boots from a kernel and a root disk of its own.
    pub agent: PathBuf,
    /// How much memory checkpoints may take together before the oldest go to disk.
    pub checkpoint_memory_bytes: u64,
}

/// Whether sandboxes are limited.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LimitsMode {
    /// As asked for; a host that cannot refuses requests that ask.
    Enforced,
    /// Not at all; requests that ask are told so and go on.
    Off,
}

/// A setting that cannot work.
#[derive(Debug, thiserror::Error)]
pub enum NodeConfigError {
    /// Socket paths below the state directory would not fit a socket address.
    #[error(
        "the state directory {} is too long by {excess} bytes for unix socket paths below it; use a shorter one",
        path.display()
    )]
    StateDirTooLong {
        /// The directory.
        path: PathBuf,
        /// By how much.
        excess: usize,
    },
    /// The current directory, needed to make a relative path absolute, is unknown.
    #[error("cannot make {} absolute: {source}", path.display())]
    Relative {
        /// The path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// `sun_path` holds 108 bytes including the final NUL.
const SOCKET_PATH_LIMIT: usize = 107;

/// The longest name below the state directory: `/run/` + an id + `.control`.
const LONGEST_SOCKET_NAME: usize = "/run/sb-ffffffffff-ffffffff.control".len();

impl NodeConfig {
    /// Settings for a node with its state in `state_dir`, driving the monitor program `vmm`.
    pub fn new(state_dir: &Path, vmm: &Path) -> Result<Self, NodeConfigError> {
        let state_dir = absolute(state_dir)?;
        let needed = state_dir.as_os_str().len() + LONGEST_SOCKET_NAME;
        if needed > SOCKET_PATH_LIMIT {
            return Err(NodeConfigError::StateDirTooLong { path: state_dir, excess: needed - SOCKET_PATH_LIMIT });
        }
        Ok(Self {
            store_root: state_dir.clone(),
            state_dir,
            vmm: absolute(vmm)?,
            kvm: "/dev/kvm".into(),
            limits: LimitsMode::Enforced,
            cgroup_root: "/sys/fs/cgroup/forkd".into(),
            memory_reserve: default_reserve(),
            memory_overcommit: 1.0,
            network: NetworkSettings::default(),
            child_deadline: Duration::from_secs(60),
            spawn_concurrency: default_concurrency(),
            zygote_deadline: Duration::from_secs(120),
            zygote_idle: Duration::from_secs(600),
            keep_stopped: Duration::from_secs(3600),
            snapshot_deadline: Duration::from_secs(1800),
            exec_output_limit: 64 << 20,
            branch_concurrency: 4,
            workspace_idle: None,
            agent: absolute(vmm)?.with_file_name("forkd-agent"),
            checkpoint_memory_bytes: default_checkpoint_memory(),
        })
    }
}

/// Coming up is nearly all computing: more than a few children per processor only slow each other
/// down, until each misses its deadline.
fn default_concurrency() -> usize {
    4 * std::thread::available_parallelism().map_or(1, usize::from)
}

/// A twentieth of the host's memory, and at least 256 MiB of a host that has four times as much.
fn default_reserve() -> ByteSize {
    let memory = rustix::system::sysinfo();
    let total = memory.totalram as u64 * u64::from(memory.mem_unit);
    ByteSize((total / 20).max(ByteSize::mib(256).bytes().min(total / 4)))
}

/// A quarter of the host's memory.
fn default_checkpoint_memory() -> u64 {
    let memory = rustix::system::sysinfo();
    memory.totalram as u64 * u64::from(memory.mem_unit) / 4
}

fn absolute(path: &Path) -> Result<PathBuf, NodeConfigError> {
    std::path::absolute(path).map_err(|source| NodeConfigError::Relative { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_directory_too_long_for_sockets_is_refused_at_once() {
        let vmm = Path::new("/vmm");
        let longest = format!("/{}", "d".repeat(SOCKET_PATH_LIMIT - LONGEST_SOCKET_NAME - 1));
        NodeConfig::new(longest.as_ref(), vmm).expect("just fits");
        let error = NodeConfig::new(format!("{longest}d").as_ref(), vmm).expect_err("one too long");
        assert!(error.to_string().contains("by 1 bytes"), "{error}");
    }
}
