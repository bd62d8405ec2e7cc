//! What many runs of one fan-out come to.

use forkd_types::rest::{SandboxMemory, SpawnFailure};
use serde::Serialize;

use super::super::Host;
use super::super::chart::Chart;
use crate::failure::advised;
use crate::measurement::{self, Child};
use crate::output;
use crate::statistics::{Summary, median, summarise};

/// One run's raw figures.
pub(super) struct Run {
    /// Those that came up.
    pub(super) children: Vec<Child>,
    /// Those that did not.
    pub(super) not_born: Vec<SpawnFailure>,
    /// Memory available on the daemon's host before the run, when the children were up, and after their
    /// evaluations.
    pub(super) available: [Option<u64>; 3],
}

impl Run {
    /// Whether a child did not come up or did not evaluate.
    pub(super) fn has_failures(&self) -> bool {
        !self.not_born.is_empty() || self.children.iter().any(|child| child.first.error.is_some())
    }
}

/// The figures for one number of children, of the children that answered.
#[derive(Debug, Serialize)]
pub(super) struct Figures {
    n: u32,
    runs: u32,
    /// Children that were asked for, `n` × `runs`, and did not come up: those of lost runs too.
    not_born: usize,
    /// Children that answered.
    alive: usize,
    /// Children that answered and whose first evaluation failed or took too long.
    eval_failures: usize,
    /// Runs of which nothing is known because the daemon or its machine went away, and why.
    lost_runs: Vec<String>,
    /// Every child that failed, and why.
    failures: Vec<Failure>,
    /// Request until the last agent had answered, per run.
    all_answered_ms: Summary,
    /// Request until a child's agent had answered, per child.
    answered_ms: Summary,
    /// The first evaluation, per child, while all siblings do theirs.
    first_eval_ms: Summary,
    /// The longest of the first evaluations, which run at the same time, per run.
    all_evaluated_ms: Summary,
    stages: Vec<Stage>,
    at_birth: Memory,
    after_first_eval: Memory,
}

/// One child that failed.
#[derive(Debug, Serialize)]
struct Failure {
    id: String,
    /// `birth` or `first_eval`.
    stage: &'static str,
    error: String,
}

/// One stage over all children.
#[derive(Debug, Serialize)]
struct Stage {
    name: String,
    ms: Summary,
}

/// What children cost, MiB: medians per child, and what the host lost per child.
#[derive(Debug, Serialize)]
struct Memory {
    pss_mib: f64,
    private_mib: f64,
    page_table_mib: f64,
    guest_dirty_mib: f64,
    /// Fall of the host's available memory per child; absent where the host cannot be asked.
    host_delta_mib: Option<f64>,
}

/// The whole report.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) host: Host,
    pub(super) place: &'static str,
    pub(super) command: String,
    pub(super) results: Vec<Figures>,
}

impl Figures {
    /// Sums up `runs` of `n` children; `lost` are the runs that brought no figures.
    pub(super) fn of(n: u32, runs: &[Run], lost: Vec<String>) -> Self {
        let children = || runs.iter().flat_map(|run| &run.children);
        let evaluated = || children().filter(|child| child.first.error.is_none());
        let ms = |us: u64| us as f64 / 1e3;
        let last = |times: &dyn Fn(&Child) -> Option<u64>| {
            summarise(runs.iter().filter_map(|run| run.children.iter().filter_map(times).max()).map(ms))
        };
        let evaluated_us = |child: &Child| child.first.error.is_none().then_some(child.first.us);
        let stages = measurement::stages(children().map(|child| &child.timings)).into_iter();
        let asked = n as usize * (runs.len() + lost.len());
        let alive = children().count();
        Self {
            n,
            runs: (runs.len() + lost.len()) as u32,
            not_born: asked - alive,
            alive,
            eval_failures: alive - evaluated().count(),
            lost_runs: lost,
            failures: runs.iter().flat_map(failures).collect(),
            all_answered_ms: last(&|child| Some(child.timings.answered_us)),
            answered_ms: summarise(children().map(|child| ms(child.timings.answered_us))),
            first_eval_ms: summarise(children().filter_map(evaluated_us).map(ms)),
            all_evaluated_ms: last(&evaluated_us),
            stages: stages.map(|(name, us)| Stage { name, ms: summarise(us.into_iter().map(ms)) }).collect(),
            at_birth: Memory::of(children().filter_map(|child| child.at_birth.clone()), runs, 1),
            after_first_eval: Memory::of(evaluated().filter_map(|child| child.after_eval.clone()), runs, 2),
        }
    }

    /// How many children were asked for.
    fn asked(&self) -> usize {
        self.alive + self.not_born
    }
}

/// The failed children of one run.
fn failures(run: &Run) -> Vec<Failure> {
    let not_born = run.not_born.iter().map(|failure| Failure {
        id: failure.id.to_string(),
        stage: "birth",
        error: failure.error.clone(),
    });
    let failed = run.children.iter().filter_map(|child| {
        let error = child.first.error.clone()?;
        Some(Failure { id: child.id.to_string(), stage: "first_eval", error })
    });
    not_born.chain(failed).collect()
}

impl Memory {
    /// `point` is the place in [`Run::available`].
    fn of(children: impl Iterator<Item = SandboxMemory>, runs: &[Run], point: usize) -> Self {
        let mib = |bytes: f64| bytes / (1u64 << 20) as f64;
        let children: Vec<_> = children.collect();
        let per_child = |pick: fn(&SandboxMemory) -> u64| mib(median(children.iter().map(|one| pick(one) as f64)));
        let deltas: Vec<f64> = runs
            .iter()
            .filter(|run| !run.children.is_empty())
            .filter_map(|run| {
                Some((run.available[0]? as f64 - run.available[point]? as f64) / run.children.len() as f64)
            })
            .collect();
        Self {
            pss_mib: per_child(|memory| memory.pss_bytes),
            private_mib: per_child(|memory| memory.private_bytes),
            page_table_mib: per_child(|memory| memory.page_table_bytes),
            guest_dirty_mib: per_child(|memory| memory.guest_dirty_bytes),
            host_delta_mib: (!deltas.is_empty()).then(|| mib(median(deltas))),
        }
    }
}

impl Report {
    /// Prints the tables.
    pub(super) fn print(&self) -> anyhow::Result<()> {
        let mut times = output::table(&["CHILDREN", "ALIVE", "TIME ms", "p50", "p90", "p99", "max"]);
        for result in &self.results {
            let alive = format!("{}/{}", result.alive, result.asked());
            for (index, (name, summary)) in [
                ("all agents answered", &result.all_answered_ms),
                ("one agent answered", &result.answered_ms),
                ("first evaluation of one", &result.first_eval_ms),
                ("first evaluation of all", &result.all_evaluated_ms),
            ]
            .into_iter()
            .enumerate()
            {
                let (n, alive) = if index == 0 { (result.n.to_string(), alive.clone()) } else { Default::default() };
                times.add_row([
                    n,
                    alive,
                    name.to_owned(),
                    ms(summary.p50),
                    ms(summary.p90),
                    ms(summary.p99),
                    ms(summary.max),
                ]);
            }
        }
        output::print_table(&mut times)?;
        output::line("")?;
        self.print_memory()?;
        if let Some(largest) = self.results.iter().max_by_key(|result| result.n) {
            output::line(format_args!("\nstages of one of {} children, ms:", largest.n))?;
            let mut stages = output::table(&["STAGE", "p50", "p90", "p99"]);
            for stage in &largest.stages {
                stages.add_row([stage.name.clone(), ms(stage.ms.p50), ms(stage.ms.p90), ms(stage.ms.p99)]);
            }
            output::print_table(&mut stages)?;
        }
        output::line(format_args!("\n{}, in {}\n{}", self.host.describe(), self.place, self.command))
    }

    fn print_memory(&self) -> anyhow::Result<()> {
        let mut table =
            output::table(&["CHILDREN", "MEMORY MiB/CHILD", "PSS", "PRIVATE", "PAGE TABLES", "GUEST DIRTY", "HOST"]);
        for result in &self.results {
            for (n, when, memory) in [
                (result.n.to_string(), "at birth", &result.at_birth),
                (String::new(), "after first evaluation", &result.after_first_eval),
            ] {
                table.add_row([
                    n,
                    when.to_owned(),
                    ms(memory.pss_mib),
                    ms(memory.private_mib),
                    ms(memory.page_table_mib),
                    ms(memory.guest_dirty_mib),
                    memory.host_delta_mib.map_or_else(|| "—".to_owned(), ms),
                ]);
            }
        }
        output::print_table(&mut table)
    }

    /// The medians as bars.
    pub(super) fn chart(&self) -> String {
        let groups: Vec<(String, Vec<f64>)> = self
            .results
            .iter()
            .map(|result| (result.n.to_string(), vec![result.all_answered_ms.p50, result.all_evaluated_ms.p50]))
            .collect();
        Chart {
            title: "N Linux guests with numpy, forked from one snapshot",
            notes: &[format!("{}, in {}", self.host.describe(), self.place), self.command.clone()],
            unit: "ms",
            series: &["all agents answered", "then: first evaluation of all"],
            groups: &groups,
        }
        .svg()
    }

    /// Whether every child of every run lived and evaluated.
    pub(super) fn verdict(&self) -> anyhow::Result<()> {
        for result in &self.results {
            if result.not_born > 0 || result.eval_failures > 0 {
                let error = anyhow::anyhow!(
                    "of {} children (n={}), {} did not come up and {} could not evaluate",
                    result.asked(),
                    result.n,
                    result.not_born,
                    result.eval_failures
                );
                return Err(advised(error, "forkd doctor"));
            }
        }
        Ok(())
    }
}

/// Two decimals.
fn ms(value: f64) -> String {
    format!("{value:.2}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measurement::Evaluation;
    use forkd_types::rest::SpawnTimings;
    use forkd_types::{SandboxId, StageTimings};

    fn child(sequence: u64, answered_us: u64, first: Result<u64, &str>) -> Child {
        let id = SandboxId::new(1, sequence);
        let (us, error) = match first {
            Ok(us) => (us, None),
            Err(error) => (135_000_000, Some(error.to_owned())),
        };
        let memory = |bytes| SandboxMemory {
            pss_bytes: bytes,
            private_bytes: bytes,
            page_table_bytes: 0,
            guest_dirty_bytes: bytes,
        };
        Child {
            id: id.clone(),
            timings: SpawnTimings { id, answered_us, stages: StageTimings::default() },
            at_birth: Some(memory(1 << 20)),
            first: Evaluation { result: String::new(), stdout: String::new(), us, error: error.clone() },
            after_eval: Some(memory(if error.is_some() { 64 << 20 } else { 2 << 20 })),
        }
    }

    fn report(results: Vec<Figures>) -> Report {
        Report { host: Host::here(), place: "here", command: String::new(), results }
    }

    #[test]
    fn failures_are_counted_and_kept_out_of_the_figures() {
        let whole = Run {
            children: vec![child(0, 2000, Ok(1000)), child(1, 4000, Ok(3000)), child(2, 3000, Ok(2000))],
            not_born: Vec::new(),
            available: [Some(30 << 20), Some(24 << 20), None],
        };
        let broken = Run {
            children: vec![child(3, 2000, Ok(1000)), child(4, 6000, Err("no answer within 135 s"))],
            not_born: vec![SpawnFailure { id: SandboxId::new(1, 5), error: "its monitor ended".to_owned() }],
            available: [Some(30 << 20), Some(28 << 20), None],
        };
        let figures = Figures::of(3, &[whole, broken], vec!["the machine ended".to_owned()]);
        assert_eq!((figures.runs, figures.asked(), figures.alive), (3, 9, 5));
        assert_eq!((figures.not_born, figures.eval_failures), (4, 1));
        assert_eq!(figures.failures.iter().map(|failure| failure.stage).collect::<Vec<_>>(), ["birth", "first_eval"]);
        assert_eq!(figures.answered_ms.max, 6.0);
        assert_eq!((figures.first_eval_ms.count, figures.first_eval_ms.max), (4, 3.0));
        assert_eq!((figures.all_evaluated_ms.count, figures.all_evaluated_ms.max), (2, 3.0));
        assert_eq!(figures.after_first_eval.private_mib, 2.0);
        // Two of three children, then one of two: what a child cost, not what it would have cost with all alive.
        assert_eq!(figures.at_birth.host_delta_mib, Some(1.5));
        let verdict = report(vec![figures]).verdict().expect_err("not everything went well").to_string();
        assert_eq!(verdict, "of 9 children (n=3), 4 did not come up and 1 could not evaluate");
    }

    #[test]
    fn nothing_but_lost_runs_is_still_a_report() {
        let figures = Figures::of(10, &[], vec!["gone".to_owned(), "gone again".to_owned()]);
        assert_eq!((figures.asked(), figures.alive, figures.not_born), (20, 0, 20));
        assert_eq!(figures.at_birth.host_delta_mib, None);
        assert!(report(vec![figures]).verdict().is_err());
    }
}
