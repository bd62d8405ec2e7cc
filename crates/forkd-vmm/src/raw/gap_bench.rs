//! `forkd-vmm bench-gap`: what a guest notices of being branched, while it is and while the copy is written to disk,
//! in turns with as long a time without a branch.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use forkd_types::StageTimings;
use serde::Serialize;

use super::guest::Failure;
use super::source::{Guest, Pages, Source};
use super::subcommand::{self, Setting, microseconds};
use super::ticking_guest::{Watch, Window};

/// What a source is given to come to rest after a snapshot of it was written and removed.
const SETTLE: Duration = Duration::from_millis(200);

/// What was asked for.
struct Options {
    private_mib: u64,
    pages: Pages,
    guest: Guest,
    rounds: usize,
    after_ms: u64,
    scratch: PathBuf,
}

impl Setting for Guest {
    fn set(&mut self, value: &str) -> Result<(), String> {
        let all = [Self::Ticking, Self::Dirtying];
        *self = all.into_iter().find(|guest| guest.name() == value).ok_or("there are idle and dirtying")?;
        Ok(())
    }
}

/// Everything that was measured on one source, as one JSON object.
#[derive(Serialize)]
struct Report {
    private_mib: u64,
    memory_mib: u64,
    pages: &'static str,
    guest: &'static str,
    /// How much of the source's memory is in huge pages.
    huge_mib: u64,
    /// How fast the guest's clock goes.
    clock_mhz: f64,
    rounds: Vec<Round>,
}

/// One branch, and as long a time without one.
#[derive(Serialize)]
struct Round {
    /// How long the source stood still, as its monitor timed it.
    pause_us: f64,
    pause_stages: StageTimings,
    /// From the request until the snapshot was written.
    written_us: f64,
    /// From before the request until the guest had run again.
    during: Seen,
    /// After that, while the snapshot is being written and for a while.
    later: Seen,
    /// As long as `during`, without a branch.
    quiet: Seen,
    /// As long as `later`, without a branch.
    quiet_later: Seen,
}

/// What the guest noticed in a stretch of time.
#[derive(Serialize)]
struct Seen {
    /// The longest time between two looks at its clock.
    gap_us: f64,
    /// When that ended, from the beginning of the stretch.
    gap_at_us: f64,
    lasted_us: f64,
    /// How long it usually takes from one look to the next.
    tick_us: f64,
}

impl From<Window> for Seen {
    fn from(window: Window) -> Self {
        Self {
            gap_us: microseconds(window.gap),
            gap_at_us: microseconds(window.gap_at),
            lasted_us: microseconds(window.lasted),
            tick_us: microseconds(window.lasted / window.ticks.max(1)),
        }
    }
}

/// Entry point of the subcommand; an error is a sentence for a person.
pub fn main(arguments: impl Iterator<Item = String>) -> Result<(), String> {
    let options = parse(arguments)?;
    run(&options).map_err(|error| format!("bench-gap: {error}"))
}

fn parse(arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options {
        private_mib: 64,
        pages: Pages::Small,
        guest: Guest::Ticking,
        rounds: 5,
        after_ms: 1000,
        scratch: std::env::temp_dir(),
    };
    subcommand::read(
        arguments,
        &mut [
            ("--private-mib", &mut options.private_mib),
            ("--pages", &mut options.pages),
            ("--guest", &mut options.guest),
            ("--rounds", &mut options.rounds),
            ("--after-ms", &mut options.after_ms),
            ("--scratch", &mut options.scratch),
        ],
    )?;
    Ok(options)
}

fn run(options: &Options) -> Result<(), Failure> {
    let source = Source::launch(&options.scratch, options.private_mib, options.pages, options.guest)?;
    let mut watch = source.watch()?;
    let directory = options.scratch.join(format!("bench-gap-{}", std::process::id()));
    let after = Duration::from_millis(options.after_ms);
    let report = Report {
        private_mib: options.private_mib,
        memory_mib: source.memory_mib(),
        pages: options.pages.name(),
        guest: options.guest.name(),
        huge_mib: source.huge_mib()?,
        clock_mhz: (watch.hertz() / 1e3).round() / 1e3,
        rounds: (0..options.rounds).map(|_| round(&source, &mut watch, &directory, after)).collect::<Result<_, _>>()?,
    };
    Ok(subcommand::print(&report)?)
}

fn round(source: &Source, watch: &mut Watch, directory: &Path, after: Duration) -> Result<Round, Failure> {
    std::fs::create_dir(directory)?;
    let measured = branch(source, watch, directory, after);
    std::fs::remove_dir_all(directory)?;
    let (pause, pause_stages, written, during, later) = measured?;
    std::thread::sleep(SETTLE);
    watch.mark()?;
    std::thread::sleep(during.lasted);
    let quiet = watch.mark()?;
    std::thread::sleep(later.lasted);
    let quiet_later = watch.mark()?;
    Ok(Round {
        pause_us: microseconds(pause),
        pause_stages,
        written_us: microseconds(written),
        during: during.into(),
        later: later.into(),
        quiet: quiet.into(),
        quiet_later: quiet_later.into(),
    })
}

/// One branch: its pause and where that went, when the snapshot was written, and what the guest noticed.
type Measured = (Duration, StageTimings, Duration, Window, Window);

fn branch(source: &Source, watch: &mut Watch, directory: &Path, after: Duration) -> Result<Measured, Failure> {
    watch.mark()?;
    let writing = source.snapshot(directory)?;
    let during = watch.mark()?;
    let until = Instant::now() + after;
    let (pause, pause_stages) = (writing.pause, writing.pause_stages.clone());
    let written = writing.finish()?;
    std::thread::sleep(until.saturating_duration_since(Instant::now()));
    let later = watch.mark()?;
    Ok((pause, pause_stages, written, during, later))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_and_unknown_ones_are_refused() {
        let parse = |words: &[&str]| super::parse(words.iter().map(|word| (*word).to_owned()));
        let options = parse(&["--guest", "dirtying", "--pages", "thp", "--after-ms", "5"]).expect("valid");
        assert_eq!((options.guest, options.pages), (Guest::Dirtying, Pages::TransparentHuge));
        assert_eq!(options.after_ms, 5);
        for wrong in [&["--guest", "waiting"][..], &["--rounds"], &["--soak", "1"]] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_stretch_in_which_nothing_ran_is_one_tick() {
        let second = Duration::from_secs(1);
        let seen = Seen::from(Window { gap: second, gap_at: second, lasted: second, ticks: 0 });
        assert_eq!((seen.gap_us, seen.tick_us), (1e6, 1e6));
    }
}
