//! `branch`: running copies of a running sandbox. `snapshot --from-sandbox`: a snapshot of one.

use clap::Args;
use forkd_types::rest::{BranchMode, BranchRequest, ForkRequest, SPAWN_LIMIT, SnapshotStatus};
use forkd_types::{SandboxId, Tag};

use super::spawn::tell;
use super::workspace::LifetimeOptions;
use super::{Context, sandbox_error};
use crate::limits::LimitOptions;
use crate::{output, units};

/// Arguments of `forkd branch`.
#[derive(Args, Debug)]
pub(crate) struct BranchArgs {
    /// The sandbox; it runs on
    sandbox: SandboxId,
    /// How many copies, all of the same instant
    #[arg(short, long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(SPAWN_LIMIT)))]
    n: u32,
    /// Memory limit of each copy; that of the sandbox when absent
    #[arg(long, value_name = "MIB")]
    memory_limit_mib: Option<u64>,
    #[command(flatten)]
    limits: LimitOptions,
    #[command(flatten)]
    lifetime: LifetimeOptions,
    /// Print the daemon's answer as JSON, with stage timings
    #[arg(long)]
    json: bool,
}

impl BranchArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let client = context.client().await?;
        let step = context.progress.quick_step(format!("Copying {} {} times", self.sandbox, self.n));
        let LifetimeOptions { timeout_secs, on_timeout } = self.lifetime;
        let (n, memory_limit_mib, limits) = (self.n, self.memory_limit_mib, self.limits.all());
        let request = ForkRequest { n, memory_limit_mib, timeout_secs, on_timeout, limits };
        let report = client.fork(&self.sandbox, &request).await.map_err(sandbox_error)?;
        step.vanish();
        tell(&report, self.n, self.json, &context.progress)
    }
}

/// What `forkd snapshot --from-sandbox` takes besides the sandbox.
#[derive(Args, Debug)]
pub(crate) struct FromSandboxOptions {
    /// Also say how much changed since the sandbox's own snapshot
    #[arg(long, requires = "from_sandbox", conflicts_with = "live")]
    diff: bool,
    /// Accepted for existing scripts: every sandbox can be branched while it runs
    #[arg(long, requires = "from_sandbox")]
    live: bool,
    /// Return when the sandbox runs again; the snapshot is being written then
    #[arg(long, requires = "live")]
    no_wait: bool,
    /// Keep only what changed, as a layer over the sandbox's own snapshot, which must then stay
    #[arg(long, requires = "from_sandbox")]
    layer: bool,
    /// Flush the guest's file systems first
    #[arg(long, requires = "from_sandbox")]
    sync: bool,
}

impl FromSandboxOptions {
    /// Takes the snapshot and prints where it is. With `replace` an earlier one of the tag goes.
    pub(crate) async fn run(
        self,
        sandbox: &SandboxId,
        tag: Option<Tag>,
        replace: bool,
        context: &Context,
    ) -> anyhow::Result<u8> {
        let client = context.client().await?;
        let layer_over = match self.layer {
            true => {
                let all = client.sandboxes().await?;
                all.into_iter().find(|info| info.id == *sandbox).map(|info| info.snapshot_tag.to_string())
            }
            false => None,
        };
        let mode = match (self.diff || self.layer, self.live) {
            (true, _) => Some(BranchMode::Diff),
            (false, true) => Some(BranchMode::Live),
            (false, false) => None,
        };
        let tag = tag.map(|tag| tag.to_string());
        let (wait, sync, parent_tag) = (!self.no_wait, self.sync, layer_over);
        let request = BranchRequest { tag, mode, wait, sync, parent_tag, replace, ..BranchRequest::default() };
        let step = context.progress.quick_step(format!("Taking a snapshot of {sandbox}"));
        let info = client.branch(sandbox, &request).await.map_err(sandbox_error)?;
        step.vanish();
        output::line(format_args!("tag: {}", info.tag))?;
        output::line(format_args!("dir: {}", info.dir))?;
        output::line(format_args!("branched_from: {sandbox}"))?;
        if let Some(stages) = &info.stages {
            context.progress.say(format_args!("{sandbox} stood still for {}", units::microseconds(paused(stages))));
        }
        match info.status {
            SnapshotStatus::Writing => {
                context.progress.say("it is being written; `forkd images` says when it is ready")
            }
            _ => context.progress.say(format_args!("next: forkd spawn --tag {} -n 10", info.tag)),
        }
        Ok(0)
    }
}

/// The part of a branch's stages in which its source stood still: those before the writer's own.
fn paused(stages: &forkd_types::StageTimings) -> u64 {
    stages.0.iter().take_while(|stage| !stage.name.contains('.') && stage.name != "publish").map(|stage| stage.us).sum()
}
