//! `forkd-vmm bench-branch`: what it costs to branch a machine that runs, in turns with a bare fork of the
//! same memory.

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use forkd_types::StageTimings;
use serde::Serialize;

use super::guest::Failure;
use super::source::{Branched, Guest, Pages, Source};
use super::subcommand::{self, microseconds};

/// After how many branches of a soak the source is looked at.
const SOAK_STEP: usize = 100;
/// How long an ended copy may stay in the process table.
const EXIT_DEADLINE: Duration = Duration::from_secs(5);

/// What was asked for.
struct Options {
    private_mib: u64,
    pages: Pages,
    rounds: usize,
    in_a_row: usize,
    soak: usize,
    scratch: PathBuf,
}

/// Everything that was measured on one source, as one JSON object.
#[derive(Serialize)]
struct Report {
    private_mib: u64,
    memory_mib: u64,
    pages: &'static str,
    /// How much of the source's memory is in huge pages.
    huge_mib: u64,
    rounds: Vec<Round>,
    /// Pause of each branch in a series whose copies all stay.
    in_a_row_us: Vec<f64>,
    soak: Option<Soak>,
}

/// One branch and one bare fork, one right after the other.
#[derive(Serialize)]
struct Round {
    pause_us: f64,
    fork_us: f64,
    running_us: f64,
    pause_stages: StageTimings,
    running_stages: StageTimings,
}

/// Many branches from one source, each copy killed before the next.
#[derive(Serialize)]
struct Soak {
    branches: usize,
    /// The source after each [`SOAK_STEP`] branches, and before the first.
    steps: Vec<Step>,
    /// Descriptors that the source has more of than after its first step, in which it may still have been
    /// starting, and processes that it has more of than before.
    leaked_descriptors: i64,
    leaked_processes: i64,
}

/// The source at one point of a soak.
#[derive(Serialize)]
struct Step {
    branches: usize,
    /// Median since the step before, if there was a branch.
    pause_us: Option<f64>,
    rss_kib: u64,
    descriptors: usize,
}

/// Entry point of the subcommand; an error is a sentence for a person.
pub fn main(arguments: impl Iterator<Item = String>) -> Result<(), String> {
    let options = parse(arguments)?;
    run(&options).map_err(|error| format!("bench-branch: {error}"))
}

fn parse(arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options {
        private_mib: 64,
        pages: Pages::Small,
        rounds: 10,
        in_a_row: 0,
        soak: 0,
        scratch: std::env::temp_dir(),
    };
    subcommand::read(
        arguments,
        &mut [
            ("--private-mib", &mut options.private_mib),
            ("--pages", &mut options.pages),
            ("--rounds", &mut options.rounds),
            ("--in-a-row", &mut options.in_a_row),
            ("--soak", &mut options.soak),
            ("--scratch", &mut options.scratch),
        ],
    )?;
    Ok(options)
}

fn run(options: &Options) -> Result<(), Failure> {
    subcommand::raise_descriptor_limit();
    let source = Source::launch(&options.scratch, options.private_mib, options.pages, Guest::Waiting)?;
    let report = Report {
        private_mib: options.private_mib,
        memory_mib: source.memory_mib(),
        pages: options.pages.name(),
        huge_mib: source.huge_mib()?,
        rounds: (0..options.rounds).map(|number| round(&source, number)).collect::<Result<_, _>>()?,
        in_a_row_us: in_a_row(&source, options.in_a_row)?,
        soak: (options.soak > 0).then(|| soak(&source, options.soak)).transpose()?,
    };
    Ok(subcommand::print(&report)?)
}

/// The two take turns in going first, so that neither profits from what the other warmed; each is alone.
fn round(source: &Source, number: usize) -> Result<Round, Failure> {
    let fork_first = number.is_multiple_of(2);
    let before = fork_first.then(|| source.bare_fork()).transpose()?;
    let copy = source.branch()?;
    let (pause, running) = (copy.pause, copy.running);
    let (pause_stages, running_stages) = (copy.pause_stages.clone(), copy.running_stages.clone());
    copy.kill()?;
    let fork = before.map_or_else(|| source.bare_fork(), Ok)?;
    Ok(Round {
        pause_us: microseconds(pause),
        fork_us: microseconds(fork),
        running_us: microseconds(running),
        pause_stages,
        running_stages,
    })
}

fn in_a_row(source: &Source, count: usize) -> Result<Vec<f64>, Failure> {
    let copies = (0..count).map(|_| source.branch()).collect::<Result<Vec<_>, _>>()?;
    let pauses = copies.iter().map(|copy| microseconds(copy.pause)).collect();
    copies.into_iter().try_for_each(Branched::kill)?;
    Ok(pauses)
}

fn soak(source: &Source, branches: usize) -> Result<Soak, Failure> {
    let before = children(source.pid())?;
    let mut steps = vec![step(source, 0, &mut Vec::new())?];
    let mut pauses = Vec::new();
    for number in 1..=branches {
        let copy = source.branch()?;
        pauses.push(copy.pause);
        copy.kill()?;
        if number.is_multiple_of(SOAK_STEP) || number == branches {
            steps.push(step(source, number, &mut pauses)?);
        }
    }
    let until = Instant::now() + EXIT_DEADLINE;
    let mut after = children(source.pid())?;
    while !after.is_subset(&before) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
        after = children(source.pid())?;
    }
    let descriptors = |step: &Step| step.descriptors as i64;
    let (first, last) = (&steps[1.min(steps.len() - 1)], &steps[steps.len() - 1]);
    Ok(Soak {
        branches,
        leaked_descriptors: descriptors(last) - descriptors(first),
        leaked_processes: after.difference(&before).count() as i64,
        steps,
    })
}

/// Looks at the source; takes the pauses since it was looked at last.
fn step(source: &Source, branches: usize, pauses: &mut Vec<Duration>) -> Result<Step, Failure> {
    Ok(Step {
        branches,
        pause_us: median(pauses).map(microseconds),
        rss_kib: source.kib("status", "VmRSS:")?,
        descriptors: std::fs::read_dir(format!("/proc/{}/fd", source.pid()))?.count(),
    })
}

/// Takes `values` and returns the middle one, of an even number the upper of two.
fn median(values: &mut Vec<Duration>) -> Option<Duration> {
    let mut values = std::mem::take(values);
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}

/// Processes whose parent is `pid`, dead ones that nobody reaped included.
fn children(pid: i32) -> Result<HashSet<i32>, Failure> {
    let mut found = HashSet::new();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(child) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        // One that has ended since the directory was read is no child.
        let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        if parent(&stat) == Some(pid) {
            found.insert(child);
        }
    }
    Ok(found)
}

/// The parent in what `/proc/PID/stat` says: `PID (NAME) STATE PARENT …`; names may hold anything.
fn parent(stat: &str) -> Option<i32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parent_is_found_behind_any_name() {
        assert_eq!(parent("12 (a) b) R 7 12 12 0"), Some(7));
        assert_eq!(parent("12 (sh) S 1 12"), Some(1));
        assert_eq!(parent(""), None);
    }

    #[test]
    fn medians_are_taken_once() {
        let mut values = vec![Duration::from_micros(9), Duration::from_micros(1), Duration::from_micros(4)];
        assert_eq!(median(&mut values).map(microseconds), Some(4.0));
        assert_eq!(median(&mut values), None);
    }

    #[test]
    fn options_are_read_and_unknown_ones_are_refused() {
        let parse = |words: &[&str]| super::parse(words.iter().map(|word| (*word).to_owned()));
        let options = parse(&["--private-mib", "8", "--pages", "thp", "--soak", "3"]).expect("valid");
        assert_eq!((options.private_mib, options.pages, options.soak), (8, Pages::TransparentHuge, 3));
        for wrong in [&["--pages", "2m"][..], &["--rounds"], &["--rounds", "x"], &["--n", "1"]] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
