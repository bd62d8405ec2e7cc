//! `ls`, `kill`, `logs`.

use clap::Args;
use forkd_types::{SandboxId, Tag};

use super::{Context, sandbox_error};
use crate::failure::advised;
use crate::{children, output, units};

/// Arguments of `forkd ls`.
#[derive(Args, Debug)]
pub(crate) struct LsArgs {
    /// Print the daemon's answer as JSON
    #[arg(long)]
    json: bool,
}

impl LsArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let sandboxes = context.client().await?.sandboxes().await?;
        if self.json {
            output::json(&sandboxes)?;
            return Ok(0);
        }
        if sandboxes.is_empty() {
            context.progress.say("no sandboxes; `forkd spawn --tag TAG` makes some");
            return Ok(0);
        }
        let mut table =
            output::table(&["ID", "SNAPSHOT", "PID", "NETNS", "BRANCHES", "GUEST_ADDR", "CREATED", "STATUS"]);
        for sandbox in &sandboxes {
            table.add_row([
                sandbox.id.to_string(),
                sandbox.snapshot_tag.to_string(),
                sandbox.pid.map_or_else(|| "—".to_owned(), |pid| pid.to_string()),
                sandbox.netns.clone().unwrap_or_else(|| "—".to_owned()),
                sandbox.branch_count.to_string(),
                sandbox.guest_addr.clone(),
                units::age(sandbox.created_at_unix),
                sandbox.stopped.clone().unwrap_or_else(|| "running".to_owned()),
            ]);
        }
        output::print_table(&mut table)?;
        let running = sandboxes.iter().filter(|sandbox| sandbox.stopped.is_none()).count();
        output::line(format_args!("{running} running, {} ended", sandboxes.len() - running))?;
        Ok(0)
    }
}

/// Arguments of `forkd kill`.
#[derive(Args, Debug)]
#[group(id = "which", required = true, multiple = false, args = ["ids", "all", "tag"])]
pub(crate) struct KillArgs {
    /// The sandboxes
    #[arg(value_name = "SANDBOX")]
    ids: Vec<SandboxId>,
    /// Every sandbox
    #[arg(long)]
    all: bool,
    /// Every sandbox of this snapshot
    #[arg(long)]
    tag: Option<Tag>,
}

impl KillArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let client = context.client().await?;
        let mut ids = self.ids;
        if ids.is_empty() {
            let matches = |tag: &Tag| self.tag.as_ref().is_none_or(|wanted| wanted == tag);
            let running = client.sandboxes().await?;
            ids = running
                .into_iter()
                .filter(|sandbox| matches(&sandbox.snapshot_tag))
                .map(|sandbox| sandbox.id)
                .collect();
            if ids.is_empty() {
                context.progress.say("no sandbox to kill");
                return Ok(0);
            }
        }
        let step = context.progress.quick_step("Killing");
        let outcomes = children::kill(&client, ids).await;
        step.vanish();
        let mut failed = 0;
        for (id, outcome) in outcomes {
            match outcome {
                Ok(()) => output::line(format_args!("✓ {id}"))?,
                Err(error) => {
                    failed += 1;
                    output::line(format_args!("✗ {id}  ({error})"))?;
                }
            }
        }
        if failed == 0 {
            return Ok(0);
        }
        Err(advised(anyhow::anyhow!("{failed} could not be killed"), "forkd ls"))
    }
}

/// Arguments of `forkd logs`.
#[derive(Args, Debug)]
pub(crate) struct LogsArgs {
    /// The sandbox
    sandbox: SandboxId,
}

impl LogsArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let console = context.client().await?.console(&self.sandbox).await.map_err(sandbox_error)?;
        output::bytes(&console)?;
        Ok(0)
    }
}
