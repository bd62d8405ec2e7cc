//! `forkd-vmm bench-chain`: copies of snapshots over ever more others, in turns.

use std::io::Read;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use forkd_proto::monitor::{self, Command};
use forkd_types::{PAGE_SIZE, StageTimings};
use serde::Serialize;

use super::chain::Chain;
use super::guest::Failure;
use super::subcommand::{self, microseconds};
use super::zygote::{RawZygote, Size};

/// What was asked for.
struct Options {
    depth: usize,
    runs: usize,
    size: Size,
    changed_pages: u64,
    scratch: PathBuf,
}

/// Everything that was measured, as one JSON object.
#[derive(Serialize)]
struct Report {
    memory_mib: u64,
    touched_mib: u64,
    depths: Vec<Depth>,
}

/// One snapshot of the chain.
#[derive(Serialize)]
struct Depth {
    depth: usize,
    /// From starting its zygote until that was ready, microseconds.
    load_us: f64,
    /// From a request until the copy's guest had run, each.
    spawn_us: Vec<f64>,
    /// Where that time went, in the copy.
    spawn_stages: Vec<StageTimings>,
    /// What its own files take on disk, indexes and CPU state included.
    layer_bytes: u64,
    /// What is in them: changed pages and blocks that are not zero.
    changed_bytes: u64,
    /// Reading its layers and comparing digests.
    verify_us: f64,
}

/// Entry point of the subcommand; an error is a sentence for a person.
pub fn main(arguments: impl Iterator<Item = String>) -> Result<(), String> {
    let options = parse(arguments)?;
    run(&options).map_err(|error| format!("bench-chain: {error}"))
}

fn parse(arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options {
        depth: 16,
        runs: 10,
        size: Size { memory_mib: 512, touched_mib: 64 },
        changed_pages: 0,
        scratch: std::env::temp_dir(),
    };
    let mut changed_mib: u64 = 4;
    subcommand::read(
        arguments,
        &mut [
            ("--depth", &mut options.depth),
            ("--runs", &mut options.runs),
            ("--memory-mib", &mut options.size.memory_mib),
            ("--touched-mib", &mut options.size.touched_mib),
            ("--changed-mib", &mut changed_mib),
            ("--scratch", &mut options.scratch),
        ],
    )?;
    options.changed_pages = changed_mib.saturating_mul((1 << 20) / PAGE_SIZE);
    let limit = options.size.memory_mib << 20 >> 2;
    if options.changed_pages * PAGE_SIZE > limit {
        return Err(format!("--changed-mib: at most a quarter of memory, {} MiB, can change", limit >> 20));
    }
    Ok(options)
}

fn run(options: &Options) -> Result<(), Failure> {
    subcommand::raise_descriptor_limit();
    let mut chain = Chain::begin(&options.scratch, options.size)?;
    for _ in 0..options.depth {
        chain.grow(options.changed_pages)?;
    }
    let mut zygotes = Vec::new();
    let mut depths = Vec::new();
    for (depth, facts) in chain.facts.iter().enumerate() {
        let (zygote, load) = chain.zygote(depth)?;
        zygotes.push(zygote);
        let blocks: u64 = facts.disks.iter().map(|(_, blocks)| blocks).sum();
        let started = Instant::now();
        chain.verify(depth)?;
        depths.push(Depth {
            depth,
            load_us: microseconds(load),
            spawn_us: Vec::new(),
            spawn_stages: Vec::new(),
            layer_bytes: facts.stored_bytes,
            changed_bytes: (facts.memory_pages + blocks) * PAGE_SIZE,
            verify_us: microseconds(started.elapsed()),
        });
    }
    // One of each first: what a zygote does once is not what a copy costs.
    zygotes.iter().try_for_each(|zygote| spawn(zygote).map(drop))?;
    for run in 0..options.runs {
        // Every second round backwards, so that a drift of the host favours neither end.
        let order: Vec<_> = if run % 2 == 0 { (0..depths.len()).collect() } else { (0..depths.len()).rev().collect() };
        for depth in order {
            let (took, stages) = spawn(&zygotes[depth])?;
            depths[depth].spawn_us.push(microseconds(took));
            depths[depth].spawn_stages.push(stages);
        }
    }
    let report = Report { memory_mib: options.size.memory_mib, touched_mib: options.size.touched_mib, depths };
    Ok(subcommand::print(&report)?)
}

/// One copy, until its guest has run; it is gone when this returns.
fn spawn(zygote: &RawZygote) -> Result<(Duration, StageTimings), Failure> {
    let prepared = zygote.prepare(1)?;
    let started = Instant::now();
    let mut copies = zygote.fork(prepared)?;
    copies.console.read_exact(&mut [0]).map_err(|error| format!("a copy's guest did not run: {error}"))?;
    let took = started.elapsed();
    let stages = copies.stages()?.remove(0);
    for control in &mut copies.controls {
        monitor::send(&*control, &Command::Kill, &[])?;
        let _ = control.read_to_end(&mut Vec::new());
    }
    Ok((took, stages))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    #[test]
    fn options_are_read_and_unknown_ones_are_refused() {
        let parse = |words: &[&str]| super::parse(words.iter().map(|word| (*word).to_owned()));
        let options = parse(&["--depth", "3", "--changed-mib", "1", "--scratch", "/x"]).expect("valid");
        assert_eq!((options.depth, options.changed_pages, options.scratch.as_path()), (3, 256, Path::new("/x")));
        for wrong in [&["--changed-mib", "200"][..], &["--runs"], &["--runs", "x"], &["--n", "1"]] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
