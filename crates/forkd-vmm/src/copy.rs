//! What a forked child does: become a running copy, hold still as a frozen one, or write a snapshot.
//!
//! All begin alike: close what belongs to the parent. All end in [`exit`](crate::fork::exit), never by
//! returning (see [`crate::fork`]).

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use forkd_devices::block::Budget;
use forkd_proto::monitor::{self, Contents, Event, Role};
use forkd_types::ByteSize;
use rustix::net::SocketFlags;

use crate::carried::{Carried, CarriedError};
use crate::disks;
use crate::event_loop::{Ending, EventLoop};
use crate::fork;
use crate::machine::{Machine, MachineError, Resources};
use crate::seed::Seed;
use crate::stopwatch::Stopwatch;
use crate::vcpu_thread::chain;
use crate::zygote::Left;
use crate::{writer, zygote};

/// What the request for a running copy carried.
#[derive(Debug)]
pub struct CopyRequest {
    name: String,
    control: OwnedFd,
    listener: Option<OwnedFd>,
    vsock: OwnedFd,
    console: File,
    overlays: Vec<File>,
    tap: Option<OwnedFd>,
    /// How much its disks may grow by.
    room: Option<ByteSize>,
}

impl CopyRequest {
    /// Takes what a copy that writes to `disks` disks needs.
    pub fn take(carried: &mut Carried, name: String, disks: usize) -> Result<Self, CarriedError> {
        Ok(Self {
            name,
            control: carried.require(Role::Control)?,
            listener: carried.take(Role::ControlListener),
            vsock: carried.require(Role::VsockListener)?,
            console: carried.require(Role::Console)?.into(),
            overlays: carried.files(Role::DiskOverlay, disks)?,
            tap: carried.take(Role::Tap),
            room: None,
        })
    }

    /// The same for a copy whose disks may grow by so many bytes in all.
    pub fn limited_to(self, disk_bytes: Option<u64>) -> Self {
        Self { room: disk_bytes.map(ByteSize), ..self }
    }

    fn raw_fds(&self) -> impl Iterator<Item = i32> {
        [&self.control, &self.vsock]
            .into_iter()
            .chain(&self.listener)
            .chain(&self.tap)
            .map(AsRawFd::as_raw_fd)
            .chain([self.console.as_raw_fd()])
            .chain(self.overlays.iter().map(AsRawFd::as_raw_fd))
    }
}

/// What the request for a frozen copy carried.
#[derive(Debug)]
pub struct FreezeRequest {
    name: String,
    control: OwnedFd,
    listener: Option<OwnedFd>,
}

impl FreezeRequest {
    /// Takes what a frozen copy needs.
    pub fn take(carried: &mut Carried, name: String) -> Result<Self, CarriedError> {
        let control = carried.require(Role::Control)?;
        Ok(Self { name, control, listener: carried.take(Role::ControlListener) })
    }
}

/// What the request for a snapshot carried.
#[derive(Debug)]
pub struct SnapshotRequest {
    control: OwnedFd,
    directory: OwnedFd,
    contents: Contents,
}

impl SnapshotRequest {
    /// Takes what a snapshot's writer needs.
    pub fn take(carried: &mut Carried, contents: Contents) -> Result<Self, CarriedError> {
        Ok(Self { control: carried.require(Role::Control)?, directory: carried.require(Role::SnapshotDir)?, contents })
    }
}

/// What a forked child becomes.
#[derive(Debug)]
pub enum Child {
    /// A running copy.
    Copy(CopyRequest),
    /// A copy that holds still.
    Frozen(FreezeRequest),
    /// The writer of a snapshot.
    Writer(SnapshotRequest),
}

impl Child {
    /// In a fresh child: becomes it. `started` is when the request arrived.
    pub fn live(self, seed: &Seed, started: Instant) -> ! {
        match self {
            Self::Copy(request) => run(seed, request, started),
            Self::Frozen(request) => freeze(seed, request),
            Self::Writer(request) => write_snapshot(seed, request, started),
        }
    }
}

/// In a fresh child: runs a copy of `seed` until it ends. `started` is when the request arrived.
fn run(seed: &Seed, request: CopyRequest, started: Instant) -> ! {
    let mut stopwatch = Stopwatch::since(started);
    stopwatch.lap("fork");
    let keep: Vec<i32> = seed.raw_fds().into_iter().chain(request.raw_fds()).collect();
    fork::close_all_but(&keep);
    let _ = rustix::thread::set_name(&thread_name(&request.name));
    let control = request.control;
    stopwatch.lap("detach");
    let restore = || -> Result<Machine, MachineError> {
        let mut disks = disks::over(seed.disks.iter().cloned(), request.overlays);
        if let Some(room) = request.room.map(Budget::of).map(Arc::new) {
            disks.iter_mut().for_each(|disk| disk.limit_to(Arc::clone(&room)));
        }
        let resources = Resources { disks, vsock: request.vsock, console: request.console, tap: request.tap };
        let mut machine = Machine::restore(seed.kvm.clone(), &seed.state, seed.ram.clone(), resources, &mut stopwatch)?;
        machine.announce_restore();
        machine.renew_generation()?;
        machine.start()?;
        stopwatch.lap("start");
        Ok(machine)
    };
    let machine = match restore() {
        Ok(machine) => machine,
        Err(error) => {
            let _ = monitor::send(&control, &Event::Failed { error: chain(&error) }, &[]);
            fork::exit(1);
        }
    };
    let _ = monitor::send(&control, &Event::Running { stages: stopwatch.finish() }, &[]);
    let ending = EventLoop::new(machine, control, request.listener).run();
    fork::exit(i32::from(ending != Ending::Stopped));
}

/// In a fresh child: holds `seed` for later copies until its control connection ends and, if there is a
/// listener, no other node can come.
fn freeze(seed: &Seed, request: FreezeRequest) -> ! {
    let FreezeRequest { name, mut control, listener } = request;
    let own = [&control].into_iter().chain(&listener).map(AsRawFd::as_raw_fd);
    let keep: Vec<i32> = seed.raw_fds().into_iter().chain(own).collect();
    fork::close_all_but(&keep);
    let _ = rustix::thread::set_name(&thread_name(&name));
    let config = &seed.state.config;
    let (vcpus, memory_bytes, network) = (config.vcpus, config.memory_bytes, config.mac.is_some());
    let ready = Event::Ready { vcpus, memory_bytes, warnings: Vec::new(), network };
    if monitor::send(&control, &ready, &[]).is_err() && listener.is_none() {
        fork::exit(0);
    }
    while zygote::serve(seed, &control) == Left::Gone {
        let accepted = listener.as_ref().map(|listener| rustix::net::accept_with(listener, SocketFlags::CLOEXEC));
        match accepted {
            Some(Ok(connection)) => control = connection,
            Some(Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED)) => {}
            _ => break,
        }
    }
    fork::exit(0);
}

/// In a fresh child: writes a snapshot of `seed`, says so on its control connection, and ends.
fn write_snapshot(seed: &Seed, request: SnapshotRequest, started: Instant) -> ! {
    let SnapshotRequest { control, directory, contents } = request;
    let mut stopwatch = Stopwatch::since(started);
    stopwatch.lap("fork");
    let own = [control.as_raw_fd(), directory.as_raw_fd()];
    let keep: Vec<i32> = seed.raw_fds().into_iter().chain(own).collect();
    fork::close_all_but(&keep);
    let _ = rustix::thread::set_name(c"forkd-writer");
    // The node sends nothing on this connection; it ends with the node, or when the snapshot is given up.
    if matches!(fork::end_with(&control), Ok(false)) {
        fork::exit(1);
    }
    let event = match writer::write(seed, &directory, contents, &mut stopwatch) {
        Ok(facts) => Event::Written { facts, stages: stopwatch.finish() },
        Err(error) => Event::Failed { error: chain(&error) },
    };
    let failed = monitor::send(&control, &event, &[]).is_err() || matches!(event, Event::Failed { .. });
    fork::exit(i32::from(failed));
}

/// The first 15 bytes of a name, which is what the kernel keeps.
fn thread_name(name: &str) -> std::ffi::CString {
    let kept: Vec<u8> = name.bytes().filter(|byte| *byte != 0).take(15).collect();
    std::ffi::CString::new(kept).expect("no zero byte is left")
}
