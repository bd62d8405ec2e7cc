//! `forkd-vmm bench-raw`: the time from a request to copies whose guests have run.

use std::io::Read;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use forkd_proto::monitor::{self, Command};
use forkd_types::StageTimings;
use serde::Serialize;

use super::guest::Failure;
use super::subcommand;
use super::zygote::{RawZygote, Size};

/// What was asked for.
struct Options {
    children: usize,
    runs: usize,
    size: Size,
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

fn parse(arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let size = Size { memory_mib: 512, touched_mib: 64 };
    let mut options = Options { children: 1, runs: 1, size, scratch: std::env::temp_dir() };
    subcommand::read(
        arguments,
        &mut [
            ("--n", &mut options.children),
            ("--runs", &mut options.runs),
            ("--memory-mib", &mut options.size.memory_mib),
            ("--touched-mib", &mut options.size.touched_mib),
            ("--scratch", &mut options.scratch),
        ],
    )?;
    if !(1..=1000).contains(&options.children) {
        return Err(format!("--n {}: 1 to 1000 copies can be made", options.children));
    }
    Ok(options)
}

fn run(options: &Options) -> Result<(), Failure> {
    subcommand::raise_descriptor_limit();
    let zygote = RawZygote::launch(&options.scratch, options.size)?;
    for _ in 0..options.runs {
        subcommand::print(&measure(options, &zygote)?)?;
    }
    Ok(())
}

fn measure(options: &Options, zygote: &RawZygote) -> Result<Run, Failure> {
    let children = options.children;
    let prepared = zygote.prepare(children)?;
    let start = Instant::now();
    let mut copies = zygote.fork(prepared)?;
    let issued = start.elapsed();
    let mut ran = 0;
    let mut newlines = [0; 64];
    while ran < children {
        match copies.console.read(&mut newlines)? {
            0 => return Err(format!("only {ran} of {children} copies ran").into()),
            n => ran += n,
        }
    }
    let wall = start.elapsed();
    let per_child = copies.stages()?;
    for control in &copies.controls {
        monitor::send(control, &Command::Kill, &[])?;
    }
    // Wait until all are gone, so that runs do not disturb each other.
    for control in &mut copies.controls {
        let _ = control.read_to_end(&mut Vec::new());
    }
    let milliseconds = |duration: Duration| (duration.as_secs_f64() * 1e6).round() / 1e3;
    Ok(Run {
        children: ran,
        memory_mib: options.size.memory_mib,
        touched_mib: options.size.touched_mib,
        wall_ms: milliseconds(wall),
        forks_issued_ms: milliseconds(issued),
        per_child,
    })
}
