//! The main thread of a machine: serves its devices and the node's commands.
//!
//! Devices do their work here, one after another, so that a machine of one vCPU needs two threads
//! and a quiet point between two turns of this loop is a quiet point of every device.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Instant;

use forkd_proto::frame::FrameError;
use forkd_proto::monitor::{self, Command, Event, Role, StopReason};
use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use rustix::net::SocketFlags;

use crate::carried::{Carried, CarriedError};
use crate::copy::{Child, CopyRequest, FreezeRequest, SnapshotRequest};
use crate::fork::{self, Side, Turn};
use crate::gate::PauseError;
use crate::machine::Machine;
use crate::seed::Seed;
use crate::stopwatch::Stopwatch;
use crate::vcpu_thread::chain;

/// Tokens of the poll set.
const WAKE: u64 = 0;
const LISTENER: u64 = 1;
const DEVICES: u64 = 16;
const CONTROLS: u64 = 64;

const _: () = assert!(DEVICES + crate::address_map::DEVICE_SLOTS as u64 <= CONTROLS);

/// How the loop ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ending {
    /// The machine stopped and the node was told why.
    Stopped,
    /// The node is gone, and this machine has no listener on which another could find it.
    Abandoned,
    /// Polling itself failed.
    Failed,
}

/// The loop and what it serves.
pub struct EventLoop {
    machine: Machine,
    /// Connections of the node; the first is the one the machine came with.
    controls: Vec<Option<OwnedFd>>,
    listener: Option<OwnedFd>,
}

/// A device's host-side descriptor.
#[allow(unsafe_code)]
fn host_fd<'a>(fd: RawFd) -> BorrowedFd<'a> {
    // SAFETY: devices keep this descriptor open for their whole life, and the machine's devices live
    // as long as the process.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// Why a command failed; the machine is as it was.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    #[error("the request is malformed")]
    Carried(#[from] CarriedError),
    #[error("cannot stop the vCPUs")]
    Pause(#[from] PauseError),
    #[error("cannot seal disk {index}")]
    Seal { index: usize, source: forkd_devices::block::DiskError },
    #[error("cannot make a pipe for the copy to wait at")]
    Turn(#[source] io::Error),
    #[error("cannot fork the monitor")]
    Fork(#[source] io::Error),
    #[error("cannot read the page tables")]
    Pages(#[from] forkd_memory::RamError),
}

impl EventLoop {
    /// A loop for a started machine, whose node is at the other end of `control` and, if it
    /// restarts, finds the machine again at `listener`.
    pub fn new(machine: Machine, control: OwnedFd, listener: Option<OwnedFd>) -> Self {
        Self { machine, controls: vec![Some(control)], listener }
    }

    /// Serves until the machine stops.
    pub fn run(mut self) -> Ending {
        match self.serve() {
            Ok(ending) => ending,
            Err(error) => {
                let reason = StopReason::Crashed { detail: format!("the monitor's event loop failed: {error}") };
                self.tell(&Event::Stopped { reason });
                Ending::Failed
            }
        }
    }

    fn serve(&mut self) -> io::Result<Ending> {
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        self.register(&poll)?;
        let mut events = Vec::with_capacity(32);
        loop {
            match epoll::wait(&poll, spare_capacity(&mut events), None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in events.drain(..) {
                let ending = match event.data.u64() {
                    WAKE => self.wake(),
                    LISTENER => self.accept(&poll)?,
                    token if token >= CONTROLS => self.control((token - CONTROLS) as usize),
                    token => {
                        if let Some(transport) = &self.machine.bus.slots[(token - DEVICES) as usize] {
                            transport.process_host_event();
                        }
                        None
                    }
                };
                if let Some(ending) = ending {
                    return Ok(ending);
                }
            }
        }
    }

    fn register(&self, poll: &OwnedFd) -> io::Result<()> {
        let add =
            |fd: BorrowedFd<'_>, token| epoll::add(poll, fd, epoll::EventData::new_u64(token), epoll::EventFlags::IN);
        add(self.machine.wake.event(), WAKE)?;
        if let Some(listener) = &self.listener {
            rustix::io::ioctl_fionbio(listener, true)?;
            add(listener.as_fd(), LISTENER)?;
        }
        for (index, control) in self.controls.iter().enumerate() {
            if let Some(control) = control {
                add(control.as_fd(), CONTROLS + index as u64)?;
            }
        }
        for (slot, transport) in self.machine.bus.slots.iter().enumerate() {
            if let Some(fd) = transport.as_ref().and_then(|transport| transport.poll_fd()) {
                add(host_fd(fd), DEVICES + slot as u64)?;
            }
        }
        Ok(())
    }

    /// A vCPU thread wants something.
    fn wake(&mut self) -> Option<Ending> {
        self.machine.wake.acknowledge();
        for (slot, queue) in self.machine.wake.take_queues() {
            self.machine.process_queue(slot, queue);
        }
        let reason = self.machine.wake.stopped()?;
        self.machine.flush_console();
        self.tell(&Event::Stopped { reason });
        Some(Ending::Stopped)
    }

    /// A node that restarted connects.
    fn accept(&mut self, poll: &OwnedFd) -> io::Result<Option<Ending>> {
        let Some(listener) = &self.listener else { return Ok(None) };
        if let Ok(connection) = rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
            let index = self.controls.iter().position(Option::is_none).unwrap_or(self.controls.len());
            let token = epoll::EventData::new_u64(CONTROLS + index as u64);
            epoll::add(poll, &connection, token, epoll::EventFlags::IN)?;
            if index == self.controls.len() {
                self.controls.push(None);
            }
            self.controls[index] = Some(connection);
        }
        Ok(None)
    }

    /// A command arrives, or a connection ends.
    fn control(&mut self, index: usize) -> Option<Ending> {
        let connection = self.controls.get(index)?.as_ref()?;
        let (command, fds) = match monitor::receive::<Command>(connection) {
            Ok(message) => message,
            Err(error) => {
                if !matches!(error, FrameError::Closed | FrameError::Io(_)) {
                    let _ = monitor::send(connection, &Event::Failed { error: chain(&error) }, &[]);
                }
                // Closing the descriptor takes it out of the poll set.
                self.controls[index] = None;
                let alone = self.listener.is_none() && self.controls.iter().all(Option::is_none);
                return alone.then_some(Ending::Abandoned);
            }
        };
        let answer = match self.obey(command, fds) {
            Ok(Some(event)) => event,
            Ok(None) => {
                self.machine.flush_console();
                self.tell(&Event::Stopped { reason: StopReason::Killed });
                return Some(Ending::Stopped);
            }
            Err(error) => Event::Failed { error: chain(&error) },
        };
        if let Some(connection) = &self.controls[index] {
            let _ = monitor::send(connection, &answer, &[]);
        }
        None
    }

    /// Carries out a command; nothing is answered when it ends the machine.
    fn obey(&mut self, command: Command, fds: Vec<OwnedFd>) -> Result<Option<Event>, CommandError> {
        let started = Instant::now();
        match command {
            Command::Kill => Ok(None),
            Command::Pages => {
                let map = self.machine.ram.page_map()?;
                Ok(Some(Event::pages(&map.present, &map.private)))
            }
            Command::Fork { fds: roles, name, disk_bytes } => {
                let overlays = self.machine.writable_disks();
                self.branch(started, &roles, fds, |carried| {
                    CopyRequest::take(carried, name, overlays)
                        .map(|request| Child::Copy(request.limited_to(disk_bytes)))
                })
            }
            Command::Freeze { fds: roles, name } => {
                self.branch(started, &roles, fds, |carried| FreezeRequest::take(carried, name).map(Child::Frozen))
            }
            Command::Snapshot { fds: roles, contents } => {
                self.branch(started, &roles, fds, |carried| SnapshotRequest::take(carried, contents).map(Child::Writer))
            }
        }
    }

    /// Stops the machine, forks, and lets it go on; the child is what `take` finds for it among the carried
    /// descriptors.
    fn branch(
        &mut self,
        started: Instant,
        roles: &[Role],
        fds: Vec<OwnedFd>,
        take: impl FnOnce(&mut Carried) -> Result<Child, CarriedError>,
    ) -> Result<Option<Event>, CommandError> {
        let mut carried = Carried::new(roles, fds)?;
        let child = take(&mut carried)?;
        let group = carried.take(Role::Cgroup);
        let mut fresh = carried.files(Role::DiskOverlay, self.machine.writable_disks())?.into_iter();
        let turn = Turn::new().map_err(CommandError::Turn)?;
        let mut stopwatch = Stopwatch::since(started);
        let (paused, state) = self.machine.pause()?;
        stopwatch.lap("quiesce");
        let mut disks = Vec::new();
        for (index, disk) in self.machine.disks.iter().enumerate() {
            let mut disk = disk.lock();
            if !disk.is_read_only() {
                disk.seal(fresh.next().expect("there is one for each disk that can be written"));
            }
            disks.push(disk.image().map_err(|source| CommandError::Seal { index, source })?);
        }
        stopwatch.lap("seal");
        let seed = Seed { kvm: self.machine.kvm.clone(), ram: self.machine.ram.clone(), state, disks };
        let pid = match fork::fork_into(group.as_ref()).map_err(CommandError::Fork)? {
            Side::Child => {
                turn.wait();
                child.live(&seed, started)
            }
            Side::Parent(pid) => pid,
        };
        stopwatch.lap("fork");
        drop(paused);
        turn.pass();
        let stages = stopwatch.finish();
        Ok(Some(Event::Forked { pid, pause_us: stages.total().as_micros() as u64, stages }))
    }

    /// Tells every node that is connected.
    fn tell(&self, event: &Event) {
        for connection in self.controls.iter().flatten() {
            let _ = monitor::send(connection, event, &[]);
        }
    }
}
