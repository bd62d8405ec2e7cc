//! `bench spawn`: real children, until their agent answered and until their first evaluation.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use forkd_types::Tag;
use forkd_types::rest::{SPAWN_LIMIT, SandboxMemory};
use serde::Serialize;

use super::Host;
use super::chart::Chart;
use crate::children::Children;
use crate::commands::spawn::ChildOptions;
use crate::commands::{Context, spawn_error};
use crate::endpoint::{Endpoint, Place};
use crate::failure::advised;
use crate::interrupt::Interrupts;
use crate::measurement::{self, Child, measure};
use crate::statistics::{Summary, median, summarise};
use crate::{machine, output, units};

/// Evaluated first in every child.
const DEFAULT_CODE: &str = "numpy.zeros(5).tolist()";

/// Arguments of `forkd bench spawn`.
#[derive(Args, Debug)]
pub(crate) struct SpawnBenchArgs {
    /// The snapshot to fork
    #[arg(long, default_value = "quickstart")]
    tag: Tag,
    /// Children per run; may be given several times
    #[arg(short, long, default_values_t = [1, 10, 100], value_parser = clap::value_parser!(u32).range(1..=i64::from(SPAWN_LIMIT)))]
    n: Vec<u32>,
    /// How often
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// What each child evaluates first, in Python
    #[arg(long, value_name = "SOURCE", default_value = DEFAULT_CODE)]
    code: String,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Write a bar chart
    #[arg(long, value_name = "FILE.svg")]
    chart: Option<PathBuf>,
    #[command(flatten)]
    options: ChildOptions,
}

/// The figures for one number of children.
#[derive(Debug, Serialize)]
struct Result {
    n: u32,
    runs: u32,
    /// Children that answered, of `n` × `runs`.
    alive: usize,
    /// Children whose first evaluation failed.
    eval_failures: usize,
    /// Request until the last agent had answered, per run.
    all_answered_ms: Summary,
    /// Request until a child's agent had answered, per child.
    answered_ms: Summary,
    /// The first evaluation, per child, while all siblings do theirs.
    first_eval_ms: Summary,
    /// First evaluations, from the first sent to the last answered, per run.
    all_evaluated_ms: Summary,
    stages: Vec<Stage>,
    at_birth: Memory,
    after_first_eval: Memory,
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
struct Report {
    host: Host,
    place: &'static str,
    command: String,
    results: Vec<Result>,
}

/// One run's raw figures.
struct Run {
    children: Vec<Child>,
    total_us: u64,
    evaluated_us: u64,
    available: [Option<u64>; 3],
}

impl SpawnBenchArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let mut interrupts = Interrupts::catch()?;
        let endpoint = interrupts.guard(context.endpoint()).await?;
        let mut results = Vec::new();
        // A zygote that is not warm would be measured into the first run.
        self.one_run(1, &endpoint, &mut interrupts, context).await?;
        for &n in &self.n {
            let step = context.progress.step(format!("n={n}, {}", units::count(self.runs as usize, "run")));
            let mut runs = Vec::new();
            for _ in 0..self.runs {
                runs.push(self.one_run(n, &endpoint, &mut interrupts, context).await?);
            }
            step.done(format_args!("n={n}, {}", units::count(self.runs as usize, "run")));
            results.push(summary(n, &runs));
        }
        let report = Report { host: Host::here(), place: endpoint.place.describe(), command: self.command(), results };
        if let Some(path) = &self.chart {
            std::fs::write(path, report.chart()).with_context(|| format!("could not write {}", path.display()))?;
            context.progress.say(format_args!("✓ Chart in {}", path.display()));
        }
        if self.json {
            output::json(&report)?
        } else {
            report.print()?
        }
        report.verdict().map(|()| 0)
    }

    async fn one_run(
        &self,
        n: u32,
        endpoint: &Endpoint,
        interrupts: &mut Interrupts,
        context: &Context,
    ) -> anyhow::Result<Run> {
        let client = &endpoint.client;
        let before = available_bytes(endpoint, context).await;
        let request = self.options.request(&self.tag, n);
        let children = Children::spawn(client, &request, interrupts, &context.progress).await.map_err(spawn_error)?;
        let total_us = children.report().total_us;
        for failure in &children.report().failures {
            context.progress.warn(format_args!("{}: {}", failure.id, failure.error));
        }
        let measured = {
            let work = async {
                let born = available_bytes(endpoint, context).await;
                let (measured, evaluated_us) = measure(client, &children, &self.code, &context.progress).await?;
                let after = available_bytes(endpoint, context).await;
                Ok(Run { children: measured, total_us, evaluated_us, available: [before, born, after] })
            };
            interrupts.guard(work).await
        };
        children.kill().await;
        measured
    }

    fn command(&self) -> String {
        let counts: String = self.n.iter().map(|n| format!(" --n {n}")).collect();
        format!("forkd bench spawn --tag {}{counts} --runs {}", self.tag, self.runs)
    }
}

/// Memory available on the daemon's host.
async fn available_bytes(endpoint: &Endpoint, context: &Context) -> Option<u64> {
    let meminfo = match endpoint.place {
        Place::Local => std::fs::read_to_string("/proc/meminfo").ok()?,
        Place::Machine => machine::read_file(&context.data, "/proc/meminfo").await.ok()?,
        Place::Given => return None,
    };
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

fn summary(n: u32, runs: &[Run]) -> Result {
    let children = || runs.iter().flat_map(|run| &run.children);
    let ms = |us: u64| us as f64 / 1e3;
    let stages = measurement::stages(children().map(|child| &child.timings)).into_iter();
    Result {
        n,
        runs: runs.len() as u32,
        alive: children().count(),
        eval_failures: children().filter(|child| child.first.error.is_some()).count(),
        all_answered_ms: summarise(runs.iter().map(|run| ms(run.total_us))),
        answered_ms: summarise(children().map(|child| ms(child.timings.answered_us))),
        first_eval_ms: summarise(children().map(|child| ms(child.first.us))),
        all_evaluated_ms: summarise(runs.iter().map(|run| ms(run.evaluated_us))),
        stages: stages.map(|(name, us)| Stage { name, ms: summarise(us.into_iter().map(ms)) }).collect(),
        at_birth: memory(n, children().filter_map(|child| child.at_birth.as_ref()), runs, 1),
        after_first_eval: memory(n, children().filter_map(|child| child.after_eval.as_ref()), runs, 2),
    }
}

fn memory<'a>(n: u32, of: impl Iterator<Item = &'a SandboxMemory> + Clone, runs: &[Run], point: usize) -> Memory {
    let mib = |bytes: f64| bytes / (1u64 << 20) as f64;
    let per_child = |pick: fn(&SandboxMemory) -> u64| mib(median(of.clone().map(|memory| pick(memory) as f64)));
    let deltas: Vec<f64> = runs
        .iter()
        .filter_map(|run| Some((run.available[0]? as f64 - run.available[point]? as f64) / f64::from(n)))
        .collect();
    Memory {
        pss_mib: per_child(|memory| memory.pss_bytes),
        private_mib: per_child(|memory| memory.private_bytes),
        page_table_mib: per_child(|memory| memory.page_table_bytes),
        guest_dirty_mib: per_child(|memory| memory.guest_dirty_bytes),
        host_delta_mib: (!deltas.is_empty()).then(|| mib(median(deltas))),
    }
}

impl Report {
    fn print(&self) -> anyhow::Result<()> {
        let mut times = output::table(&["CHILDREN", "ALIVE", "TIME ms", "p50", "p90", "p99", "max"]);
        for result in &self.results {
            let alive = format!("{}/{}", result.alive, result.n * result.runs);
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

    fn chart(&self) -> String {
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
    fn verdict(&self) -> anyhow::Result<()> {
        for result in &self.results {
            let asked = (result.n * result.runs) as usize;
            if result.alive < asked || result.eval_failures > 0 {
                let error = anyhow::anyhow!(
                    "of {asked} children (n={}), {} did not come up and {} could not evaluate",
                    result.n,
                    asked - result.alive,
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
