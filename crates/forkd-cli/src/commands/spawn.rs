//! `spawn`: fork children that stay.

use clap::Args;
use forkd_types::Tag;
use forkd_types::rest::{AutoCheckpoint, SPAWN_LIMIT, SpawnReport, SpawnRequest};

use super::workspace::LifetimeOptions;
use super::{Context, snapshot_error};
use crate::failure::advised;
use crate::limits::LimitOptions;
use crate::progress::Progress;
use crate::{children, output, units};

/// What one spawn asks for; shared by the verbs that fork.
#[derive(Args, Debug, Clone)]
pub(crate) struct ChildOptions {
    /// Give each child its own network namespace
    #[arg(long)]
    pub(crate) per_child_netns: bool,
    /// Memory limit of each child
    #[arg(long, value_name = "MIB")]
    pub(crate) memory_limit_mib: Option<u64>,
    /// Back the snapshot's memory with huge pages
    #[arg(long)]
    pub(crate) hugepages: bool,
    /// Take a checkpoint of a child before each of these: exec, every program and evaluation
    #[arg(long, value_name = "WHEN", value_parser = auto_checkpoint)]
    pub(crate) auto_checkpoint: Option<AutoCheckpoint>,
    #[command(flatten)]
    limits: LimitOptions,
    #[command(flatten)]
    pub(crate) lifetime: LifetimeOptions,
    /// Accepted for existing scripts: every child can be branched while it runs
    #[arg(long, hide = true)]
    live_fork: bool,
    /// Accepted for existing scripts: children need no warming
    #[arg(long, hide = true)]
    prewarm: bool,
}

impl ChildOptions {
    /// The request for `n` children of `tag`.
    pub(crate) fn request(&self, tag: &Tag, n: u32) -> SpawnRequest {
        SpawnRequest {
            per_child_netns: self.per_child_netns,
            memory_limit_mib: self.memory_limit_mib,
            prewarm: self.prewarm,
            live_fork: self.live_fork,
            hugepages: self.hugepages,
            auto_checkpoint: self.auto_checkpoint,
            timeout_secs: self.lifetime.timeout_secs,
            on_timeout: self.lifetime.on_timeout,
            limits: self.limits.all(),
            ..SpawnRequest::of(tag, n)
        }
    }
}

fn auto_checkpoint(text: &str) -> Result<AutoCheckpoint, String> {
    match text {
        "exec" => Ok(AutoCheckpoint::Exec),
        _ => Err("there is only exec".to_owned()),
    }
}

/// Arguments of `forkd spawn`.
#[derive(Args, Debug)]
pub(crate) struct SpawnArgs {
    /// The snapshot to fork
    #[arg(long)]
    tag: Tag,
    /// How many children
    #[arg(short, long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(SPAWN_LIMIT)))]
    n: u32,
    #[command(flatten)]
    options: ChildOptions,
    /// Print the daemon's answer as JSON, with stage timings
    #[arg(long)]
    json: bool,
}

impl SpawnArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let client = context.client().await?;
        let step = context.progress.quick_step(format!("Forking {}", self.n));
        let report = client.spawn(&self.options.request(&self.tag, self.n)).await.map_err(snapshot_error)?;
        step.vanish();
        tell(&report, self.n, self.json, &context.progress)
    }
}

/// Prints what became of a request for `n` children; the value is the exit code.
pub(super) fn tell(report: &SpawnReport, n: u32, json: bool, progress: &Progress) -> anyhow::Result<u8> {
    children::warn(report, progress);
    if json {
        output::json(report)?;
    } else {
        for sandbox in &report.sandboxes {
            let netns = sandbox.netns.as_deref().unwrap_or("—");
            output::line(format_args!("✓ {}  guest={}  netns={netns}", sandbox.id, sandbox.guest_addr))?;
        }
        for failure in &report.failures {
            output::line(format_args!("✗ {}  ({})", failure.id, failure.error))?;
        }
        let (up, after) = (report.sandboxes.len(), units::microseconds(report.total_us));
        progress.say(format_args!("{up} of {n} answered after {after}"));
    }
    if report.failures.is_empty() {
        return Ok(0);
    }
    let error = anyhow::anyhow!("{} of {n} children did not come up", report.failures.len());
    Err(advised(error, "forkd doctor"))
}
