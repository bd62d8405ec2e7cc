//! What many branches of a real sandbox come to.

use std::fmt;

use serde::Serialize;

use super::super::Host;
use super::source::{Round, Seen};
use super::{BranchKind, stage_medians};
use crate::failure::advised;
use crate::output;
use crate::statistics::{Summary, summarise};

/// What the guest does meanwhile.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Mode {
    /// Nothing but measure.
    Idle,
    /// It writes to its private memory, over and over.
    Dirtying,
}

/// The figures for one size, mode and kind. Medians, if nothing else is said; gaps are the longest of each branch.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    private_mib: u64,
    /// Guest memory that differs from the snapshot before the first branch, as the host counts it.
    dirty_mib: Option<f64>,
    /// `4k` or `thp`.
    pages: &'static str,
    mode: Mode,
    kind: BranchKind,
    runs: usize,
    /// Branches of which nothing is known, and why.
    lost: Vec<String>,
    /// How long the source stood still, as its monitor timed it: quiesce, seal, fork.
    pause_ms: f64,
    /// What fork(2) took of that; of a checkpoint an older daemon does not say it.
    fork_ms: Option<f64>,
    /// `pause_ms` divided by `fork_ms`.
    ratio: Option<f64>,
    /// The longest gap of a ticker in the guest, from the request until its answer.
    gap_ms: f64,
    /// The same in an equally long time without a branch.
    usual_gap_ms: f64,
    /// `gap_ms` divided by `pause_ms`.
    gap_ratio: f64,
    /// The longest gap of a TCP peer outside the guest, from the request until its answer.
    tcp_gap_ms: f64,
    usual_tcp_gap_ms: f64,
    /// The ticker in the time after the answer, in which a snapshot is written.
    later_gap_ms: f64,
    usual_later_gap_ms: f64,
    later_tcp_gap_ms: f64,
    usual_later_tcp_gap_ms: f64,
    /// What the guest wrote to in the time after the answer, and without a branch.
    later_dirtied_mib_per_s: f64,
    usual_dirtied_mib_per_s: f64,
    /// From the request until the copy's agent had answered.
    answer_ms: Option<f64>,
    /// From the request until the snapshot was ready.
    written_ms: Option<f64>,
    /// Pause of each of ten branches in a row whose copies all stay; in one row of each size.
    in_a_row_ms: Vec<f64>,
    pause: Summary,
    fork: Option<Summary>,
    gap: Summary,
    tcp_gap: Summary,
    later_gap: Summary,
    answer: Option<Summary>,
    /// Medians of the stages of the pause, in the order they ran.
    pause_stages_us: Vec<(String, f64)>,
}

/// A size that was not measured.
#[derive(Debug, Serialize)]
pub(super) struct Skipped {
    pub(super) private_mib: u64,
    pub(super) reason: String,
}

/// The whole report.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) host: Host,
    pub(super) place: &'static str,
    pub(super) command: String,
    pub(super) rows: Vec<Row>,
    pub(super) skipped: Vec<Skipped>,
}

impl fmt::Display for Mode {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Idle => "idle",
            Self::Dirtying => "dirtying",
        })
    }
}

/// What a row is of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Subject {
    pub(super) private_mib: u64,
    pub(super) pages: &'static str,
    pub(super) mode: Mode,
    pub(super) kind: BranchKind,
}

impl Row {
    /// Sums up `rounds`; `lost` says why others brought no figures.
    pub(super) fn new(
        subject: Subject,
        dirty_bytes: Option<u64>,
        rounds: &[Round],
        lost: Vec<String>,
        in_a_row_us: &[u64],
    ) -> Self {
        let Subject { private_mib, pages, mode, kind } = subject;
        let of = |value: &dyn Fn(&Round) -> f64| summarise(rounds.iter().map(value));
        let tick = |pick: fn(&Round) -> &Seen| of(&|round| milliseconds(pick(round).stretch.longest_gap_us));
        let echo = |pick: fn(&Round) -> &Seen| of(&|round| pick(round).echo.as_secs_f64() * 1e3);
        let rate = |pick: fn(&Round) -> &Seen| of(&|round| pick(round).dirtied_mib_per_second()).p50;
        let pause = of(&|round| milliseconds(round.branch.pause_us));
        let fork = known(rounds.iter().filter_map(|round| {
            let stages = round.branch.stages.as_ref()?;
            Some(stages.get("fork")?.as_secs_f64() * 1e3)
        }));
        let answer = known(rounds.iter().filter_map(|round| round.branch.answered_us.map(milliseconds)));
        let written = known(rounds.iter().filter_map(|round| Some(round.written?.as_secs_f64() * 1e3)));
        let (gap, tcp_gap, later_gap) =
            (tick(|round| &round.during), echo(|round| &round.during), tick(|round| &round.later));
        Self {
            private_mib,
            dirty_mib: dirty_bytes.map(|bytes| bytes as f64 / (1 << 20) as f64),
            pages,
            mode,
            kind,
            runs: rounds.len(),
            lost,
            pause_ms: pause.p50,
            fork_ms: fork.map(|fork| fork.p50),
            ratio: fork.map(|fork| pause.p50 / fork.p50),
            gap_ms: gap.p50,
            usual_gap_ms: tick(|round| &round.quiet).p50,
            gap_ratio: gap.p50 / pause.p50,
            tcp_gap_ms: tcp_gap.p50,
            usual_tcp_gap_ms: echo(|round| &round.quiet).p50,
            later_gap_ms: later_gap.p50,
            usual_later_gap_ms: tick(|round| &round.quiet_later).p50,
            later_tcp_gap_ms: echo(|round| &round.later).p50,
            usual_later_tcp_gap_ms: echo(|round| &round.quiet_later).p50,
            later_dirtied_mib_per_s: rate(|round| &round.later),
            usual_dirtied_mib_per_s: rate(|round| &round.quiet_later),
            answer_ms: answer.map(|answer| answer.p50),
            written_ms: written.map(|written| written.p50),
            in_a_row_ms: in_a_row_us.iter().map(|us| milliseconds(*us)).collect(),
            pause,
            fork,
            gap,
            tcp_gap,
            later_gap,
            answer,
            pause_stages_us: stage_medians(rounds.iter().filter_map(|round| round.branch.stages.as_ref())),
        }
    }
}

fn milliseconds(us: u64) -> f64 {
    us as f64 / 1e3
}

/// A summary, if there is anything to sum up.
fn known(values: impl Iterator<Item = f64>) -> Option<Summary> {
    Some(summarise(values)).filter(|summary| summary.count > 0)
}

impl Report {
    /// Prints the tables.
    pub(super) fn print(&self) -> anyhow::Result<()> {
        let mut table = output::table(&[
            "PRIVATE MiB",
            "GUEST",
            "BRANCH",
            "PAUSE ms",
            "p90",
            "ITS FORK",
            "RATIO",
            "ANSWERS ms",
            "WRITTEN ms",
        ]);
        let optional = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), ms);
        for row in self.rows.iter().filter(|row| row.runs > 0) {
            table.add_row([
                row.private_mib.to_string(),
                row.mode.to_string(),
                row.kind.to_string(),
                ms(row.pause_ms),
                ms(row.pause.p90),
                optional(row.fork_ms),
                optional(row.ratio),
                optional(row.answer_ms),
                optional(row.written_ms),
            ]);
        }
        output::print_table(&mut table)?;
        output::line("\nlongest gap of a tick and of an echo in ms, and usually; MiB/s that the guest wrote to")?;
        self.print_gaps()?;
        for row in &self.rows {
            if !row.in_a_row_ms.is_empty() {
                let pauses: Vec<String> = row.in_a_row_ms.iter().map(|pause| ms(*pause)).collect();
                let size = row.private_mib;
                output::line(format_args!("in a row, {size} MiB, copies staying: {} ms", pauses.join(" ")))?;
            }
            for why in &row.lost {
                let (size, mode, kind) = (row.private_mib, row.mode, row.kind);
                output::line(format_args!("lost, {size} MiB, {mode}, {kind}: {why}"))?;
            }
        }
        for skipped in &self.skipped {
            output::line(format_args!("skipped {} MiB private: {}", skipped.private_mib, skipped.reason))?;
        }
        output::line(format_args!("\n{}, in {}\n{}", self.host.describe(), self.place, self.command))
    }

    fn print_gaps(&self) -> anyhow::Result<()> {
        let mut table = output::table(&[
            "PRIVATE MiB",
            "GUEST",
            "BRANCH",
            "TICK",
            "USUALLY",
            "ECHO",
            "USUALLY",
            "LATER: TICK",
            "USUALLY",
            "ECHO",
            "USUALLY",
            "WRITES",
            "USUALLY",
        ]);
        for row in self.rows.iter().filter(|row| row.runs > 0) {
            let figures = [
                row.gap_ms,
                row.usual_gap_ms,
                row.tcp_gap_ms,
                row.usual_tcp_gap_ms,
                row.later_gap_ms,
                row.usual_later_gap_ms,
                row.later_tcp_gap_ms,
                row.usual_later_tcp_gap_ms,
                row.later_dirtied_mib_per_s,
                row.usual_dirtied_mib_per_s,
            ];
            let subject = [row.private_mib.to_string(), row.mode.to_string(), row.kind.to_string()];
            table.add_row(subject.into_iter().chain(figures.map(ms)));
        }
        output::print_table(&mut table)
    }

    /// Whether every row has figures.
    pub(super) fn verdict(&self) -> anyhow::Result<()> {
        match self.rows.iter().find(|row| row.runs == 0) {
            Some(row) => {
                let (size, mode, kind, lost) = (row.private_mib, row.mode, row.kind, row.lost.len());
                let error = anyhow::anyhow!("all {lost} runs of {kind} with {size} MiB private, {mode}, were lost");
                Err(advised(error, "forkd doctor"))
            }
            None => Ok(()),
        }
    }
}

/// Two decimals.
fn ms(value: f64) -> String {
    format!("{value:.2}")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use forkd_proto::meter::Stretch;
    use forkd_types::StageTimings;

    use super::super::source::Branch;
    use super::*;

    fn seen(gap_us: u64) -> Seen {
        let stretch = Stretch { us: 1_000_000, ticks: 900, longest_gap_us: gap_us, dirtied_pages: 25_600 };
        Seen { stretch, echo: Duration::from_micros(2 * gap_us) }
    }

    fn round(pause_us: u64, fork_us: Option<u64>) -> Round {
        let stages = fork_us.map(|fork_us| {
            let mut stages = StageTimings::default();
            stages.record("quiesce", Duration::from_micros(pause_us - fork_us));
            stages.record("fork", Duration::from_micros(fork_us));
            stages
        });
        let branch = Branch { pause_us, stages, answered_us: fork_us.map(|_| 5000) };
        let (during, later, quiet, quiet_later) = (seen(pause_us + 1000), seen(1500), seen(1100), seen(1200));
        Round { branch, during, later, quiet, quiet_later, written: None }
    }

    fn row(rounds: &[Round], lost: Vec<String>) -> Row {
        let subject = Subject { private_mib: 64, pages: "4k", mode: Mode::Dirtying, kind: BranchKind::Copy };
        Row::new(subject, Some(96 << 20), rounds, lost, &[1000, 2000])
    }

    #[test]
    fn a_row_compares_medians_of_what_was_seen() {
        let row = row(&[round(2000, Some(1000)), round(3000, Some(2000)), round(9000, Some(2500))], Vec::new());
        assert_eq!((row.runs, row.pause_ms, row.fork_ms, row.ratio), (3, 3.0, Some(2.0), Some(1.5)));
        assert_eq!((row.gap_ms, row.usual_gap_ms, row.gap_ratio), (4.0, 1.1, 4.0 / 3.0));
        assert_eq!((row.tcp_gap_ms, row.usual_tcp_gap_ms), (8.0, 2.2));
        assert_eq!((row.later_gap_ms, row.usual_later_gap_ms, row.later_tcp_gap_ms), (1.5, 1.2, 3.0));
        assert_eq!((row.later_dirtied_mib_per_s, row.dirty_mib), (100.0, Some(96.0)));
        assert_eq!((row.answer_ms, row.written_ms), (Some(5.0), None));
        assert_eq!(row.in_a_row_ms, [1.0, 2.0]);
        assert_eq!(row.pause_stages_us, [("quiesce".to_owned(), 1000.0), ("fork".to_owned(), 2000.0)]);
        let json = serde_json::to_value(&row).expect("JSON");
        assert_eq!((&json["mode"], &json["kind"]), (&"dirtying".into(), &"copy".into()));
    }

    #[test]
    fn what_is_not_known_is_absent_and_a_row_without_figures_is_a_failure() {
        let json = serde_json::to_value(row(&[round(2000, None)], Vec::new())).expect("JSON");
        assert!(json["fork_ms"].is_null() && json["ratio"].is_null() && json["answer_ms"].is_null(), "{json}");
        let report = |rows| {
            let (host, command) = (Host::here(), String::new());
            Report { host, place: "here", command, rows, skipped: Vec::new() }
        };
        assert!(report(vec![row(&[round(2000, None)], vec!["gone".to_owned()])]).verdict().is_ok());
        let verdict = report(vec![row(&[], vec!["gone".to_owned()])]).verdict().expect_err("nothing was measured");
        assert_eq!(verdict.to_string(), "all 1 runs of copy with 64 MiB private, dirtying, were lost");
    }
}
