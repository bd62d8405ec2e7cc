//! `bench branch --raw`: what branching a running machine costs, against two floors of this host.
//!
//! The floor of the pause is a bare `fork(2)` of the same memory, page for page, in a process of the same
//! size that does nothing else; it takes turns with the branches (`forkd-vmm bench-branch`). The floor of
//! the time until the copy's guest has run is `limits/branch_limit.c`, which does the same with bare KVM; it
//! takes turns with blocks of branches. Medians of both are compared. What a guest that runs notices of all that,
//! it says itself ([`super::gaps`]).

use std::path::Path;

use anyhow::Context as _;
use forkd_types::{ByteSize, StageTimings};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::super::Host;
use super::super::floor::{FloorProgram, field, run};
use super::gaps::{self, GapBench, Gaps};
use super::report::Mode;
use super::stage_medians;
use crate::commands::Context;
use crate::statistics::{Summary, median, summarise};
use crate::{output, programs, units};

/// The floor of the time until the copy's guest has run.
const FLOOR: FloorProgram =
    FloorProgram { name: "branch_limit", source: include_str!("../../../../../limits/branch_limit.c") };

/// Branches from one source before the floor has its turn and the next source begins.
const BLOCK: u32 = 5;
/// Branches in a row, all copies staying.
const IN_A_ROW: u32 = 10;
/// Memory that is left to the host's other programs.
const LEFT_MIB: u64 = 2048;
/// Private memory of the source of which very many branches are made.
const SOAK_PRIVATE_MIB: u64 = 64;

/// What is measured with the built-in guest.
#[derive(Debug)]
pub(super) struct RawBranchBench {
    /// Private memory of the sources.
    pub(super) private: Vec<ByteSize>,
    /// Branches per size and kind of pages.
    pub(super) runs: u32,
    /// Branches of each guest that says what it notices, per size and kind of pages.
    pub(super) gap_runs: u32,
    /// Branches from one source at the end.
    pub(super) soak: u32,
    /// Print the result as JSON.
    pub(super) json: bool,
}

/// The figures for one size and kind of pages.
#[derive(Debug, Serialize)]
struct Row {
    private_mib: u64,
    memory_mib: u64,
    /// `4k` or `thp`.
    pages: &'static str,
    /// How much of the memory was in huge pages, the least of all blocks.
    huge_mib: u64,
    runs: usize,
    /// How long the source stood still, as its monitor timed it: quiesce, seal, fork. Median.
    pause_ms: f64,
    /// A bare fork of the same memory. Median.
    fork_ms: f64,
    /// `pause_ms` divided by `fork_ms`.
    ratio: f64,
    /// Median of the ratios of the pairs.
    ratio_of_pairs: f64,
    /// From the request until the copy's guest had run. Median.
    running_ms: f64,
    /// The same with bare KVM; absent where that cannot have so much memory.
    limit_running_ms: Option<f64>,
    /// `running_ms` divided by `limit_running_ms`.
    running_ratio: Option<f64>,
    /// The pause with bare KVM.
    limit_pause_ms: Option<f64>,
    /// Pause of each of ten branches in a row whose copies all stay, median over the blocks.
    in_a_row_ms: Vec<f64>,
    /// What a guest notices that only watches its clock; absent where that was not measured.
    idle: Option<Gaps>,
    /// What a guest notices that writes to its private memory as well.
    dirtying: Option<Gaps>,
    pause: Summary,
    fork: Summary,
    running: Summary,
    /// Medians of the stages of the pause, in the order they ran.
    pause_stages_us: Vec<(String, f64)>,
    /// Medians of the stages of the copy, from the request until its vCPU was started.
    running_stages_us: Vec<(String, f64)>,
}

/// A row that was not measured.
#[derive(Debug, Serialize)]
struct Skipped {
    private_mib: u64,
    reason: String,
}

/// The whole report.
#[derive(Debug, Serialize)]
struct Report {
    host: Host,
    command: String,
    rows: Vec<Row>,
    skipped: Vec<Skipped>,
    soak: Option<Soak>,
}

/// What `forkd-vmm bench-branch` prints.
#[derive(Debug, Deserialize)]
struct Block {
    memory_mib: u64,
    huge_mib: u64,
    rounds: Vec<Round>,
    in_a_row_us: Vec<f64>,
    soak: Option<Soak>,
}

/// One branch and one bare fork.
#[derive(Debug, Deserialize)]
struct Round {
    pause_us: f64,
    fork_us: f64,
    running_us: f64,
    pause_stages: StageTimings,
    running_stages: StageTimings,
}

/// Many branches from one source.
#[derive(Debug, Serialize, Deserialize)]
struct Soak {
    branches: u32,
    /// The source after every hundred.
    steps: Vec<Step>,
    leaked_descriptors: i64,
    leaked_processes: i64,
}

/// The source at one point.
#[derive(Debug, Serialize, Deserialize)]
struct Step {
    branches: u32,
    /// Median since the step before.
    pause_us: Option<f64>,
    rss_kib: u64,
    descriptors: usize,
}

/// What bare KVM took.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Limit {
    pause_ms: f64,
    running_ms: f64,
}

/// The programs that are run, and where they keep their files.
struct Bench<'a> {
    monitor: &'a Path,
    floor: &'a Path,
    scratch: &'a Path,
    context: &'a Context,
}

impl RawBranchBench {
    pub(super) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let monitor = programs::companion("forkd-vmm")?;
        let floor = FLOOR.compile(context).await?;
        let scratch = tempfile::tempdir_in(context.data.bench()?)?;
        let bench = Bench { monitor: &monitor, floor: &floor, scratch: scratch.path(), context };
        let (mut rows, mut skipped) = (Vec::new(), Vec::new());
        for size in &self.private {
            let private_mib = size.as_mib();
            if let Some(reason) = too_large(private_mib, available_mib()?) {
                context.progress.warn(format_args!("SKIPPED, {private_mib} MiB private: {reason}"));
                skipped.push(Skipped { private_mib, reason });
                continue;
            }
            for pages in ["4k", "thp"] {
                let mut row = bench.row(private_mib, pages, self.runs).await?;
                if private_mib <= gaps::MOST_PRIVATE_MIB && self.gap_runs > 0 {
                    let [idle, dirtying] = bench.gaps(private_mib, pages, self.gap_runs).await?;
                    (row.idle, row.dirtying) = (Some(idle), Some(dirtying));
                }
                rows.push(row);
            }
        }
        let soak = if self.soak > 0 { Some(bench.soak(self.soak).await?) } else { None };
        let report = Report { host: Host::here(), command: self.command(), rows, skipped, soak };
        if self.json {
            output::json(&report)?;
        } else {
            report.print()?;
        }
        Ok(0)
    }

    fn command(&self) -> String {
        let sizes: String = self.private.iter().map(|size| format!(" --private {}M", size.as_mib())).collect();
        let (runs, gap_runs, soak) = (self.runs, self.gap_runs, self.soak);
        format!("forkd bench branch --raw{sizes} --runs {runs} --gap-runs {gap_runs} --soak {soak}")
    }
}

impl Bench<'_> {
    async fn row(&self, private_mib: u64, pages: &'static str, runs: u32) -> anyhow::Result<Row> {
        let title = format!("{private_mib} MiB private, {pages} pages, {}", units::count(runs as usize, "pair"));
        let step = self.context.progress.step(title.clone());
        step.set_items(runs.into());
        let (mut blocks, mut limits) = (Vec::new(), Vec::new());
        let mut made = 0;
        while made < runs {
            let rounds = BLOCK.min(runs - made);
            let arguments = [("--rounds", rounds), ("--in-a-row", IN_A_ROW)];
            let block = self.branch(private_mib, pages, &arguments).await?;
            limits.push(self.limit(block.memory_mib, private_mib, pages, rounds).await);
            blocks.push(block);
            made += rounds;
            step.set_position(made.into());
        }
        step.done(title);
        let limits = match limits.into_iter().collect::<anyhow::Result<Vec<_>>>() {
            Ok(limits) => limits,
            Err(error) => {
                self.context.progress.warn(format_args!("bare KVM with {private_mib} MiB private: {error:#}"));
                Vec::new()
            }
        };
        Ok(Row::new(private_mib, pages, &blocks, &limits))
    }

    async fn gaps(&self, private_mib: u64, pages: &'static str, runs: u32) -> anyhow::Result<[Gaps; 2]> {
        let count = units::count(runs as usize, "snapshot");
        let title = format!("{private_mib} MiB private, {pages} pages, {count} as the guest sees them");
        let step = self.context.progress.step(title.clone());
        step.set_items(runs.into());
        let bench = GapBench { monitor: self.monitor, scratch: self.scratch, private_mib, pages };
        let gaps = bench.run(runs, |made| step.set_position(made.into())).await?;
        step.done(title);
        Ok(gaps)
    }

    async fn soak(&self, branches: u32) -> anyhow::Result<Soak> {
        let title = format!("One source, branched {}", units::count(branches as usize, "time"));
        let step = self.context.progress.step(title.clone());
        let block = self.branch(SOAK_PRIVATE_MIB, "4k", &[("--rounds", 0), ("--soak", branches)]).await?;
        step.done(title);
        block.soak.context("forkd-vmm bench-branch said nothing of the soak")
    }

    async fn branch(&self, private_mib: u64, pages: &str, arguments: &[(&str, u32)]) -> anyhow::Result<Block> {
        let mut command = Command::new(self.monitor);
        command.arg("bench-branch").arg("--private-mib").arg(private_mib.to_string()).args(["--pages", pages]);
        command.arg("--scratch").arg(self.scratch);
        for (name, value) in arguments {
            command.arg(name).arg(value.to_string());
        }
        let text = run(command, "forkd-vmm bench-branch").await?;
        serde_json::from_str(&text).with_context(|| format!("forkd-vmm bench-branch said: {}", text.trim()))
    }

    async fn limit(&self, memory_mib: u64, private_mib: u64, pages: &str, rounds: u32) -> anyhow::Result<Limit> {
        let mut command = Command::new(self.floor);
        command.args([memory_mib, private_mib, rounds.into()].map(|number| number.to_string())).arg(pages);
        let text = run(command, "the floor").await?;
        parse_limit(&text).with_context(|| format!("the floor said: {}", text.trim()))
    }
}

impl Row {
    fn new(private_mib: u64, pages: &'static str, blocks: &[Block], limits: &[Limit]) -> Self {
        let rounds: Vec<&Round> = blocks.iter().flat_map(|block| &block.rounds).collect();
        let milliseconds = |value: fn(&Round) -> f64| summarise(rounds.iter().map(|round| value(round) / 1e3));
        let pause = milliseconds(|round| round.pause_us);
        let fork = milliseconds(|round| round.fork_us);
        let running = milliseconds(|round| round.running_us);
        let of_limits = |value: fn(&Limit) -> f64| (!limits.is_empty()).then(|| median(limits.iter().map(value)));
        let limit_running_ms = of_limits(|limit| limit.running_ms);
        Self {
            private_mib,
            memory_mib: blocks.first().map_or(0, |block| block.memory_mib),
            pages,
            huge_mib: blocks.iter().map(|block| block.huge_mib).min().unwrap_or(0),
            runs: rounds.len(),
            pause_ms: pause.p50,
            fork_ms: fork.p50,
            ratio: pause.p50 / fork.p50,
            ratio_of_pairs: median(rounds.iter().map(|round| round.pause_us / round.fork_us)),
            running_ms: running.p50,
            limit_running_ms,
            running_ratio: limit_running_ms.map(|limit| running.p50 / limit),
            limit_pause_ms: of_limits(|limit| limit.pause_ms),
            in_a_row_ms: in_a_row(blocks),
            idle: None,
            dirtying: None,
            pause,
            fork,
            running,
            pause_stages_us: stage_medians(rounds.iter().map(|round| &round.pause_stages)),
            running_stages_us: stage_medians(rounds.iter().map(|round| &round.running_stages)),
        }
    }
}

impl Report {
    fn print(&self) -> anyhow::Result<()> {
        let mut table = output::table(&[
            "PRIVATE MiB",
            "PAGES",
            "PAUSE ms p50",
            "p90",
            "BARE FORK ms",
            "RATIO",
            "RUNNING ms p50",
            "p90",
            "BARE KVM ms",
            "RATIO",
            "1ST TO 10TH ms",
        ]);
        for row in &self.rows {
            let optional = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |value| format!("{value:.2}"));
            let ends = [row.in_a_row_ms.first(), row.in_a_row_ms.last()].map(|end| optional(end.copied()));
            table.add_row([
                row.private_mib.to_string(),
                row.pages.to_owned(),
                format!("{:.2}", row.pause_ms),
                format!("{:.2}", row.pause.p90),
                format!("{:.2}", row.fork_ms),
                format!("{:.2}", row.ratio),
                format!("{:.2}", row.running_ms),
                format!("{:.2}", row.running.p90),
                optional(row.limit_running_ms),
                optional(row.running_ratio),
                ends.join(" … "),
            ]);
        }
        output::print_table(&mut table)?;
        for row in &self.rows {
            if row.pages == "thp" && row.huge_mib * 10 < row.private_mib * 9 {
                let (huge, private) = (row.huge_mib, row.private_mib);
                output::line(format_args!("only {huge} of {private} MiB were in huge pages (thp)"))?;
            }
        }
        for skipped in &self.skipped {
            output::line(format_args!("skipped {} MiB private: {}", skipped.private_mib, skipped.reason))?;
        }
        if let Some(row) = self.rows.first() {
            let list = |stages: &[(String, f64)]| {
                stages.iter().map(|(name, us)| format!("{name} {us:.0}")).collect::<Vec<_>>().join(", ")
            };
            output::line(format_args!("stages with {} MiB in {} pages, µs", row.private_mib, row.pages))?;
            output::line(format_args!("  of the pause: {}", list(&row.pause_stages_us)))?;
            output::line(format_args!("  of the copy:  {}", list(&row.running_stages_us)))?;
        }
        gaps::print(self.rows.iter().flat_map(|row| {
            let modes = [(Mode::Idle, &row.idle), (Mode::Dirtying, &row.dirtying)];
            modes.into_iter().filter_map(|(mode, gaps)| Some((row.private_mib, row.pages, mode, gaps.as_ref()?)))
        }))?;
        if let Some(soak) = &self.soak {
            soak.print()?;
        }
        output::line(format_args!("{}\n{}", self.host.describe(), self.command))
    }
}

impl Soak {
    fn print(&self) -> anyhow::Result<()> {
        let mut table = output::table(&["BRANCHES", "PAUSE ms p50", "SOURCE RSS KiB", "DESCRIPTORS"]);
        for step in &self.steps {
            table.add_row([
                step.branches.to_string(),
                step.pause_us.map_or_else(|| "–".to_owned(), |us| format!("{:.2}", us / 1e3)),
                step.rss_kib.to_string(),
                step.descriptors.to_string(),
            ]);
        }
        output::print_table(&mut table)?;
        output::line(format_args!(
            "leaked after {} branches: {} descriptors, {} processes",
            self.branches, self.leaked_descriptors, self.leaked_processes
        ))
    }
}

/// Why a source with so much private memory would do this host harm. Each private page may have a page of a
/// file behind it until it is written.
fn too_large(private_mib: u64, available_mib: u64) -> Option<String> {
    let needed = 2 * private_mib + LEFT_MIB;
    (needed > available_mib).then(|| format!("{needed} MiB of available memory are needed, {available_mib} MiB are"))
}

/// Memory that can be had without swapping.
fn available_mib() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("could not read /proc/meminfo")?;
    let value = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next());
    let kib: u64 = value.and_then(|value| value.parse().ok()).context("/proc/meminfo has no MemAvailable")?;
    Ok(kib >> 10)
}

/// The medians in what the floor prints: `… pause_ms_p50=X … child_in_guest_ms_p50=Y …`.
fn parse_limit(text: &str) -> anyhow::Result<Limit> {
    let number = |name| field(text, name).and_then(|value| value.parse().ok());
    Ok(Limit {
        pause_ms: number("pause_ms_p50").context("it does not say how long the parent stood still")?,
        running_ms: number("child_in_guest_ms_p50").context("it does not say when the child ran")?,
    })
}

/// The median pause at each position of the series.
fn in_a_row(blocks: &[Block]) -> Vec<f64> {
    let length = blocks.iter().map(|block| block.in_a_row_us.len()).min().unwrap_or(0);
    (0..length).map(|position| median(blocks.iter().map(|block| block.in_a_row_us[position] / 1e3))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A block as the monitor prints it.
    fn block(rounds: &[(u32, u32, u32)], in_a_row: &[u32]) -> Block {
        let rounds: Vec<_> = rounds
            .iter()
            .map(|(pause, fork, running)| {
                serde_json::json!({
                    "pause_us": pause, "fork_us": fork, "running_us": running,
                    "pause_stages": [{"name": "quiesce", "us": 100}, {"name": "fork", "us": pause - 100}],
                    "running_stages": [{"name": "vcpus", "us": 7}],
                })
            })
            .collect();
        let text = serde_json::json!({
            "private_mib": 64, "memory_mib": 128, "pages": "4k", "huge_mib": 3, "rounds": rounds,
            "in_a_row_us": in_a_row, "soak": null,
        });
        serde_json::from_value(text).expect("whole")
    }

    #[test]
    fn a_row_compares_medians_over_all_blocks() {
        let blocks = [
            block(&[(1200, 1000, 3000), (9000, 1000, 4000)], &[1000, 2000]),
            block(&[(1500, 500, 8000)], &[3000, 4000]),
        ];
        let limits = [Limit { pause_ms: 1.0, running_ms: 2.0 }, Limit { pause_ms: 2.0, running_ms: 3.0 }];
        let row = Row::new(64, "4k", &blocks, &limits);
        assert_eq!((row.pause_ms, row.fork_ms, row.ratio, row.ratio_of_pairs), (1.5, 1.0, 1.5, 3.0));
        assert_eq!((row.running_ms, row.limit_running_ms, row.running_ratio), (4.0, Some(2.5), Some(1.6)));
        assert_eq!((row.limit_pause_ms, row.runs, row.memory_mib, row.huge_mib), (Some(1.5), 3, 128, 3));
        assert_eq!(row.in_a_row_ms, [2.0, 3.0]);
        assert_eq!(row.pause_stages_us, [("quiesce".to_owned(), 100.0), ("fork".to_owned(), 1400.0)]);
        let without = serde_json::to_value(Row::new(64, "4k", &blocks, &[])).expect("JSON");
        assert!(without["limit_running_ms"].is_null() && without["running_ratio"].is_null(), "{without}");
    }

    #[test]
    fn the_floor_is_read_and_missing_values_are_noticed() {
        let text = "rounds=5 wrong=0 mem_mib=128 private_mib=64 pages=thp pause_ms_p50=0.31 pause_ms_max=0.57 \
                    child_in_guest_ms_p50=1.23 child_in_guest_ms_max=3.93\n";
        assert_eq!(parse_limit(text).expect("whole"), Limit { pause_ms: 0.31, running_ms: 1.23 });
        assert!(parse_limit("pause_ms_p50=0.31").is_err() && parse_limit("").is_err());
    }

    #[test]
    fn a_source_that_would_crowd_out_the_host_is_refused() {
        assert_eq!(too_large(1024, 4096), None);
        assert!(too_large(1024, 4095).expect("refused").contains("4096 MiB"));
    }
}
