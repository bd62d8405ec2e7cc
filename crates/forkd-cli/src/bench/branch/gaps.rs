//! What a running guest notices of being branched, as its own clock tells it (`forkd-vmm bench-gap`).
//!
//! The branches are snapshots: the copy writes itself to disk while its source runs on. Each takes turns with as
//! long a time without a branch, in which the longest gap is what the host does to any program.

use std::path::Path;

use anyhow::Context as _;
use forkd_types::StageTimings;
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::super::floor::run;
use super::report::Mode;
use super::stage_medians;
use crate::output;
use crate::statistics::{Summary, median, summarise};

/// The most private memory of sources whose guests are asked: every branch of one is written to disk.
pub(super) const MOST_PRIVATE_MIB: u64 = 1024;
/// Branches from one source before the next begins, so that a run stays within its time.
const BLOCK: u32 = 2;

/// The figures of one guest. Medians, if nothing else is said; gaps are the longest of each stretch of time.
#[derive(Debug, Serialize)]
pub(super) struct Gaps {
    runs: usize,
    /// How long the source stood still, as its monitor timed it: quiesce, seal, fork.
    pause_ms: f64,
    /// The longest gap between two looks at the clock, from before the request until the guest ran again.
    gap_ms: f64,
    /// `gap_ms` divided by `pause_ms`.
    gap_ratio: f64,
    /// Median of the ratios of the branches.
    gap_ratio_of_branches: f64,
    /// The same in an equally long time without a branch.
    usual_gap_ms: f64,
    /// After that, for a second at least and until the copy is on disk.
    later_gap_ms: f64,
    /// The same in an equally long time without a branch.
    usual_later_gap_ms: f64,
    /// From the request until the copy was on disk.
    written_ms: f64,
    /// From one look at the clock to the next while the copy was written, and without a branch.
    later_tick_us: f64,
    usual_tick_us: f64,
    /// How fast the guest's clock went.
    clock_mhz: f64,
    pause: Summary,
    gap: Summary,
    usual_gap: Summary,
    later_gap: Summary,
    usual_later_gap: Summary,
    /// Medians of the stages of the pause, in the order they ran.
    pause_stages_us: Vec<(String, f64)>,
}

/// What `forkd-vmm bench-gap` prints.
#[derive(Debug, Deserialize)]
pub(super) struct Block {
    clock_mhz: f64,
    rounds: Vec<Round>,
}

/// One branch.
#[derive(Debug, Deserialize)]
struct Round {
    pause_us: f64,
    pause_stages: StageTimings,
    written_us: f64,
    during: Seen,
    later: Seen,
    quiet: Seen,
    quiet_later: Seen,
}

/// What the guest noticed in a stretch of time.
#[derive(Debug, Deserialize)]
struct Seen {
    gap_us: f64,
    tick_us: f64,
}

/// A program that has not said what it measured yet.
pub(super) struct GapBench<'a> {
    pub(super) monitor: &'a Path,
    pub(super) scratch: &'a Path,
    pub(super) private_mib: u64,
    pub(super) pages: &'static str,
}

impl GapBench<'_> {
    /// `runs` branches of a guest that idles and of one that writes to its memory, in turns.
    pub(super) async fn run(&self, runs: u32, made: impl Fn(u32)) -> anyhow::Result<[Gaps; 2]> {
        let mut blocks = [Vec::new(), Vec::new()];
        let mut done = 0;
        while done < runs {
            let rounds = BLOCK.min(runs - done);
            for (mode, blocks) in [Mode::Idle, Mode::Dirtying].into_iter().zip(&mut blocks) {
                blocks.push(self.block(mode, rounds).await?);
            }
            done += rounds;
            made(done);
        }
        Ok(blocks.map(|blocks| Gaps::new(&blocks)))
    }

    async fn block(&self, mode: Mode, rounds: u32) -> anyhow::Result<Block> {
        let mut command = Command::new(self.monitor);
        command.arg("bench-gap").arg("--private-mib").arg(self.private_mib.to_string());
        command.args(["--pages", self.pages, "--guest"]).arg(mode.to_string());
        command.arg("--rounds").arg(rounds.to_string()).arg("--scratch").arg(self.scratch);
        let text = run(command, "forkd-vmm bench-gap").await?;
        serde_json::from_str(&text).with_context(|| format!("forkd-vmm bench-gap said: {}", text.trim()))
    }
}

impl Gaps {
    fn new(blocks: &[Block]) -> Self {
        let rounds: Vec<&Round> = blocks.iter().flat_map(|block| &block.rounds).collect();
        let milliseconds = |value: fn(&Round) -> f64| summarise(rounds.iter().map(|round| value(round) / 1e3));
        let microseconds = |value: fn(&Round) -> f64| median(rounds.iter().map(|round| value(round)));
        let pause = milliseconds(|round| round.pause_us);
        let gap = milliseconds(|round| round.during.gap_us);
        let usual_gap = milliseconds(|round| round.quiet.gap_us);
        let later_gap = milliseconds(|round| round.later.gap_us);
        let usual_later_gap = milliseconds(|round| round.quiet_later.gap_us);
        Self {
            runs: rounds.len(),
            pause_ms: pause.p50,
            gap_ms: gap.p50,
            gap_ratio: gap.p50 / pause.p50,
            gap_ratio_of_branches: median(rounds.iter().map(|round| round.during.gap_us / round.pause_us)),
            usual_gap_ms: usual_gap.p50,
            later_gap_ms: later_gap.p50,
            usual_later_gap_ms: usual_later_gap.p50,
            written_ms: milliseconds(|round| round.written_us).p50,
            later_tick_us: microseconds(|round| round.later.tick_us),
            usual_tick_us: microseconds(|round| round.quiet_later.tick_us),
            clock_mhz: median(blocks.iter().map(|block| block.clock_mhz)),
            pause,
            gap,
            usual_gap,
            later_gap,
            usual_later_gap,
            pause_stages_us: stage_medians(rounds.iter().map(|round| &round.pause_stages)),
        }
    }
}

/// Prints what the guests of each size, kind of pages and mode noticed.
pub(super) fn print<'a>(rows: impl Iterator<Item = (u64, &'static str, Mode, &'a Gaps)>) -> anyhow::Result<()> {
    let mut rows = rows.peekable();
    if rows.peek().is_none() {
        return Ok(());
    }
    let mut table = output::table(&[
        "PRIVATE MiB",
        "PAGES",
        "GUEST",
        "PAUSE ms",
        "GAP",
        "p90",
        "RATIO",
        "USUALLY",
        "LATER",
        "USUALLY",
        "WRITTEN ms",
    ]);
    for (private_mib, pages, mode, gaps) in rows {
        let subject = [private_mib.to_string(), pages.to_owned(), mode.to_string()];
        let figures = [
            gaps.pause_ms,
            gaps.gap_ms,
            gaps.gap.p90,
            gaps.gap_ratio,
            gaps.usual_gap_ms,
            gaps.later_gap_ms,
            gaps.usual_later_gap_ms,
            gaps.written_ms,
        ];
        table.add_row(subject.into_iter().chain(figures.map(|figure| format!("{figure:.2}"))));
    }
    output::line(
        "\nthe guest's longest gap in ms: while it was branched, and later, while the copy was written to disk",
    )?;
    output::print_table(&mut table)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A block as the monitor prints it.
    fn block(rounds: &[(u32, u32)]) -> Block {
        let seen = |gap_us: u32| serde_json::json!({ "gap_us": gap_us, "gap_at_us": 1, "lasted_us": 9, "tick_us": 30 });
        let round = |(pause, gap): &(u32, u32)| {
            serde_json::json!({
                "pause_us": pause, "pause_stages": [{"name": "quiesce", "us": 100}], "written_us": 8000,
                "during": seen(*gap), "later": seen(gap / 2), "quiet": seen(40), "quiet_later": seen(gap / 4),
            })
        };
        let rounds: Vec<_> = rounds.iter().map(round).collect();
        serde_json::from_value(serde_json::json!({ "clock_mhz": 2100.0, "guest": "idle", "rounds": rounds }))
            .expect("whole")
    }

    #[test]
    fn gaps_are_compared_with_the_pause_over_all_blocks() {
        let gaps = Gaps::new(&[block(&[(1000, 1200), (4000, 16_000)]), block(&[(2000, 3000)])]);
        assert_eq!((gaps.runs, gaps.pause_ms, gaps.gap_ms), (3, 2.0, 3.0));
        assert_eq!((gaps.gap_ratio, gaps.gap_ratio_of_branches), (1.5, 1.5));
        assert_eq!((gaps.usual_gap_ms, gaps.later_gap_ms, gaps.usual_later_gap_ms), (0.04, 1.5, 0.75));
        assert_eq!((gaps.written_ms, gaps.usual_tick_us, gaps.clock_mhz), (8.0, 30.0, 2100.0));
        assert_eq!(gaps.pause_stages_us, [("quiesce".to_owned(), 100.0)]);
    }
}
