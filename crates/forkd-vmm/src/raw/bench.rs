//! `forkd-vmm bench-raw`: the time from a request to copies whose guests have run.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use forkd_proto::monitor::{self, Command, Event, Role};
use forkd_types::StageTimings;
use serde::Serialize;

use super::guest::{self, Failure, Private};
use crate::fork::{self, Side};
use crate::zygote;

/// How long the slowest copy may take before the run is given up.
const DEADLINE: Duration = Duration::from_secs(60);

/// What was asked for.
struct Options {
    children: usize,
    runs: usize,
    memory_mib: u64,
    touched_mib: u64,
    scratch: PathBuf,
}

/// One run, one JSON object a line.
#[derive(Serialize)]
struct Run {
    /// Copies whose guest ran.
    children: usize,
    memory_mib: u64,
    touched_mib: u64,
    /// From the first request until the last copy's guest had printed, milliseconds.
    wall_ms: f64,
    /// Until the zygote had forked the last copy.
    forks_issued_ms: f64,
    /// Stages of each copy.
    per_child: Vec<StageTimings>,
}

/// Entry point of the subcommand; an error is a sentence for a person.
pub fn main(arguments: impl Iterator<Item = String>) -> Result<(), String> {
    let options = parse(arguments)?;
    run(&options).map_err(|error| format!("bench-raw: {error}"))
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options { children: 1, runs: 1, memory_mib: 512, touched_mib: 64, scratch: std::env::temp_dir() };
    while let Some(name) = arguments.next() {
        if name == "--json" {
            continue; // The only output there is.
        }
        let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
        let number = || value.parse::<u64>().map_err(|_| format!("{name} {value}: not a whole number"));
        match name.as_str() {
            "--n" => options.children = number()? as usize,
            "--runs" => options.runs = number()? as usize,
            "--memory-mib" => options.memory_mib = number()?,
            "--touched-mib" => options.touched_mib = number()?,
            "--scratch" => options.scratch = value.into(),
            _ => {
                return Err(format!("unknown option {name}; there are --n --runs --memory-mib --touched-mib --scratch"));
            }
        }
    }
    if !(1..=1000).contains(&options.children) {
        return Err(format!("--n {}: 1 to 1000 copies can be made", options.children));
    }
    Ok(options)
}

fn run(options: &Options) -> Result<(), Failure> {
    raise_descriptor_limit();
    let memory_bytes = options.memory_mib << 20;
    let memory = guest::memory_layer(&options.scratch, memory_bytes, options.touched_mib << 20)?;
    let (node, zygote) = UnixStream::pair()?;
    let private = Private::new(&options.scratch)?;
    // The zygote boots the guest and goes on as what a node would have launched from a snapshot.
    if fork::fork()? == Side::Child {
        drop(node);
        fork::exit(hold(memory, memory_bytes, private, zygote.into()));
    }
    drop((memory, private, zygote));
    match monitor::receive(&node)?.0 {
        Event::Ready { .. } => {}
        other => return Err(format!("the zygote did not come up: {other:?}").into()),
    }
    for _ in 0..options.runs {
        let run = spawn(options, &node)?;
        let mut line = serde_json::to_vec(&run)?;
        line.push(b'\n');
        std::io::stdout().write_all(&line)?;
    }
    Ok(())
}

/// The zygote's process.
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
                    let ready = Event::Ready { vcpus: 1, memory_bytes, warnings: Vec::new() };
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

fn spawn(options: &Options, zygote: &UnixStream) -> Result<Run, Failure> {
    let children = options.children;
    let (mut console, console_end) = std::io::pipe()?;
    // A node has these ready ahead of requests.
    let mut prepared = Vec::new();
    for _ in 0..children {
        prepared.push((UnixStream::pair()?, Private::new(&options.scratch)?));
    }
    let roles = vec![Role::Control, Role::VsockListener, Role::Console, Role::DiskOverlay];
    let start = Instant::now();
    for (index, ((_, theirs), private)) in prepared.iter().enumerate() {
        let command = Command::Fork { fds: roles.clone(), name: format!("raw-{index}") };
        let fds = [theirs.as_fd(), private.vsock.as_fd(), console_end.as_fd(), private.overlay.as_fd()];
        monitor::send(zygote, &command, &fds)?;
    }
    drop(console_end);
    let mut controls = Vec::new();
    for ((ours, theirs), private) in prepared {
        drop((theirs, private));
        controls.push(ours);
    }
    for _ in 0..children {
        match monitor::receive(zygote)?.0 {
            Event::Forked { .. } => {}
            other => return Err(format!("the zygote did not fork: {other:?}").into()),
        }
    }
    let issued = start.elapsed();
    let mut ran = 0;
    let mut newlines = [0; 64];
    while ran < children {
        match console.read(&mut newlines)? {
            0 => return Err(format!("only {ran} of {children} copies ran").into()),
            n => ran += n,
        }
    }
    let wall = start.elapsed();
    let mut per_child = Vec::new();
    for control in &controls {
        control.set_read_timeout(Some(DEADLINE))?;
        match monitor::receive(control)?.0 {
            Event::Running { stages } => per_child.push(stages),
            other => return Err(format!("a copy did not come up: {other:?}").into()),
        }
        monitor::send(control, &Command::Kill, &[])?;
    }
    // Wait until all are gone, so that runs do not disturb each other.
    for control in &mut controls {
        let _ = control.read_to_end(&mut Vec::new());
    }
    let milliseconds = |duration: Duration| (duration.as_secs_f64() * 1e6).round() / 1e3;
    Ok(Run {
        children: ran,
        memory_mib: options.memory_mib,
        touched_mib: options.touched_mib,
        wall_ms: milliseconds(wall),
        forks_issued_ms: milliseconds(issued),
        per_child,
    })
}

/// A thousand copies take more descriptors than a shell usually allows.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}
