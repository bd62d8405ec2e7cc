//! A zygote of the tiny guest in a process of its own, and copies of it, asked for as a node asks.

use std::io::PipeReader;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use forkd_proto::monitor::{self, Backing, Command, Event, Role, ZygoteConfig};
use forkd_types::StageTimings;

use super::guest::{self, Failure, Private};
use crate::carried::Carried;
use crate::fork::{self, Side};
use crate::vcpu_thread::chain;
use crate::zygote;

/// How long one copy may take to say something before it is given up.
const DEADLINE: Duration = Duration::from_secs(60);

/// How much memory the guest has, and how much of it is not zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Size {
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Of that, MiB that the snapshot stores.
    pub touched_mib: u64,
}

/// A zygote that is ready; it ends when this is dropped.
#[derive(Debug)]
pub struct RawZygote {
    control: UnixStream,
    scratch: PathBuf,
}

/// Descriptors for copies that are still to be asked for, made ahead as a node does.
#[derive(Debug)]
pub struct Prepared {
    ours: Vec<UnixStream>,
    theirs: Vec<(UnixStream, Private)>,
    console: PipeReader,
    console_end: std::io::PipeWriter,
}

/// Copies that were asked for.
#[derive(Debug)]
pub struct Copies {
    /// The control connection of each.
    pub controls: Vec<UnixStream>,
    /// Every copy prints one newline here when its guest has run.
    pub console: PipeReader,
}

impl RawZygote {
    /// Boots the guest in a process of its own and holds it ready. Scratch files have no name and
    /// lie in `scratch`.
    pub fn launch(scratch: &Path, size: Size) -> Result<Self, Failure> {
        let memory_bytes = size.memory_mib << 20;
        let memory = guest::memory_layer(scratch, memory_bytes, size.touched_mib << 20)?;
        let (control, theirs) = UnixStream::pair()?;
        let private = Private::new(scratch)?;
        if fork::fork()? == Side::Child {
            // Not the control sockets of zygotes that other threads launch: each would keep the others alive.
            fork::close_all_but(&[
                memory.as_raw_fd(),
                private.vsock.as_raw_fd(),
                private.overlay.as_raw_fd(),
                theirs.as_raw_fd(),
            ]);
            fork::exit(hold(memory, memory_bytes, private, theirs.into()));
        }
        drop(theirs);
        match monitor::receive(&control)?.0 {
            Event::Ready { .. } => Ok(Self { control, scratch: scratch.to_owned() }),
            other => Err(format!("the zygote did not come up: {other:?}").into()),
        }
    }

    /// Holds a snapshot ready, given what a zygote is launched with.
    pub(super) fn over(scratch: &Path, roles: &[Role], fds: Vec<OwnedFd>) -> Result<Self, Failure> {
        let (control, theirs) = UnixStream::pair()?;
        if fork::fork()? == Side::Child {
            let keep: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).chain([theirs.as_raw_fd()]).collect();
            fork::close_all_but(&keep);
            fork::exit(hold_snapshot(roles, fds, theirs.into()));
        }
        drop((theirs, fds));
        match monitor::receive(&control)?.0 {
            Event::Ready { .. } => Ok(Self { control, scratch: scratch.to_owned() }),
            other => Err(format!("the zygote did not come up: {other:?}").into()),
        }
    }

    /// Makes what `n` copies will be given.
    pub fn prepare(&self, n: usize) -> Result<Prepared, Failure> {
        let (console, console_end) = std::io::pipe()?;
        let mut prepared = Prepared { ours: Vec::new(), theirs: Vec::new(), console, console_end };
        for _ in 0..n {
            let (ours, theirs) = UnixStream::pair()?;
            ours.set_read_timeout(Some(DEADLINE))?;
            prepared.ours.push(ours);
            prepared.theirs.push((theirs, Private::new(&self.scratch)?));
        }
        Ok(prepared)
    }

    /// Asks for all copies, one request each, and waits until the zygote has forked the last.
    pub fn fork(&self, prepared: Prepared) -> Result<Copies, Failure> {
        let Prepared { ours, theirs, console, console_end } = prepared;
        let roles = [Role::Control, Role::VsockListener, Role::Console, Role::DiskOverlay];
        // Answers are read in between: two full sockets would wait for each other for ever.
        for (wave, copies) in theirs.chunks(WAVE).enumerate() {
            for (index, (control, private)) in copies.iter().enumerate() {
                let name = format!("raw-{}", wave * WAVE + index);
                let command = Command::Fork { fds: roles.to_vec(), name, disk_bytes: None };
                let fds = [control.as_fd(), private.vsock.as_fd(), console_end.as_fd(), private.overlay.as_fd()];
                monitor::send(&self.control, &command, &fds)?;
            }
            for _ in copies {
                match monitor::receive(&self.control)?.0 {
                    Event::Forked { .. } => {}
                    other => return Err(format!("the zygote did not fork: {other:?}").into()),
                }
            }
        }
        Ok(Copies { controls: ours, console })
    }
}

/// Requests under way at once.
const WAVE: usize = 128;

impl Copies {
    /// Waits until every copy runs and returns the stages of each.
    pub fn stages(&self) -> Result<Vec<StageTimings>, Failure> {
        self.controls
            .iter()
            .map(|control| match monitor::receive(control)?.0 {
                Event::Running { stages } => Ok(stages),
                other => Err(format!("a copy did not come up: {other:?}").into()),
            })
            .collect()
    }
}

/// The process of a zygote that is given a snapshot.
fn hold_snapshot(roles: &[Role], fds: Vec<OwnedFd>, control: OwnedFd) -> i32 {
    fork::reap_children_automatically();
    let config = ZygoteConfig { backing: Backing::File, prefetch: Vec::new() };
    let loaded = Carried::new(roles, fds)
        .map_err(Failure::from)
        .and_then(|mut carried| Ok(zygote::load(&config, &mut carried)?));
    let (seed, warnings) = match loaded {
        Ok(loaded) => loaded,
        Err(error) => {
            let _ = monitor::send(&control, &Event::Failed { error: chain(&*error) }, &[]);
            return 1;
        }
    };
    let config = &seed.state.config;
    let ready = Event::Ready { vcpus: config.vcpus, memory_bytes: config.memory_bytes, warnings, network: false };
    if monitor::send(&control, &ready, &[]).is_ok() {
        zygote::serve(&seed, &control);
    }
    0
}

/// The process of a zygote that boots its guest itself.
fn hold(memory: std::fs::File, memory_bytes: u64, private: Private, control: OwnedFd) -> i32 {
    fork::reap_children_automatically();
    let event = match guest::boot(memory, memory_bytes, private).and_then(|mut seed| {
        zygote::lighten(&mut seed)?;
        Ok(seed)
    }) {
        Ok(seed) => {
            // A process of one thread, as a launched zygote is: the booted machine's stay behind.
            match fork::fork() {
                Ok(Side::Child) => {
                    let ready = Event::Ready { vcpus: 1, memory_bytes, warnings: Vec::new(), network: false };
                    if monitor::send(&control, &ready, &[]).is_ok() {
                        zygote::serve(&seed, &control);
                    }
                    fork::exit(0);
                }
                Ok(Side::Parent(_)) => return 0,
                Err(error) => Event::Failed { error: error.to_string() },
            }
        }
        Err(error) => Event::Failed { error: error.to_string() },
    };
    let _ = monitor::send(&control, &event, &[]);
    1
}
