//! `bench spawn`: real children, until their agent answered and until their first evaluation.
//!
//! A child that does not come up, or does not answer in time, is counted and named in the report; the
//! figures are those of the children that did. A run whose request itself failed, because the daemon or
//! its machine went away, is counted too, and the next one brings them up again.

mod report;

use std::future::Future;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use forkd_types::Tag;
use forkd_types::rest::SPAWN_LIMIT;

use super::Host;
use crate::children::Children;
use crate::commands::spawn::ChildOptions;
use crate::commands::{Context, spawn_error};
use crate::endpoint::{Endpoint, Place};
use crate::interrupt::{Interrupted, Interrupts};
use crate::measurement::{CHILD_LIMIT, Manner, measure};
use crate::{machine, output, units};
use report::{Figures, Report, Run};

/// Evaluated first in every child.
const DEFAULT_CODE: &str = "numpy.zeros(5).tolist()";

/// The daemon gives a child up by itself, in a machine after five minutes. A request that takes longer than
/// this and what many children may add is not slow: nobody will answer it.
const REQUEST_LIMIT: Duration = Duration::from_secs(330);
const REQUEST_LIMIT_PER_CHILD: Duration = Duration::from_secs(6);

/// How long the daemon's host may take over a question about its memory.
const MEMINFO_LIMIT: Duration = Duration::from_secs(10);

/// Arguments of `forkd bench spawn`.
#[derive(Args, Debug)]
pub(crate) struct SpawnBenchArgs {
    /// The snapshot to fork
    #[arg(long, default_value = "quickstart")]
    tag: Tag,
    /// Children per run; may be given several times
    #[arg(short, long, default_values_t = [1, 10, 100], value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=i64::from(SPAWN_LIMIT)))]
    n: Vec<u32>,
    /// How often
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// What each child evaluates first, in Python
    #[arg(long, value_name = "SOURCE", default_value = DEFAULT_CODE)]
    code: String,
    /// What a child may take over its first evaluation before it counts as failed
    #[arg(long, value_name = "SECONDS", default_value_t = CHILD_LIMIT.as_secs(), value_parser = clap::value_parser!(u64).range(1..=3600))]
    child_timeout: u64,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Write a bar chart
    #[arg(long, value_name = "FILE.svg")]
    chart: Option<PathBuf>,
    #[command(flatten)]
    options: ChildOptions,
}

impl SpawnBenchArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let mut interrupts = Interrupts::catch()?;
        // What fails now is not a measurement but a mistake, or a host that cannot do it.
        let first = self.make_ready(&mut interrupts, context).await?;
        let place = first.place.describe();
        let mut endpoint = Some(first);
        let mut results = Vec::new();
        for &n in &self.n {
            let title = format!("n={n}, {}", units::count(self.runs as usize, "run"));
            let step = context.progress.step(&title);
            step.set_items(self.runs.into());
            let (mut runs, mut lost) = (Vec::new(), Vec::new());
            for number in 1..=self.runs {
                match self.attempt(n, &mut endpoint, &mut interrupts, context).await {
                    Ok(run) => {
                        // The daemon, or the machine it is in, may have gone with the children.
                        endpoint = endpoint.filter(|_| !run.has_failures());
                        runs.push(run);
                    }
                    Err(error) if error.is::<Interrupted>() => return Err(error),
                    Err(error) => {
                        context.progress.warn(format_args!("run {number} of n={n} is lost: {error:#}"));
                        lost.push(format!("{error:#}"));
                        endpoint = None;
                    }
                }
                step.set_position(number.into());
            }
            step.done(title);
            results.push(Figures::of(n, &runs, lost));
        }
        let report = Report { host: Host::here(), place, command: self.command(), results };
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

    /// A daemon whose zygote is warm: its start would be measured into the first run.
    async fn make_ready(&self, interrupts: &mut Interrupts, context: &Context) -> anyhow::Result<Endpoint> {
        let endpoint = interrupts.guard(context.endpoint()).await?;
        self.one_run(1, &endpoint, interrupts, context).await?;
        Ok(endpoint)
    }

    /// One run, by the daemon at `endpoint`, or by one that is found or started where it was lost.
    async fn attempt(
        &self,
        n: u32,
        endpoint: &mut Option<Endpoint>,
        interrupts: &mut Interrupts,
        context: &Context,
    ) -> anyhow::Result<Run> {
        let daemon = match endpoint.take() {
            Some(daemon) => daemon,
            None => self.make_ready(interrupts, context).await?,
        };
        self.one_run(n, endpoint.insert(daemon), interrupts, context).await
    }

    async fn one_run(
        &self,
        n: u32,
        endpoint: &Endpoint,
        interrupts: &mut Interrupts,
        context: &Context,
    ) -> anyhow::Result<Run> {
        let client = &endpoint.client;
        let manner = Manner::of(endpoint.place, Duration::from_secs(self.child_timeout));
        let before = available_bytes(endpoint, context).await;
        let request = self.options.request(&self.tag, n);
        let spawning = Children::spawn(client, &request, interrupts, &context.progress);
        let children = within(REQUEST_LIMIT + REQUEST_LIMIT_PER_CHILD * n, "say what it forked", spawning).await?;
        let children = children.map_err(spawn_error)?;
        let failures = children.report().failures.clone();
        for failure in &failures {
            context.progress.warn(format_args!("{}: {}", failure.id, failure.error));
        }
        let measured = {
            let work = async {
                let born = available_bytes(endpoint, context).await;
                let (measured, _) = measure(client, &children, &self.code, manner, &context.progress).await;
                let after = available_bytes(endpoint, context).await;
                Ok(Run { children: measured, not_born: failures, available: [before, born, after] })
            };
            interrupts.guard(work).await
        };
        within(REQUEST_LIMIT, "end the children", children.kill()).await?;
        measured
    }

    fn command(&self) -> String {
        let counts: String = self.n.iter().map(|n| format!(" --n {n}")).collect();
        format!("forkd bench spawn --tag {}{counts} --runs {}", self.tag, self.runs)
    }
}

/// Waits for the daemon, but not for ever.
async fn within<T>(limit: Duration, what: &str, work: impl Future<Output = T>) -> anyhow::Result<T> {
    let late = |_| anyhow::anyhow!("the daemon did not {what} within {} s", limit.as_secs());
    tokio::time::timeout(limit, work).await.map_err(late)
}

/// Memory available on the daemon's host.
async fn available_bytes(endpoint: &Endpoint, context: &Context) -> Option<u64> {
    let meminfo = match endpoint.place {
        Place::Local => std::fs::read_to_string("/proc/meminfo").ok()?,
        Place::Machine => {
            let reading = machine::read_file(&context.data, "/proc/meminfo");
            tokio::time::timeout(MEMINFO_LIMIT, reading).await.ok()?.ok()?
        }
        Place::Given => return None,
    };
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}
