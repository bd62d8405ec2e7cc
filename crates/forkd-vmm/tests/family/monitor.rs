//! Monitors as a node has them: processes of the real program, driven over their control connections.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Program, Stdio};
use std::time::{Duration, Instant};

use forkd_proto::monitor::{
    self, BootConfig, Command, Contents, Event, Launch, LaunchAction, Role, SnapshotFacts, StopReason, ZygoteConfig,
};

use crate::guest::{self, Model};

/// Any failure, in words.
pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// How long a monitor or a guest may take to answer.
const DEADLINE: Duration = Duration::from_secs(60);

/// A place for sockets and scratch files.
pub(crate) struct Room {
    directory: PathBuf,
    names: std::cell::Cell<u32>,
}

/// The control connection of a monitor that holds still: a zygote, or a frozen copy.
pub(crate) struct Still {
    control: UnixStream,
    /// A zygote is a program of its own.
    program: Option<Child>,
}

/// A guest that runs.
pub(crate) struct Running {
    control: UnixStream,
    vsock: PathBuf,
    console: UnixStream,
    /// Connections that carry messages which the guest may not have seen yet.
    told: Vec<UnixStream>,
    /// What the guest holds when it has done all that it was told.
    pub(crate) model: Model,
    program: Option<Child>,
}

/// What one running machine needs that no other may have; ours and the machine's ends.
struct Private {
    control: (UnixStream, UnixStream),
    console: (UnixStream, UnixStream),
    vsock: (PathBuf, UnixListener),
    overlays: Vec<File>,
}

impl Room {
    pub(crate) fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), names: std::cell::Cell::new(0) }
    }

    /// A scratch file for each disk that a guest writes to.
    fn overlays(&self) -> Result<Vec<File>, Failure> {
        guest::WRITTEN.iter().map(|_| Ok(tempfile::tempfile_in(&self.directory)?)).collect()
    }

    fn private(&self) -> Result<Private, Failure> {
        self.names.set(self.names.get() + 1);
        let path = self.directory.join(format!("vsock-{}", self.names.get()));
        let listener = UnixListener::bind(&path)?;
        Ok(Private { control: control()?, console: control()?, vsock: (path, listener), overlays: self.overlays()? })
    }
}

/// A connected pair of which the first has a deadline.
fn control() -> Result<(UnixStream, UnixStream), Failure> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(DEADLINE))?;
    Ok((ours, theirs))
}

/// Starts the program with `theirs` as its control connection.
fn start(theirs: UnixStream) -> Result<Child, Failure> {
    let mut program = Program::new(env!("CARGO_BIN_EXE_forkd-vmm"));
    Ok(program.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null()).spawn()?)
}

fn kvm() -> Result<File, Failure> {
    Ok(File::options().read(true).write(true).open("/dev/kvm")?)
}

fn send(control: &UnixStream, message: &impl serde::Serialize, fds: &[BorrowedFd<'_>]) -> Result<(), Failure> {
    Ok(monitor::send(control, message, fds)?)
}

/// The next event; a failure that a monitor reports is one.
fn event(control: &UnixStream) -> Result<Event, Failure> {
    match monitor::receive(control)?.0 {
        Event::Failed { error } => Err(error.into()),
        event => Ok(event),
    }
}

/// What the base of disk `number` is to a monitor.
fn base_role(number: usize) -> Role {
    if guest::WRITTEN.contains(&number) { Role::DiskBase } else { Role::DiskShared }
}

/// Boots the guest over the disk images `bases`.
pub(crate) fn boot(room: &Room, kernel: &File, bases: &[File]) -> Result<Running, Failure> {
    let private = room.private()?;
    let Private { control, console, vsock, overlays } = private;
    let program = start(control.1)?;
    let config = BootConfig {
        vcpus: 1,
        memory_bytes: guest::MEMORY,
        kernel_args: String::new(),
        mac: None,
        disks: vec![guest::DISK_BYTES as u64; guest::DISKS],
        guest_cid: 3,
    };
    let kvm = kvm()?;
    let mut carried = vec![
        (Role::Kvm, kvm.as_fd()),
        (Role::Kernel, kernel.as_fd()),
        (Role::VsockListener, vsock.1.as_fd()),
        (Role::Console, console.1.as_fd()),
    ];
    carried.extend(bases.iter().enumerate().map(|(number, base)| (base_role(number), base.as_fd())));
    let (roles, fds) = request(&overlays, &carried);
    let launch = Launch { fds: roles, name: "family".into(), action: LaunchAction::Boot(config) };
    send(&control.0, &launch, &fds)?;
    drop(fds);
    drop(console.1);
    let mut running = Running {
        control: control.0,
        vsock: vsock.0,
        console: console.0,
        told: Vec::new(),
        model: Model::default(),
        program: Some(program),
    };
    match event(&running.control)? {
        Event::Running { .. } => {}
        other => return Err(format!("the guest did not boot: {other:?}").into()),
    }
    // A newline, when it is about to sleep for the first time.
    running.console.read_exact(&mut [0])?;
    Ok(running)
}

/// Holds a snapshot ready whose files are those: of each disk the base and the layers over it.
pub(crate) fn zygote(vmstate: &Path, memory: &[PathBuf], disks: &[(PathBuf, Vec<PathBuf>)]) -> Result<Still, Failure> {
    let mut carried: Vec<(Role, File)> = vec![(Role::Kvm, kvm()?), (Role::VmState, File::open(vmstate)?)];
    for path in memory {
        carried.push((Role::MemoryLayer, File::open(path)?));
    }
    for (number, (base, layers)) in disks.iter().enumerate() {
        carried.push((base_role(number), File::open(base)?));
        for path in layers {
            carried.push((Role::DiskLayer, File::open(path)?));
        }
    }
    let (control, theirs) = control()?;
    let program = start(theirs)?;
    let config = ZygoteConfig { backing: monitor::Backing::File, prefetch: Vec::new() };
    let fds = carried.iter().map(|(role, _)| *role).collect();
    let launch = Launch { fds, name: "family-zygote".into(), action: LaunchAction::Zygote(config) };
    send(&control, &launch, &carried.iter().map(|(_, file)| file.as_fd()).collect::<Vec<_>>())?;
    match event(&control)? {
        Event::Ready { warnings, .. } if warnings.is_empty() => Ok(Still { control, program: Some(program) }),
        other => Err(format!("the zygote did not come up: {other:?}").into()),
    }
}

/// What can be copied: a zygote, a frozen copy, a guest that runs.
pub(crate) trait Source {
    fn control(&self) -> &UnixStream;

    /// Overlays that the source needs for itself when it is copied.
    fn own_overlays(&self, room: &Room) -> Result<Vec<File>, Failure>;

    /// A running copy. What it holds is for the caller to say.
    fn copy(&self, room: &Room) -> Result<Running, Failure> {
        let Private { control, console, vsock, mut overlays } = room.private()?;
        overlays.extend(self.own_overlays(room)?);
        let carried = [
            (Role::Control, control.1.as_fd()),
            (Role::VsockListener, vsock.1.as_fd()),
            (Role::Console, console.1.as_fd()),
        ];
        let (roles, fds) = request(&overlays, &carried);
        send(self.control(), &Command::Fork { fds: roles, name: "copy".into(), disk_bytes: None }, &fds)?;
        drop(fds);
        drop((control.1, console.1));
        expect_forked(event(self.control())?)?;
        match event(&control.0)? {
            Event::Running { .. } => Ok(Running {
                control: control.0,
                vsock: vsock.0,
                console: console.0,
                told: Vec::new(),
                model: Model::default(),
                program: None,
            }),
            other => Err(format!("a copy did not come up: {other:?}").into()),
        }
    }

    /// A copy that holds still.
    fn freeze(&self, room: &Room) -> Result<Still, Failure> {
        let (ours, theirs) = control()?;
        let own = self.own_overlays(room)?;
        let (roles, fds) = request(&own, &[(Role::Control, theirs.as_fd())]);
        send(self.control(), &Command::Freeze { fds: roles, name: "frozen".into() }, &fds)?;
        drop(theirs);
        expect_forked(event(self.control())?)?;
        match event(&ours)? {
            Event::Ready { .. } => Ok(Still { control: ours, program: None }),
            other => Err(format!("a frozen copy did not come up: {other:?}").into()),
        }
    }

    /// A copy that writes a snapshot into `directory`; `meanwhile` runs while it does.
    fn write(
        &self,
        room: &Room,
        directory: BorrowedFd<'_>,
        contents: Contents,
        meanwhile: impl FnOnce() -> Result<(), Failure>,
    ) -> Result<SnapshotFacts, Failure> {
        let (ours, theirs) = control()?;
        let own = self.own_overlays(room)?;
        let (roles, fds) = request(&own, &[(Role::Control, theirs.as_fd()), (Role::SnapshotDir, directory)]);
        send(self.control(), &Command::Snapshot { fds: roles, contents }, &fds)?;
        drop(theirs);
        expect_forked(event(self.control())?)?;
        meanwhile()?;
        match event(&ours)? {
            Event::Written { facts, .. } => Ok(facts),
            other => Err(format!("no snapshot was written: {other:?}").into()),
        }
    }
}

/// What a message carries: `carried`, and overlays.
fn request<'a>(own: &'a [File], carried: &[(Role, BorrowedFd<'a>)]) -> (Vec<Role>, Vec<BorrowedFd<'a>>) {
    let own = own.iter().map(|file| (Role::DiskOverlay, file.as_fd()));
    carried.iter().copied().chain(own).unzip()
}

fn expect_forked(event: Event) -> Result<(), Failure> {
    match event {
        Event::Forked { .. } => Ok(()),
        other => Err(format!("nothing was forked: {other:?}").into()),
    }
}

impl Source for Still {
    fn control(&self) -> &UnixStream {
        &self.control
    }

    fn own_overlays(&self, _: &Room) -> Result<Vec<File>, Failure> {
        Ok(Vec::new())
    }
}

/// A running guest, to be copied only.
pub(crate) struct Handle(UnixStream);

impl Source for Handle {
    fn control(&self) -> &UnixStream {
        &self.0
    }

    fn own_overlays(&self, room: &Room) -> Result<Vec<File>, Failure> {
        room.overlays()
    }
}

impl Source for Running {
    fn control(&self) -> &UnixStream {
        &self.control
    }

    fn own_overlays(&self, room: &Room) -> Result<Vec<File>, Failure> {
        room.overlays()
    }
}

impl Still {
    /// Ends it and waits until it is gone.
    pub(crate) fn end(mut self) -> Result<(), Failure> {
        send(&self.control, &Command::Kill, &[])?;
        self.control.read_to_end(&mut Vec::new())?;
        wait(self.program)
    }
}

impl Running {
    /// The same guest as something to copy, while it is also told things.
    pub(crate) fn handle(&self) -> Result<Handle, Failure> {
        Ok(Handle(self.control.try_clone()?))
    }

    /// Tells the guest to do a step, and does not wait.
    pub(crate) fn step(&mut self, seed: u32) -> Result<(), Failure> {
        self.tell(seed)?;
        self.model.step(seed);
        Ok(())
    }

    fn tell(&mut self, message: u32) -> Result<(), Failure> {
        let mut connection = UnixStream::connect(&self.vsock)?;
        writeln!(connection, "CONNECT {message}")?;
        self.told.push(connection);
        Ok(())
    }

    /// How many steps the guest has done, as it says itself.
    fn ask(&mut self) -> Result<usize, Failure> {
        self.tell(guest::ASK)?;
        let mut line = [0; 9];
        self.console.read_exact(&mut line).map_err(|error| format!("the guest does not answer: {error}"))?;
        let letters = line.strip_suffix(b"\n").filter(|letters| letters.iter().all(|byte| (b'a'..b'q').contains(byte)));
        let letters = letters.ok_or_else(|| format!("the guest says {:?}", String::from_utf8_lossy(&line)))?;
        Ok(letters.iter().fold(0, |number, letter| number << 4 | usize::from(letter - b'a')))
    }

    /// Waits until the guest has done all that it was told.
    pub(crate) fn settle(&mut self) -> Result<(), Failure> {
        let started = Instant::now();
        loop {
            let done = self.ask()?;
            if done == self.model.steps() {
                self.told.clear();
                return Ok(());
            }
            if done > self.model.steps() || started.elapsed() > DEADLINE {
                return Err(format!("the guest did {done} steps, it was told {}", self.model.steps()).into());
            }
        }
    }

    /// Finds out which of its source's steps, as `model` has them, this fresh copy has done or is about to
    /// do: those whose order had reached the source's guest.
    pub(crate) fn inherit(&mut self, model: &Model) -> Result<(), Failure> {
        let done = self.ask()?;
        if done > model.steps() || done + 1 < model.steps() {
            return Err(format!("a copy did {done} steps, its source was told {}", model.steps()).into());
        }
        self.model = model.truncated(done);
        self.told.clear();
        Ok(())
    }

    /// Ends the machine and waits until it is gone.
    pub(crate) fn end(mut self) -> Result<(), Failure> {
        send(&self.control, &Command::Kill, &[])?;
        match event(&self.control)? {
            Event::Stopped { reason: StopReason::Killed } => {}
            other => return Err(format!("a machine did not run until it was killed: {other:?}").into()),
        }
        self.control.read_to_end(&mut Vec::new())?;
        std::fs::remove_file(&self.vsock)?;
        wait(self.program)
    }
}

fn wait(program: Option<Child>) -> Result<(), Failure> {
    if let Some(mut program) = program {
        let status = program.wait()?;
        if !status.success() {
            return Err(format!("a monitor ended with {status}").into());
        }
    }
    Ok(())
}
