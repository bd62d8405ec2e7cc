//! A snapshot of a running machine, killed and failing at every stage: the machine runs on.
//!
//! The machine is a tiny guest that counts, on the real `/dev/kvm`, emulated or not. Its monitor is this program
//! begun again, under the tracer of [`forkd_testkit::faults`]; this process is its node. Where `/dev/kvm` or
//! `strace` is missing, every test is counted as ignored and the reason is printed.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use forkd_devices::block::BlockDisk;
use forkd_kvm::{Kvm, kvm_regs};
use forkd_memory::layer::DATA_OFFSET;
use forkd_memory::{GuestRam, Layer, MemoryLayout};
use forkd_proto::monitor::{self, Contents, Event, Role};
use forkd_store::{StagedSnapshot, Store};
use forkd_testkit::faults::{self, Call, Fault, Harm, Trace};
use forkd_types::{PAGE_SIZE, StageTimings};
use forkd_vmm::event_loop::EventLoop;
use forkd_vmm::fork;
use forkd_vmm::machine::{Machine, Resources};
use forkd_vmm::state::MachineConfig;
use libtest_mimic::{Arguments, Failed, Trial};
use vm_memory::{Bytes, GuestAddress};

const MEMORY: u64 = 128 << 20;
const DISK: u64 = 1 << 20;
const CODE: u64 = 0x1000;
const COUNTER: u64 = 0x3000;
/// Counts as fast as it can.
const PROGRAM: [u8; 7] = [
    0x66, 0xff, 0x06, 0x00, 0x30, // inc dword [0x3000]
    0xeb, 0xf9, //                   jmp back
];

/// Tells this program that it is to be the monitor; its node is at its standard input.
const MONITOR: &str = "FORKD_VMM_BRANCH_FAULTS_MONITOR";

type Failure = Box<dyn std::error::Error + Send + Sync>;
type Test = fn() -> Result<(), Failure>;

fn main() -> ExitCode {
    if std::env::var_os(MONITOR).is_some() {
        return match run_monitor() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                let _ = writeln!(io::stderr(), "{error}");
                ExitCode::FAILURE
            }
        };
    }
    // One after the other: a monitor that one test begins holds for a moment every descriptor of the others.
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    let no_kvm = File::options().read(true).write(true).open("/dev/kvm").err();
    let missing = no_kvm.map(|reason| format!("cannot open /dev/kvm: {reason}")).or_else(faults::cannot_trace);
    if let Some(reason) = &missing {
        let _ = writeln!(io::stderr(), "SKIPPED, every test of this file: {reason}");
    }
    let trials: [(&str, Test); 4] = [
        ("a_writer_killed_at_any_stage_costs_its_source_nothing", || walk(&[Harm::Kill])),
        ("a_writer_that_fails_at_any_stage_says_which_file", || walk(&[Harm::Error("ENOSPC"), Harm::Error("EIO")])),
        ("a_monitor_that_cannot_fork_says_so_and_runs_on", fork_fails),
        ("a_guest_that_does_not_stand_still_in_time_runs_on", deadline_passes),
    ];
    let trial = |(name, run): (&'static str, Test)| {
        let run = move || run().map_err(|error| Failed::from(error.to_string()));
        Trial::test(name, run).with_ignored_flag(missing.is_some())
    };
    libtest_mimic::run(&arguments, trials.map(trial).into()).exit_code()
}

/// The monitor: boots the guest and serves the node until that ends it.
fn run_monitor() -> Result<(), Failure> {
    use std::os::linux::net::SocketAddrExt;
    fork::reap_children_automatically();
    let control = io::stdin().as_fd().try_clone_to_owned()?;
    let ram = GuestRam::anonymous(MemoryLayout::new(MEMORY)?)?;
    ram.memory().write_slice(&PROGRAM, GuestAddress(CODE))?;
    // Never zero, or its page would be stored only once the guest has run.
    ram.memory().write_obj(1u32, GuestAddress(COUNTER))?;
    // Several runs, so that there are stages in the middle of a file.
    for page in [0x500, 0x600, 0x700] {
        ram.memory().write_slice(&[7; 3 * PAGE_SIZE as usize], GuestAddress(page * PAGE_SIZE))?;
    }
    let base = tempfile::tempfile()?;
    base.set_len(DISK)?;
    let mut disk = BlockDisk::new(base, DISK, Vec::new(), tempfile::tempfile()?)?;
    disk.write_at(5000, &[8; 10_000])?;
    let address = SocketAddr::from_abstract_name(format!("forkd-branch-faults-{}", std::process::id()))?;
    let vsock = UnixListener::bind_addr(&address)?.into();
    let resources =
        Resources { disks: vec![disk], vsock, console: File::options().write(true).open("/dev/null")?, tap: None };
    let config = MachineConfig { vcpus: 1, memory_bytes: MEMORY, disks: vec![DISK], mac: None, guest_cid: 3 };
    let mut machine = Machine::build(Arc::new(Kvm::open()?), config, resources, ram)?;
    let vcpu = machine.first_vcpu().expect("it was not started yet");
    let mut sregs = vcpu.sregs()?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..Default::default() })?;
    machine.start()?;
    writeln!(io::stdout(), "{}", std::process::id())?;
    monitor::send(&control, &Event::Running { stages: StageTimings::default() }, &[])?;
    EventLoop::new(machine, control, None).run();
    Ok(())
}

/// A monitor under a tracer, seen from its node; it ends when this is dropped.
struct Source {
    control: UnixStream,
    tracer: Child,
    pid: i32,
}

impl Source {
    fn launch(trace: &Trace, fault: Option<&Fault>) -> Result<Self, Failure> {
        let mut program = Command::new(std::env::current_exe()?);
        program.env(MONITOR, "yes");
        let (control, theirs) = UnixStream::pair()?;
        control.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut command = trace.command(&program, fault);
        command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::piped());
        let mut tracer = command.spawn()?;
        // This process keeps no copy of the monitor's end.
        drop(command);
        let mut line = String::new();
        BufReader::new(tracer.stdout.take().ok_or("its output is piped")?).read_line(&mut line)?;
        let pid = line.trim().parse().map_err(|_| format!("the monitor did not come up: {line:?}"))?;
        // The second answer says that it serves.
        monitor::send(&control, &monitor::Command::Pages, &[])?;
        match (monitor::receive(&control)?.0, monitor::receive(&control)?.0) {
            (Event::Running { .. }, Event::Pages { .. }) => Ok(Self { control, tracer, pid }),
            other => Err(format!("the monitor did not come up: {other:?}").into()),
        }
    }

    /// Asks for a snapshot in `staged`; returns what the monitor said and the writer's connection.
    fn branch(&self, staged: &StagedSnapshot) -> Result<(Event, UnixStream), Failure> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(Duration::from_secs(30)))?;
        let overlay = tempfile::tempfile()?;
        let fds = vec![Role::Control, Role::SnapshotDir, Role::DiskOverlay];
        let command = monitor::Command::Snapshot { fds, contents: Contents::Changes };
        monitor::send(&self.control, &command, &[theirs.as_fd(), staged.dir(), overlay.as_fd()])?;
        Ok((monitor::receive(&self.control)?.0, ours))
    }

    /// Takes a whole snapshot and returns what the guest had counted to.
    fn count(&self, store: &Store) -> Result<u32, Failure> {
        let staged = store.stage(&"later".parse()?)?;
        let (event, writer) = self.branch(&staged)?;
        let Event::Forked { .. } = event else { return Err(format!("no later snapshot: {event:?}").into()) };
        match monitor::receive(&writer)?.0 {
            Event::Written { .. } => {}
            other => return Err(format!("a later snapshot was not written: {other:?}").into()),
        }
        let layer = Layer::open(File::open(staged.path().join("memory.layer"))?)?;
        layer.verify(|_| ())?;
        let mut counter = [0; 4];
        layer.file().read_exact_at(&mut counter, DATA_OFFSET + COUNTER)?;
        Ok(u32::from_le_bytes(counter))
    }

    /// Fails unless the guest counts on and nothing is left of what failed.
    fn is_well(&self, store: &Store, descriptors: &[PathBuf]) -> Result<(), Failure> {
        let (one, other) = (self.count(store)?, self.count(store)?);
        if one == other {
            return Err(format!("the guest stands still at {one}").into());
        }
        eventually("every copy has ended", || Ok(self.children()?.is_empty()))?;
        // One more: what the disk's overlay held before the first snapshot is a layer of its own now.
        let now = self.descriptors()?;
        if now.len() != descriptors.len() + 1 {
            return Err(format!("it had {descriptors:?} open, and now {now:?}").into());
        }
        let left: Vec<_> = store.root().join("staging").read_dir()?.collect::<Result<_, _>>()?;
        if left.is_empty() { Ok(()) } else { Err(format!("this is left: {left:?}").into()) }
    }

    fn children(&self) -> io::Result<String> {
        std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.pid))
    }

    /// What its descriptors are of.
    fn descriptors(&self) -> io::Result<Vec<PathBuf>> {
        let all = Path::new("/proc").join(self.pid.to_string()).join("fd").read_dir()?;
        all.map(|fd| fd?.path().read_link()).collect()
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        // The monitor ends with the connection, and the tracer with the monitor.
        let _ = monitor::send(&self.control, &monitor::Command::Kill, &[]);
        let _ = self.control.shutdown(std::net::Shutdown::Both);
        let _ = self.tracer.wait();
    }
}

fn eventually(what: &str, mut holds: impl FnMut() -> Result<bool, Failure>) -> Result<(), Failure> {
    let end = Instant::now() + Duration::from_secs(10);
    while !holds()? {
        if Instant::now() > end {
            return Err(format!("waited in vain until {what}").into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// A store, and the first snapshot that is staged in it.
fn stage(directory: &Path) -> Result<(Store, StagedSnapshot), Failure> {
    let root = directory.join("root");
    if root.exists() {
        std::fs::remove_dir_all(&root)?;
    }
    let store = Store::open(&root)?;
    let staged = store.stage(&"branch".parse()?)?;
    Ok((store, staged))
}

/// The tracer of what is done in the directory of `staged` and to the files of a snapshot there.
fn trace_of(staged: &StagedSnapshot, directory: &Path) -> Trace {
    let files = ["memory.layer", "disk-0.layer", "vmstate"].map(|file| staged.path().join(file));
    Trace::in_directory(directory).only(files.into_iter().chain([PathBuf::from(staged.path())]))
}

/// The calls with which a writer writes a snapshot.
fn calls_of_a_writer(directory: &Path) -> Result<Vec<Call>, Failure> {
    let (store, staged) = stage(directory)?;
    let trace = trace_of(&staged, directory);
    let source = Source::launch(&trace, None)?;
    let (event, writer) = source.branch(&staged)?;
    let Event::Forked { pid, .. } = event else { return Err(format!("{event:?}").into()) };
    let said: Event = monitor::receive(&writer)?.0;
    let Event::Written { .. } = said else { return Err(format!("{said:?}").into()) };
    drop((source, staged, store));
    Ok(trace.calls()?.into_iter().filter(|call| i64::from(call.thread) == i64::from(pid)).collect())
}

fn walk(harms: &[Harm]) -> Result<(), Failure> {
    let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir())?;
    let calls = calls_of_a_writer(directory.path())?;
    let mut walked = 0;
    for call in &calls {
        for &harm in harms {
            if matches!(harm, Harm::Error(error) if !call.can_fail_with(error)) {
                continue;
            }
            let fault = Fault { call: call.clone(), harm };
            harmed(directory.path(), &fault).map_err(|error| format!("{harm:?} at {}: {error}", call.text))?;
            walked += 1;
        }
    }
    writeln!(io::stdout(), "{walked} harms at {} calls", calls.len())?;
    // At least: three files are created, sized, written and flushed.
    if walked >= 11 { Ok(()) } else { Err(format!("only {walked} stages were found").into()) }
}

/// One snapshot whose writer comes to harm.
fn harmed(directory: &Path, fault: &Fault) -> Result<(), Failure> {
    let (store, staged) = stage(directory)?;
    let source = Source::launch(&trace_of(&staged, directory), Some(fault))?;
    let descriptors = source.descriptors()?;
    let (event, writer) = source.branch(&staged)?;
    let Event::Forked { .. } = event else { return Err(format!("the source says {event:?}").into()) };
    let said = monitor::receive::<Event>(&writer);
    match (fault.harm, said) {
        (Harm::Kill, Err(_)) => {}
        (Harm::Error(_), Ok((Event::Failed { error }, _))) => {
            let named = ["memory.layer", "disk-0.layer", "vmstate"].iter().any(|file| {
                let of_this = fault.call.text.contains(file) && error.contains(file);
                of_this || (*file == "disk-0.layer" && error.contains("disk 0"))
            });
            if !named {
                return Err(format!("it only says: {error}").into());
            }
        }
        (_, said) => return Err(format!("it says {said:?}").into()),
    }
    // The node's part.
    drop(staged);
    source.is_well(&store, &descriptors)
}

fn fork_fails() -> Result<(), Failure> {
    let directory = tempfile::tempdir()?;
    let (store, staged) = stage(directory.path())?;
    // Threads are begun by another call.
    let fault = Fault { call: Call::nth("clone", 1), harm: Harm::Error("EAGAIN") };
    let source = Source::launch(&Trace::in_directory(directory.path()), Some(&fault))?;
    let descriptors = source.descriptors()?;
    let (event, writer) = source.branch(&staged)?;
    let says = |event: &Event| matches!(event, Event::Failed { error } if error.contains("fork the monitor"));
    if !says(&event) || monitor::receive::<Event>(&writer).is_ok() {
        return Err(format!("the source says {event:?}").into());
    }
    drop(staged);
    source.is_well(&store, &descriptors)
}

fn deadline_passes() -> Result<(), Failure> {
    let directory = tempfile::tempdir()?;
    let (store, staged) = stage(directory.path())?;
    // The vCPU's thread leaves the guest for the first time when it is told to stand still. The main thread's
    // first call of the kind is late too, before there is a machine.
    let late = forkd_vmm::machine::PAUSE_DEADLINE + Duration::from_secs(1);
    let fault = Fault { call: Call::nth("ioctl", 1), harm: Harm::Delay(late) };
    let source = Source::launch(&Trace::in_directory(directory.path()), Some(&fault))?;
    let descriptors = source.descriptors()?;
    let (event, _writer) = source.branch(&staged)?;
    let Event::Failed { error } = event else { return Err(format!("the source says {event:?}").into()) };
    if !error.contains("1 of 1 vCPUs did not leave the guest within 2s") {
        return Err(format!("it only says: {error}").into());
    }
    drop(staged);
    source.is_well(&store, &descriptors)
}
