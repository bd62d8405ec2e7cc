//! Messages between the node and a monitor (`forkd-vmm`).
//!
//! A monitor starts with a connected control socket and a [`Launch`] message on it. Every process
//! that is forked from a monitor gets a control socket of its own with the request that makes it.
//! Descriptors travel beside the message that names them; a message lists what it carries in
//! [`Roles`](Role), in order.
//!
//! ```text
//! node                         zygote                       child
//!  │── Launch(Restore) ─────────►│
//!  │◄──────────── Event::Ready ──│
//!  │── Command::Fork + fds ─────►│── fork(2) ────────────────►│
//!  │◄─────── Event::Forked{pid} ─│                            │
//!  │◄────────────────────────────────── Event::Running ───────│   on the child's own socket
//! ```

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use forkd_types::StageTimings;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::frame::{FrameError, HEADER_LEN, Header, Kind};

/// The most descriptors that travel with one call; the kernel's own limit is 253. A message with more, as that to
/// a zygote of a deep chain with several disks, is sent in as many parts: see [`part`].
pub const MAX_FDS: usize = 250;

/// What a descriptor that travels with a message is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// `/dev/kvm`.
    Kvm,
    /// Connected stream socket: the new process's control connection.
    Control,
    /// Listening unix socket on which a restarted node finds the process again.
    ControlListener,
    /// Listening unix socket for host-side vsock connections.
    VsockListener,
    /// Append-only file for the guest's console.
    Console,
    /// Uncompressed kernel (ELF `vmlinux`) or bzImage, read only.
    Kernel,
    /// Initramfs, read only.
    Initramfs,
    /// Immutable raw base image of a disk that its machine may write, read only; with [`DiskShared`](Self::DiskShared)
    /// repeated in disk order.
    DiskBase,
    /// Raw image of a disk that its machine cannot write, read only. Takes the place of a `DiskBase` in their order;
    /// neither layers nor overlays go with it.
    DiskShared,
    /// Empty read-write scratch file for the private blocks of a disk that can be written; repeated in disk order.
    DiskOverlay,
    /// Sealed block layer, oldest first, read only, of the disk whose `DiskBase` was carried last before it.
    DiskLayer,
    /// Tap device of network interface N; repeated in interface order.
    Tap,
    /// `vmstate` of a snapshot, read only.
    VmState,
    /// `memory.layer` of a snapshot, oldest first; repeated.
    MemoryLayer,
    /// Directory in which a snapshot's files are created.
    SnapshotDir,
    /// cgroup directory (v2) that the new process is born into.
    Cgroup,
}

/// First message to a fresh monitor.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Launch {
    /// What the carried descriptors are, in order.
    pub fds: Vec<Role>,
    /// Name in process listings and logs.
    pub name: String,
    /// What to do.
    pub action: LaunchAction,
}

/// What a fresh monitor does.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "snake_case")]
pub enum LaunchAction {
    /// Boot a kernel and run. Carries `Kvm`, `Kernel`, `Initramfs`, disks, `Console`, `VsockListener`.
    Boot(BootConfig),
    /// Hold a snapshot ready to fork; never run. Carries `Kvm`, `VmState`, `MemoryLayer`s, disks.
    Zygote(ZygoteConfig),
}

/// A virtual machine to boot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BootConfig {
    /// vCPUs, 1 to 8.
    pub vcpus: u8,
    /// Guest memory in bytes, a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// Kernel command line added to what the machine itself needs.
    pub kernel_args: String,
    /// Ethernet address of the network interface, if a `Tap` is carried.
    pub mac: Option<[u8; 6]>,
    /// Logical size of each disk in bytes, in disk order.
    pub disks: Vec<u64>,
    /// Context id of the vsock device, at least 3.
    pub guest_cid: u32,
}

/// A snapshot to hold.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ZygoteConfig {
    /// How guest memory is backed.
    pub backing: Backing,
    /// Page runs to read ahead, from the working-set record.
    pub prefetch: Vec<forkd_types::PageRun>,
}

/// How a zygote's memory is backed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Backing {
    /// The snapshot's file, mapped privately: nothing is copied.
    #[default]
    File,
    /// Copied once into transparent huge pages.
    TransparentHugePages,
    /// Copied once into reserved 2 MiB pages; falls back to `File` when too few are free.
    ReservedHugePages,
}

/// What the node asks of a running monitor or a zygote.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Command {
    /// Fork a copy that runs. Carries `Control`, `ControlListener`, `VsockListener`, `Console`, one
    /// `DiskOverlay` per writable disk for the copy, then, from a running source, one more per disk for the
    /// source itself; optionally `Tap`s and `Cgroup`.
    Fork {
        /// What the carried descriptors are, in order.
        fds: Vec<Role>,
        /// Name of the copy.
        name: String,
        /// How many bytes the disks of the copy may grow by, in all; without end when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        disk_bytes: Option<u64>,
    },
    /// Fork a copy that holds still, as a zygote does, and obeys `Fork`, `Snapshot`, `Pages` and `Kill`.
    /// Carries `Control` and, from a running source, one `DiskOverlay` per disk for the source; optionally
    /// `Cgroup`. The copy
    /// says [`Event::Ready`] on its own control connection, and ends with it. If it was given a
    /// `ControlListener`, it waits there for another node instead.
    Freeze {
        /// What the carried descriptors are, in order.
        fds: Vec<Role>,
        /// Name of the copy.
        name: String,
    },
    /// Fork a copy that writes a snapshot and exits. Carries `Control`, `SnapshotDir`, and, from a
    /// running source, one `DiskOverlay` per disk for the source; optionally `Cgroup`.
    Snapshot {
        /// What the carried descriptors are, in order.
        fds: Vec<Role>,
        /// How much is written.
        #[serde(default)]
        contents: Contents,
    },
    /// Which guest pages were touched or changed since the monitor began?
    Pages,
    /// Power the machine off at once.
    Kill,
}

/// How much of a machine a snapshot's files hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Contents {
    /// All of it: a base.
    #[default]
    Whole,
    /// What differs from the snapshot that the machine was forked from: a layer over it. A machine that
    /// was booted differs from nothing, so that all of it is written.
    Changes,
}

/// What a monitor tells the node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A zygote, or a frozen copy, is ready to fork.
    Ready {
        /// vCPUs of its snapshot.
        vcpus: u8,
        /// Guest memory of its snapshot in bytes.
        memory_bytes: u64,
        /// What was done otherwise than asked, for example a fallback to ordinary pages.
        warnings: Vec<String>,
        /// Whether its machine has a network interface, for which a copy needs a `Tap`.
        #[serde(default)]
        network: bool,
    },
    /// The virtual machine runs: its vCPUs are in the guest.
    Running {
        /// Where the time went since the request arrived.
        stages: StageTimings,
    },
    /// To `Fork`, `Freeze` and `Snapshot`, from the source: the copy exists and the source runs on.
    Forked {
        /// Process id of the copy.
        pid: i32,
        /// How long the source stood still; zero for a zygote.
        pause_us: u64,
        /// Where that time went.
        stages: StageTimings,
    },
    /// From a snapshot writer: every file is written and synced.
    Written {
        /// Facts the snapshot's description records.
        facts: SnapshotFacts,
        /// Where the time went.
        stages: StageTimings,
    },
    /// To `Pages`. Lists that would not fit a message are coarsened: their runs then also cover gaps.
    Pages {
        /// Pages present in the monitor, file-backed or private.
        present: Vec<forkd_types::PageRun>,
        /// Pages private to this monitor and its forks.
        private: Vec<forkd_types::PageRun>,
        /// How many pages are present, exactly.
        #[serde(default)]
        present_count: u64,
        /// How many pages are private, exactly.
        #[serde(default)]
        private_count: u64,
    },
    /// The machine stopped; the monitor exits after this.
    Stopped {
        /// Why.
        reason: StopReason,
    },
    /// A command could not be carried out; the machine is as it was.
    Failed {
        /// What was attempted, on which object, and why it failed.
        error: String,
    },
}

/// The most runs of one list in [`Event::Pages`]; two such lists fit a message.
const RUNS_LIMIT: usize = 8192;

impl Event {
    /// The answer to `Pages`, from ascending runs.
    pub fn pages(present: &[forkd_types::PageRun], private: &[forkd_types::PageRun]) -> Self {
        Self::Pages {
            present: coarsen(present),
            private: coarsen(private),
            present_count: forkd_types::PageRun::total(present).0,
            private_count: forkd_types::PageRun::total(private).0,
        }
    }
}

/// Joins runs across ever larger gaps until at most [`RUNS_LIMIT`] are left.
fn coarsen(runs: &[forkd_types::PageRun]) -> Vec<forkd_types::PageRun> {
    let mut coarse = runs.to_vec();
    let mut gap = 1;
    while coarse.len() > RUNS_LIMIT {
        let mut joined: Vec<forkd_types::PageRun> = Vec::with_capacity(coarse.len() / 2);
        for run in coarse {
            match joined.last_mut() {
                Some(last) if run.first - last.end() <= gap => last.count = run.end() - last.first,
                _ => joined.push(run),
            }
        }
        coarse = joined;
        gap *= 2;
    }
    coarse
}

/// What a snapshot writer knows about what it wrote.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SnapshotFacts {
    /// vCPUs.
    pub vcpus: u8,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Digest of `vmstate`.
    pub vmstate_digest: forkd_types::Digest,
    /// Digest of `memory.layer`.
    pub memory_digest: forkd_types::Digest,
    /// Pages in `memory.layer`.
    pub memory_pages: u64,
    /// Pages that `memory.layer` records as zero although the parent's are not.
    #[serde(default)]
    pub memory_zero_pages: u64,
    /// Digest and number of blocks of each `disk-N.layer` that there is.
    pub disks: Vec<(forkd_types::Digest, u64)>,
    /// The N of each of them, ascending. Nothing is said by a monitor that writes one for every disk.
    #[serde(default)]
    pub disk_numbers: Vec<usize>,
    /// Blocks that each `disk-N.layer` records as zero although those underneath are not.
    #[serde(default)]
    pub disk_zero_blocks: Vec<u64>,
    /// Bytes that the files take on disk, indexes and CPU state included.
    #[serde(default)]
    pub stored_bytes: u64,
}

/// Why a virtual machine stopped.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum StopReason {
    /// The guest powered itself off.
    PoweredOff,
    /// The guest asked for a reboot, which a monitor does not do.
    Rebooted,
    /// The guest kernel panicked.
    Panicked,
    /// The node asked.
    Killed,
    /// A vCPU could not go on.
    Crashed {
        /// What KVM said, with the instruction pointer and bytes.
        detail: String,
    },
}

/// How much of a frame of which `wire` is left goes out with the next call, and with how many of `fds`, which are
/// left too. Every part but the last is a single byte, which carries as many descriptors as it can.
pub fn part(wire: usize, fds: usize) -> (usize, usize) {
    if fds > MAX_FDS { (1.min(wire), MAX_FDS) } else { (wire, fds) }
}

/// Sends `message` with `fds` as one frame.
pub fn send(socket: impl AsFd, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<(), FrameError> {
    let wire = crate::frame::Frame::json(Kind::Request, message)?.encode();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let (mut sent, mut fds) = (0, fds);
    while sent < wire.len() {
        let (bytes, count) = part(wire.len() - sent, fds.len());
        let (with, later) = fds.split_at(count);
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !with.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(with)) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors for one message").into());
        }
        let wire = [IoSlice::new(&wire[sent..sent + bytes])];
        match rustix::net::sendmsg(&socket, &wire, &mut ancillary, SendFlags::NOSIGNAL) {
            // What was to go with a part goes with its first byte.
            Ok(n) => (sent, fds) = (sent + n, later),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
    }
    Ok(())
}

/// Receives one message and the descriptors that came with it (close-on-exec).
///
/// Blocks until the message is whole. [`FrameError::Closed`] at a clean end.
pub fn receive<T: DeserializeOwned>(socket: impl AsFd) -> Result<(T, Vec<OwnedFd>), FrameError> {
    let mut fds = Vec::new();
    let mut header = [0; HEADER_LEN];
    fill(&socket, &mut header, &mut fds, true)?;
    let header = Header::decode(header)?;
    let mut payload = vec![0; header.len];
    fill(&socket, &mut payload, &mut fds, false)?;
    let message = crate::frame::Frame { kind: header.kind, payload }.parse(Kind::Request)?;
    Ok((message, fds))
}

/// Fills `buffer` from `socket`, collecting descriptors; `at_start` tells a clean end from a torn
/// message.
fn fill(socket: &impl AsFd, buffer: &mut [u8], fds: &mut Vec<OwnedFd>, at_start: bool) -> Result<(), FrameError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut filled = 0;
    while filled < buffer.len() {
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut buffer[filled..])];
        let got = match rustix::net::recvmsg(socket, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => received.bytes,
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(io::Error::from(error).into()),
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        match got {
            0 if filled == 0 && at_start => return Err(FrameError::Closed),
            0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            n => filled += n,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (here, there) = UnixStream::pair().expect("socketpair");
        let mut file = File::from(rustix::fs::memfd_create("carried", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd"));
        file.write_all(b"carried").expect("write");
        let command = Command::Fork { fds: vec![Role::Console], name: "sb-1-0000".into(), disk_bytes: Some(7) };
        send(&here, &command, &[file.as_fd()]).expect("send");
        drop(here);
        let (got, mut fds): (Command, _) = receive(&there).expect("receive");
        assert_eq!(got, command);
        let mut copy = File::from(fds.pop().expect("one descriptor"));
        copy.rewind().expect("seek");
        let mut text = String::new();
        copy.read_to_string(&mut text).expect("read");
        assert_eq!(text, "carried");
        assert!(matches!(receive::<Command>(&there), Err(FrameError::Closed)));
    }

    #[test]
    fn long_page_lists_are_coarsened_until_they_fit_one_message() {
        let runs: Vec<_> = (0..100_000).map(|n| forkd_types::PageRun { first: n * 3 + n / 7, count: 1 }).collect();
        let event = Event::pages(&runs, &runs);
        crate::frame::Frame::json(Kind::Request, &event).expect("fits");
        let Event::Pages { present, present_count, .. } = event else { panic!("not pages") };
        assert_eq!(present_count, 100_000);
        assert!(runs.iter().all(|run| present.iter().any(|wide| wide.first <= run.first && run.end() <= wide.end())));
    }

    #[test]
    fn a_message_with_more_descriptors_than_one_call_takes_arrives_whole() {
        for count in [MAX_FDS, MAX_FDS + 1, 3 * MAX_FDS, 700] {
            let (here, there) = UnixStream::pair().expect("socketpair");
            let file =
                File::from(rustix::fs::memfd_create("numbered", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd"));
            let null = File::open("/dev/null").expect("open");
            let mut carried = vec![null.as_fd(); count];
            carried[count - 1] = file.as_fd();
            let command = Command::Snapshot { fds: vec![Role::DiskLayer; count], contents: Contents::Whole };
            let next = Command::Snapshot { fds: vec![Role::SnapshotDir], contents: Contents::Changes };
            send(&here, &command, &carried).expect("send");
            send(&here, &next, &[null.as_fd()]).expect("send");
            let (got, fds): (Command, _) = receive(&there).expect("receive");
            assert_eq!((got, fds.len()), (command, count));
            let inode = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).expect("stat").st_ino;
            assert_eq!(inode(fds[count - 1].as_fd()), inode(file.as_fd()), "their order is kept");
            assert_eq!(inode(fds[0].as_fd()), inode(null.as_fd()));
            let (got, fds): (Command, _) = receive(&there).expect("receive");
            assert_eq!((got, fds.len()), (next, 1));
        }
    }

    #[test]
    fn descriptors_of_consecutive_messages_stay_apart() {
        let (here, there) = UnixStream::pair().expect("socketpair");
        let null = File::open("/dev/null").expect("open");
        for count in [1, 3] {
            let command = Command::Snapshot { fds: vec![Role::SnapshotDir; count], contents: Contents::Whole };
            send(&here, &command, &vec![null.as_fd(); count]).expect("send");
        }
        for count in [1, 3] {
            let (_, fds): (Command, _) = receive(&there).expect("receive");
            assert_eq!(fds.len(), count);
        }
    }
}
