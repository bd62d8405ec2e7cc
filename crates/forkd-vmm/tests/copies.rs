//! Copies of the tiny guest on the real `/dev/kvm`, emulated or not: the monitor without Linux.
//!
//! Where there is no `/dev/kvm`, every test is counted as ignored and the reason is printed.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use forkd_memory::Layer;
use forkd_proto::monitor::{self, Command, Contents, Event, Role, SnapshotFacts, StopReason};
use forkd_vmm::raw::{Copies, RawZygote, Size};
use libtest_mimic::{Arguments, Failed, Trial};

const SIZE: Size = Size { memory_mib: 128, touched_mib: 16 };

type Test = fn() -> Result<(), Failed>;

fn main() {
    let arguments = Arguments::from_args();
    let missing = std::fs::File::options().read(true).write(true).open("/dev/kvm").err();
    if let Some(reason) = &missing {
        let _ = writeln!(std::io::stderr(), "SKIPPED, every test of this file: cannot open /dev/kvm: {reason}");
    }
    let trials: [(&str, Test); 8] = [
        ("every_copy_runs_and_stops_when_told", every_copy_runs_and_stops_when_told),
        ("a_copy_owns_only_the_pages_it_wrote", a_copy_owns_only_the_pages_it_wrote),
        ("a_copy_of_a_running_copy_runs_while_its_source_runs_on", a_copy_of_a_running_copy),
        ("a_request_that_lacks_a_descriptor_changes_nothing", a_request_that_lacks_a_descriptor),
        ("a_snapshot_that_cannot_be_written_fails_and_the_source_runs_on", a_snapshot_that_cannot_be_written),
        ("a_snapshot_of_changes_holds_only_those_whoever_writes_it", a_snapshot_of_changes),
        ("a_frozen_copy_with_a_listener_waits_for_the_next_node", a_frozen_copy_with_a_listener),
        ("memory_sizes_from_the_least_to_beyond_the_device_hole", memory_sizes),
    ];
    let trials = trials.map(|(name, run)| Trial::test(name, run).with_ignored_flag(missing.is_some()));
    libtest_mimic::run(&arguments, trials.into()).exit();
}

fn zygote() -> Result<RawZygote, Failed> {
    Ok(RawZygote::launch(&std::env::temp_dir(), SIZE)?)
}

/// `n` copies whose guests have all printed.
fn running(zygote: &RawZygote, n: usize) -> Result<Copies, Failed> {
    let mut copies = zygote.fork(zygote.prepare(n)?)?;
    assert_eq!(copies.stages()?.len(), n);
    let mut newlines = vec![0; n];
    copies.console.read_exact(&mut newlines)?;
    assert!(newlines.iter().all(|byte| *byte == b'\n'), "{newlines:?}");
    Ok(copies)
}

fn ask(control: &UnixStream, command: &Command) -> Result<Event, Failed> {
    monitor::send(control, command, &[])?;
    Ok(monitor::receive(control)?.0)
}

fn private_pages(control: &UnixStream) -> Result<u64, Failed> {
    match ask(control, &Command::Pages)? {
        Event::Pages { private_count, .. } => Ok(private_count),
        other => Err(format!("{other:?}").into()),
    }
}

fn kill(control: &UnixStream) -> Result<(), Failed> {
    let event = ask(control, &Command::Kill)?;
    assert_eq!(event, Event::Stopped { reason: StopReason::Killed });
    Ok(())
}

fn every_copy_runs_and_stops_when_told() -> Result<(), Failed> {
    let zygote = zygote()?;
    for n in [1, 20] {
        let copies = running(&zygote, n)?;
        copies.controls.iter().try_for_each(kill)?;
    }
    Ok(())
}

fn a_copy_owns_only_the_pages_it_wrote() -> Result<(), Failed> {
    let copies = running(&zygote()?, 2)?;
    for control in &copies.controls {
        // The counter that the guest wrote, the generation id, what devices and boot wrote: a few of
        // the 4096 pages that the snapshot stores.
        let pages = private_pages(control)?;
        assert!((1..=16).contains(&pages), "{pages} private pages");
    }
    Ok(())
}

/// What the request for one more copy carries, from a source that runs: an overlay for the copy and
/// one for the source.
struct Extra {
    ours: UnixStream,
    theirs: UnixStream,
    vsock: std::os::unix::net::UnixListener,
    console: std::io::PipeReader,
    console_end: std::io::PipeWriter,
    overlays: [std::fs::File; 2],
}

impl Extra {
    fn new() -> Result<Self, Failed> {
        use std::os::linux::net::SocketAddrExt;
        static COUNTER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("forkd-copies-{}-{number}", std::process::id());
        let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(Duration::from_secs(60)))?;
        let (console, console_end) = std::io::pipe()?;
        Ok(Self {
            ours,
            theirs,
            vsock: std::os::unix::net::UnixListener::bind_addr(&address)?,
            console,
            console_end,
            overlays: [tempfile::tempfile()?, tempfile::tempfile()?],
        })
    }

    fn ask(&self, source: &UnixStream) -> Result<Event, Failed> {
        use std::os::fd::AsFd;
        let roles = [Role::Control, Role::VsockListener, Role::Console, Role::DiskOverlay, Role::DiskOverlay];
        let command = Command::Fork { fds: roles.to_vec(), name: "branch".to_owned(), disk_bytes: None };
        let fds = [
            self.theirs.as_fd(),
            self.vsock.as_fd(),
            self.console_end.as_fd(),
            self.overlays[0].as_fd(),
            self.overlays[1].as_fd(),
        ];
        monitor::send(source, &command, &fds)?;
        Ok(monitor::receive(source)?.0)
    }
}

fn a_copy_of_a_running_copy() -> Result<(), Failed> {
    let copies = running(&zygote()?, 1)?;
    let source = &copies.controls[0];
    let mut generations = vec![source.try_clone()?];
    let mut kept = Vec::new();
    // A copy of a copy of a copy is a copy.
    for _ in 0..3 {
        let extra = Extra::new()?;
        let event = extra.ask(generations.last().expect("there is a source"))?;
        assert!(matches!(event, Event::Forked { pause_us: 1.., .. }), "{event:?}");
        let running: Event = monitor::receive(&extra.ours)?.0;
        assert!(matches!(running, Event::Running { .. }), "{running:?}");
        generations.push(extra.ours.try_clone()?);
        kept.push(extra);
    }
    for control in &generations {
        assert!(private_pages(control)? >= 1, "it answers");
    }
    generations.iter().try_for_each(kill)?;
    drop(kept.iter().map(|extra| &extra.console).collect::<Vec<_>>());
    Ok(())
}

fn a_request_that_lacks_a_descriptor() -> Result<(), Failed> {
    let copies = running(&zygote()?, 1)?;
    let source = &copies.controls[0];
    for roles in [vec![], vec![Role::Control]] {
        let event = ask(source, &Command::Fork { fds: roles, name: "broken".to_owned(), disk_bytes: None })?;
        assert!(matches!(event, Event::Failed { .. }), "{event:?}");
    }
    assert!(private_pages(source)? >= 1, "it answers");
    kill(source)
}

fn a_snapshot_that_cannot_be_written() -> Result<(), Failed> {
    use std::os::fd::AsFd;
    let copies = running(&zygote()?, 1)?;
    let source = &copies.controls[0];
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(Duration::from_secs(60)))?;
    // A directory in which nothing can be created, whoever asks.
    let directory = std::fs::File::open("/proc/self")?;
    let overlay = tempfile::tempfile()?;
    let command =
        Command::Snapshot { fds: vec![Role::Control, Role::SnapshotDir, Role::DiskOverlay], contents: Contents::Whole };
    monitor::send(source, &command, &[theirs.as_fd(), directory.as_fd(), overlay.as_fd()])?;
    let event: Event = monitor::receive(source)?.0;
    assert!(matches!(event, Event::Forked { .. }), "{event:?}");
    let Event::Failed { error } = monitor::receive(&ours)?.0 else { return Err("it was written".into()) };
    assert!(error.contains("memory.layer"), "{error}");
    assert!(private_pages(source)? >= 1, "the source answers");
    kill(source)
}

/// Has `source` write a snapshot into a new directory; `own` are overlays for the source.
fn snapshot(
    source: &UnixStream,
    contents: Contents,
    own: &[std::fs::File],
) -> Result<(tempfile::TempDir, SnapshotFacts), Failed> {
    use std::os::fd::AsFd;
    let directory = tempfile::tempdir()?;
    let opened = std::fs::File::open(directory.path())?;
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut roles = vec![Role::Control, Role::SnapshotDir];
    let mut fds = vec![theirs.as_fd(), opened.as_fd()];
    for overlay in own {
        roles.push(Role::DiskOverlay);
        fds.push(overlay.as_fd());
    }
    monitor::send(source, &Command::Snapshot { fds: roles, contents }, &fds)?;
    let event: Event = monitor::receive(source)?.0;
    assert!(matches!(event, Event::Forked { .. }), "{event:?}");
    match monitor::receive(&ours)?.0 {
        Event::Written { facts, .. } => Ok((directory, facts)),
        other => Err(format!("{other:?}").into()),
    }
}

fn a_snapshot_of_changes() -> Result<(), Failed> {
    use std::os::fd::AsFd;
    let copies = running(&zygote()?, 1)?;
    let source = &copies.controls[0];
    let (_whole, whole) = snapshot(source, Contents::Whole, &[tempfile::tempfile()?])?;
    let (running, changes) = snapshot(source, Contents::Changes, &[tempfile::tempfile()?])?;
    let layer = Layer::open(std::fs::File::open(running.path().join("memory.layer"))?)?;
    layer.verify(|_| ())?;
    let counter = 3;
    assert!(layer.data().iter().any(|run| (run.first..run.end()).contains(&counter)), "{:?}", layer.data());
    // All that the 16 MiB base stores, against the few pages that the copy wrote.
    assert!(whole.memory_pages > 3800, "{whole:?}");
    assert!((1..=16).contains(&changes.memory_pages), "{changes:?}");
    assert!(changes.stored_bytes < whole.stored_bytes / 50, "{changes:?}, whole {whole:?}");
    // A copy of the copy, frozen, differs from the same snapshot in the same way.
    let (frozen, theirs) = UnixStream::pair()?;
    frozen.set_read_timeout(Some(Duration::from_secs(60)))?;
    let command = Command::Freeze { fds: vec![Role::Control, Role::DiskOverlay], name: "frozen".to_owned() };
    monitor::send(source, &command, &[theirs.as_fd(), tempfile::tempfile()?.as_fd()])?;
    drop(theirs);
    let event: Event = monitor::receive(source)?.0;
    assert!(matches!(event, Event::Forked { .. }), "{event:?}");
    let event: Event = monitor::receive(&frozen)?.0;
    assert!(matches!(event, Event::Ready { .. }), "{event:?}");
    let (_directory, again) = snapshot(&frozen, Contents::Changes, &[])?;
    assert_eq!((again.memory_digest, again.disks), (changes.memory_digest, changes.disks));
    kill(source)
}

fn a_frozen_copy_with_a_listener() -> Result<(), Failed> {
    use std::io::ErrorKind;
    use std::os::fd::AsFd;
    let copies = running(&zygote()?, 1)?;
    let source = &copies.controls[0];
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("control");
    let listener = std::os::unix::net::UnixListener::bind(&path)?;
    let (frozen, theirs) = UnixStream::pair()?;
    let roles = vec![Role::Control, Role::ControlListener, Role::DiskOverlay];
    let command = Command::Freeze { fds: roles, name: "frozen".to_owned() };
    monitor::send(source, &command, &[theirs.as_fd(), listener.as_fd(), tempfile::tempfile()?.as_fd()])?;
    drop((theirs, listener));
    let Event::Forked { pid, .. } = monitor::receive(source)?.0 else { return Err("it was not frozen".into()) };
    assert!(matches!(monitor::receive(&frozen)?.0, Event::Ready { .. }));
    kill(source)?;
    // Its node goes away, and so does the next, which does not say goodbye either.
    drop(frozen);
    for _ in 0..2 {
        let node = UnixStream::connect(&path)?;
        node.set_read_timeout(Some(Duration::from_secs(60)))?;
        assert!(private_pages(&node)? >= 1, "it is served");
        drop(node);
    }
    let node = UnixStream::connect(&path)?;
    monitor::send(&node, &Command::Kill, &[])?;
    // The process goes, and its listening socket with it.
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    loop {
        match UnixStream::connect(&path) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => return Ok(()),
            _ if std::time::Instant::now() > deadline => return Err(format!("process {pid} is still there").into()),
            _ => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

fn memory_sizes() -> Result<(), Failed> {
    for memory_mib in [128, 4096] {
        let zygote = RawZygote::launch(&std::env::temp_dir(), Size { memory_mib, touched_mib: 8 })?;
        let copies = running(&zygote, 2)?;
        copies.controls.iter().try_for_each(kill)?;
    }
    Ok(())
}
