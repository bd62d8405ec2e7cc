//! A machine that runs in a process of its own and is branched, and beside it the floor for that.
//!
//! The floor is a process that was forked from the source's before the machine was made: it has the same
//! memory, page for page, in a process of the same size, without virtual machine, devices and threads. On
//! request it forks and says how long that took.

use std::fs::File;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use forkd_kvm::Kvm;
use forkd_memory::{Backing, GuestRam, Layer, LayerWriter, MemoryLayout};
use forkd_proto::monitor::{self, Command, Event, Role, StopReason};
use forkd_types::StageTimings;
use rustix::fs::{Advice, Mode, OFlags};

use super::guest::{self, Failure, Private};
use super::waiting_guest;
use crate::event_loop::{Ending, EventLoop};
use crate::fork::{self, Side};

/// How long the source or a copy may take to say something before it is given up.
const DEADLINE: Duration = Duration::from_secs(60);

/// Guest memory that is not private, besides.
const SPARE_MIB: u64 = 64;

/// What backs the private memory of a source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pages {
    /// 4 KiB pages over a snapshot's file, as a sandbox has them.
    Small,
    /// Anonymous memory for which transparent huge pages were asked.
    TransparentHuge,
}

/// A machine that runs; it ends when this is dropped, and its floor with it.
#[derive(Debug)]
pub struct Source {
    control: UnixStream,
    floor: UnixStream,
    pid: i32,
    memory_mib: u64,
    scratch: PathBuf,
    /// What the source's guest printed; held so that the other end stays connected.
    _console: PipeReader,
}

/// A branch that was made; the copy runs until it is killed.
#[derive(Debug)]
pub struct Branched {
    /// How long the source stood still, as its monitor timed it.
    pub pause: Duration,
    /// Where that time went.
    pub pause_stages: StageTimings,
    /// From the request until the copy's guest had run.
    pub running: Duration,
    /// Where that time went, until the copy's vCPU was started.
    pub running_stages: StageTimings,
    control: UnixStream,
}

impl Source {
    /// Starts the guest with `private_mib` MiB of private memory in a process of its own. Scratch files
    /// have no name and lie in `scratch`.
    pub fn launch(scratch: &Path, private_mib: u64, pages: Pages) -> Result<Self, Failure> {
        let memory_mib = (private_mib + SPARE_MIB).next_multiple_of(2).max(128);
        let layout = MemoryLayout::new(memory_mib << 20)?;
        let private = Private::new(scratch)?;
        let (control, control_theirs) = UnixStream::pair()?;
        let (floor, floor_theirs) = UnixStream::pair()?;
        let (mut console, console_end) = io::pipe()?;
        let pid = match fork::fork()? {
            Side::Child => {
                fork::close_all_but(&[
                    private.vsock.as_raw_fd(),
                    private.overlay.as_raw_fd(),
                    control_theirs.as_raw_fd(),
                    floor_theirs.as_raw_fd(),
                    console_end.as_raw_fd(),
                ]);
                let console = File::from(OwnedFd::from(console_end));
                let memory = memory(scratch, layout, private_mib << 20, pages);
                fork::exit(hold(memory, private, console, control_theirs.into(), floor_theirs));
            }
            Side::Parent(pid) => pid,
        };
        drop((control_theirs, floor_theirs, console_end));
        match monitor::receive(&control)?.0 {
            Event::Running { .. } => {}
            other => return Err(format!("the source did not come up: {other:?}").into()),
        }
        control.set_read_timeout(Some(DEADLINE))?;
        floor.set_read_timeout(Some(DEADLINE))?;
        // It prints when it is about to sleep.
        console.read_exact(&mut [0])?;
        Ok(Self { control, floor, pid, memory_mib, scratch: scratch.to_owned(), _console: console })
    }

    /// Process id of the source's monitor.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Size of the source's guest memory.
    pub fn memory_mib(&self) -> u64 {
        self.memory_mib
    }

    /// Branches the source and waits until the copy's guest has run.
    pub fn branch(&self) -> Result<Branched, Failure> {
        let (control, theirs) = UnixStream::pair()?;
        control.set_read_timeout(Some(DEADLINE))?;
        let Private { vsock, overlay } = Private::new(&self.scratch)?;
        let own_overlay = Private::new(&self.scratch)?.overlay;
        let (mut console, console_end) = io::pipe()?;
        let roles = [Role::Control, Role::VsockListener, Role::Console, Role::DiskOverlay, Role::DiskOverlay];
        let command = Command::Fork { fds: roles.to_vec(), name: "raw-branch".to_owned() };
        let fds = [theirs.as_fd(), vsock.as_fd(), console_end.as_fd(), overlay.as_fd(), own_overlay.as_fd()];
        let start = Instant::now();
        monitor::send(&self.control, &command, &fds)?;
        // Without ours, the pipe ends when there is no copy that could write to it.
        drop((theirs, vsock, console_end, overlay, own_overlay));
        let ran = console.read_exact(&mut [0]);
        let running = start.elapsed();
        let (pause_us, pause_stages) = match monitor::receive(&self.control)?.0 {
            Event::Forked { pause_us, stages, .. } => (pause_us, stages),
            other => return Err(format!("the source did not branch: {other:?}").into()),
        };
        let running_stages = match monitor::receive(&control)?.0 {
            Event::Running { stages } => stages,
            other => return Err(format!("a copy did not come up: {other:?}").into()),
        };
        ran.map_err(|error| format!("a copy came up but its guest did not run: {error}"))?;
        Ok(Branched { pause: Duration::from_micros(pause_us), pause_stages, running, running_stages, control })
    }

    /// Has the floor fork once and returns how long that took.
    pub fn bare_fork(&self) -> Result<Duration, Failure> {
        (&self.floor).write_all(&[0])?;
        let mut nanoseconds = [0; 8];
        (&self.floor)
            .read_exact(&mut nanoseconds)
            .map_err(|error| format!("the process that only forks did not answer: {error}"))?;
        Ok(Duration::from_nanos(u64::from_le_bytes(nanoseconds)))
    }
}

impl Branched {
    /// Ends the copy and waits until its memory and its descriptors are gone.
    pub fn kill(mut self) -> Result<(), Failure> {
        // A copy that has ended by itself does not hear it, and has said why.
        let _ = monitor::send(&self.control, &Command::Kill, &[]);
        match monitor::receive(&self.control)?.0 {
            Event::Stopped { reason: StopReason::Killed } => {}
            other => return Err(format!("a copy did not run until it was killed: {other:?}").into()),
        }
        self.control.read_to_end(&mut Vec::new())?;
        Ok(())
    }
}

/// Guest memory of which `private_bytes` are private and the rest is a snapshot's.
fn memory(scratch: &Path, layout: MemoryLayout, private_bytes: u64, pages: Pages) -> Result<GuestRam, Failure> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file: File = rustix::fs::open(scratch, flags, Mode::from_raw_mode(0o600))?.into();
    LayerWriter::new(file.try_clone()?, layout.pages())?.finish()?;
    let backing = match pages {
        Pages::Small => Backing::File,
        Pages::TransparentHuge => Backing::TransparentHugePages,
    };
    let ram = GuestRam::from_layers(layout, [Layer::open(file.try_clone()?)?], backing)?;
    waiting_guest::fill(&ram, private_bytes)?;
    // Each private page was a page of the file first, which nobody needs any more.
    let _ = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
    Ok(ram)
}

/// The source's process: splits off the floor, then runs the machine until the control connection ends.
fn hold(
    memory: Result<GuestRam, Failure>,
    private: Private,
    console: File,
    control: OwnedFd,
    floor: UnixStream,
) -> i32 {
    let machine = memory.and_then(|ram| {
        if fork::fork()? == Side::Child {
            fork::close_all_but(&[floor.as_raw_fd()]);
            fork::exit(i32::from(serve_floor(&floor).is_err()));
        }
        drop(floor);
        fork::reap_children_automatically();
        let mut machine = guest::machine(Arc::new(Kvm::open()?), ram, private, console)?;
        let vcpu = machine.first_vcpu().expect("it was not started yet");
        waiting_guest::point_at(machine.ram.memory(), vcpu)?;
        machine.start()?;
        Ok(machine)
    });
    match machine {
        Ok(machine) => {
            let _ = monitor::send(&control, &Event::Running { stages: StageTimings::default() }, &[]);
            i32::from(EventLoop::new(machine, control, None).run() != Ending::Abandoned)
        }
        Err(error) => {
            let _ = monitor::send(&control, &Event::Failed { error: error.to_string() }, &[]);
            1
        }
    }
}

/// The floor's process: a fork for every byte that arrives, the child gone before the answer.
fn serve_floor(requests: &UnixStream) -> io::Result<()> {
    let mut connection = requests;
    while connection.read(&mut [0])? == 1 {
        let start = Instant::now();
        let Side::Parent(pid) = fork::fork()? else { fork::exit(0) };
        let took = start.elapsed();
        rustix::process::waitpid(rustix::process::Pid::from_raw(pid), rustix::process::WaitOptions::empty())?;
        connection.write_all(&(took.as_nanos() as u64).to_le_bytes())?;
    }
    Ok(())
}
