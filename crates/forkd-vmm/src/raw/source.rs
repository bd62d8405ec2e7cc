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

use forkd_kvm::{Kvm, Vcpu};
use forkd_memory::{Backing, GuestRam, Layer, LayerWriter, MemoryLayout};
use forkd_proto::monitor::{self, Command, Contents, Event, Role, StopReason};
use forkd_types::{PAGE_SIZE, StageTimings};
use rustix::fs::{Advice, Mode, OFlags};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _};

use super::guest::{self, Failure, Private};
use super::subcommand::Setting;
use super::ticking_guest::{self, Watch};
use super::waiting_guest;
use crate::address_map::HIGH_MEMORY;
use crate::event_loop::{Ending, EventLoop};
use crate::fork::{self, Side};
use crate::machine::Machine;

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

/// What the guest of a source does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Guest {
    /// It waits for an interrupt, as an idle Linux does. Its copies print when they have run.
    Waiting,
    /// It watches its clock, and can be followed with a [`Watch`].
    Ticking,
    /// It watches its clock and writes to its private memory, over and over.
    Dirtying,
}

/// A machine that runs; it ends when this is dropped, and its floor with it.
#[derive(Debug)]
pub struct Source {
    control: UnixStream,
    floor: UnixStream,
    pid: i32,
    memory_mib: u64,
    /// Where guest memory begins in the source's process.
    guest_memory: u64,
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

/// A snapshot that a copy of the source is writing.
#[derive(Debug)]
pub struct Writing {
    /// How long the source stood still, as its monitor timed it.
    pub pause: Duration,
    /// Where that time went.
    pub pause_stages: StageTimings,
    start: Instant,
    control: UnixStream,
}

impl Pages {
    /// As it is called on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Small => "4k",
            Self::TransparentHuge => "thp",
        }
    }
}

impl Setting for Pages {
    fn set(&mut self, value: &str) -> Result<(), String> {
        let all = [Self::Small, Self::TransparentHuge];
        *self = all.into_iter().find(|pages| pages.name() == value).ok_or("there are 4k and thp")?;
        Ok(())
    }
}

impl Guest {
    /// As it is called on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Ticking => "idle",
            Self::Dirtying => "dirtying",
        }
    }
}

impl Source {
    /// Starts the guest with `private_mib` MiB of private memory in a process of its own. Scratch files
    /// have no name and lie in `scratch`.
    pub fn launch(scratch: &Path, private_mib: u64, pages: Pages, guest: Guest) -> Result<Self, Failure> {
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
                let load = |machine: &Machine, vcpu: &Vcpu| load(guest, machine, vcpu, private_mib << 20);
                fork::exit(hold(memory, load, private, console, control_theirs.into(), floor_theirs));
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
        let mut guest_memory = [0; 8];
        (&floor).read_exact(&mut guest_memory)?;
        let guest_memory = u64::from_le_bytes(guest_memory);
        // It prints when it is about to sleep or to tick.
        console.read_exact(&mut [0])?;
        Ok(Self { control, floor, pid, memory_mib, guest_memory, scratch: scratch.to_owned(), _console: console })
    }

    /// Follows a guest that watches its clock.
    pub fn watch(&self) -> Result<Watch, Failure> {
        Watch::begin(self.pid, self.guest_memory)
    }

    /// Process id of the source's monitor.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Size of the source's guest memory.
    pub fn memory_mib(&self) -> u64 {
        self.memory_mib
    }

    /// How much of the source's memory is in huge pages, MiB.
    pub fn huge_mib(&self) -> Result<u64, Failure> {
        Ok(self.kib("smaps_rollup", "AnonHugePages:")? >> 10)
    }

    /// A figure in KiB that the kernel keeps of the source's process, from a file of `/proc/PID`.
    pub(super) fn kib(&self, file: &str, field: &str) -> Result<u64, Failure> {
        let path = format!("/proc/{}/{file}", self.pid);
        let text = std::fs::read_to_string(&path)?;
        let value = text.lines().find_map(|line| line.strip_prefix(field)?.split_whitespace().next());
        value.and_then(|value| value.parse().ok()).ok_or_else(|| format!("{path} has no {field}").into())
    }

    /// Branches the source and waits until the copy's guest has run.
    pub fn branch(&self) -> Result<Branched, Failure> {
        let (control, theirs) = UnixStream::pair()?;
        control.set_read_timeout(Some(DEADLINE))?;
        let Private { vsock, overlay } = Private::new(&self.scratch)?;
        let own_overlay = Private::new(&self.scratch)?.overlay;
        let (mut console, console_end) = io::pipe()?;
        let roles = [Role::Control, Role::VsockListener, Role::Console, Role::DiskOverlay, Role::DiskOverlay];
        let command = Command::Fork { fds: roles.to_vec(), name: "raw-branch".to_owned(), disk_bytes: None };
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

    /// Has a copy of the source write itself into `directory`, which is empty. Returns when the source runs again.
    pub fn snapshot(&self, directory: &Path) -> Result<Writing, Failure> {
        let (control, theirs) = UnixStream::pair()?;
        control.set_read_timeout(Some(DEADLINE))?;
        let overlay = Private::new(&self.scratch)?.overlay;
        let directory = File::open(directory)?;
        let roles = [Role::Control, Role::SnapshotDir, Role::DiskOverlay];
        let command = Command::Snapshot { fds: roles.to_vec(), contents: Contents::Changes };
        let start = Instant::now();
        monitor::send(&self.control, &command, &[theirs.as_fd(), directory.as_fd(), overlay.as_fd()])?;
        drop(theirs);
        match monitor::receive(&self.control)?.0 {
            Event::Forked { pause_us, stages, .. } => {
                let pause = Duration::from_micros(pause_us);
                Ok(Writing { pause, pause_stages: stages, start, control })
            }
            other => Err(format!("the source did not branch: {other:?}").into()),
        }
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

impl Writing {
    /// Waits until the snapshot is written and its writer gone; the time from the request until it was written.
    pub fn finish(mut self) -> Result<Duration, Failure> {
        let event = monitor::receive(&self.control)?.0;
        let took = self.start.elapsed();
        self.control.read_to_end(&mut Vec::new())?;
        match event {
            Event::Written { .. } => Ok(took),
            other => Err(format!("the snapshot was not written: {other:?}").into()),
        }
    }
}

/// Writes the guest into the machine's memory and points its vCPU at it.
fn load(guest: Guest, machine: &Machine, vcpu: &Vcpu, private_bytes: u64) -> Result<(), Failure> {
    let (memory, layout) = (machine.ram.memory(), machine.ram.layout());
    match guest {
        Guest::Waiting => waiting_guest::load(memory, vcpu),
        Guest::Ticking => ticking_guest::load(memory, layout, vcpu, None),
        Guest::Dirtying => ticking_guest::load(memory, layout, vcpu, Some(private_bytes)),
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
    for region in layout.regions() {
        let end = private_bytes.min(region.offset + region.bytes);
        for offset in (region.offset.max(HIGH_MEMORY)..end).step_by(PAGE_SIZE as usize) {
            // Otherwise on each page, and nowhere zero.
            ram.memory().write_obj(offset / PAGE_SIZE, GuestAddress(region.guest_address + offset - region.offset))?;
        }
    }
    // Each private page was a page of the file first, which nobody needs any more.
    let _ = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
    Ok(ram)
}

/// The source's process: splits off the floor, then runs the machine until the control connection ends.
fn hold(
    memory: Result<GuestRam, Failure>,
    load: impl FnOnce(&Machine, &Vcpu) -> Result<(), Failure>,
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
        let guest_memory = ram.memory().get_host_address(GuestAddress(0))?.addr() as u64;
        (&floor).write_all(&guest_memory.to_le_bytes())?;
        drop(floor);
        fork::reap_children_automatically();
        let mut machine = guest::machine(Arc::new(Kvm::open()?), ram, private, console)?;
        let vcpu = machine.first_vcpu().expect("it was not started yet");
        load(&machine, vcpu)?;
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
