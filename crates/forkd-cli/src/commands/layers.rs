//! `snapshot-diff`, `snapshot-compact`: layers made and flattened.

use clap::Args;
use forkd_types::Tag;
use forkd_types::rest::{BranchMode, BranchRequest, ExecRequest, SandboxInfo, SnapshotInfo, SpawnRequest};

use super::{Context, snapshot_error};
use crate::children::Children;
use crate::client::Client;
use crate::failure::advised;
use crate::interrupt::Interrupts;
use crate::output;

/// Arguments of `forkd snapshot-diff`.
#[derive(Args, Debug)]
pub(crate) struct SnapshotDiffArgs {
    /// The snapshot to build on
    #[arg(long)]
    from: Tag,
    /// Name of the layer
    #[arg(long)]
    tag: Tag,
    /// The command that makes the difference; words as a shell would split them, but no shell
    #[arg(long, value_name = "COMMAND")]
    exec: String,
    /// How long the command may take
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    exec_timeout_secs: u64,
}

impl SnapshotDiffArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let args = shlex::split(&self.exec).filter(|words| !words.is_empty());
        let args =
            args.ok_or_else(|| anyhow::anyhow!("--exec is {:?}: it has an open quote, or no words", self.exec))?;
        let client = context.client().await?;
        let mut interrupts = Interrupts::catch()?;
        let request = SpawnRequest::of(&self.from, 1);
        let children = Children::spawn(&client, &request, &mut interrupts, &context.progress).await;
        let children = children.map_err(super::spawn_error)?;
        let sandbox = children.report().sandboxes.first().cloned();
        let making = async {
            let sandbox = sandbox.ok_or_else(|| anyhow::anyhow!("the child of {} did not come up", self.from))?;
            self.make(&client, &sandbox, args).await
        };
        let layer = children.scope(&mut interrupts, making).await?;
        output::line(format_args!("tag: {}", layer.tag))?;
        output::line(format_args!("dir: {}", layer.dir))?;
        output::line(format_args!("parent_tag: {}", self.from))?;
        output::line(format_args!("pause_ms: {}", layer.pause_ms.unwrap_or_default()))?;
        output::line(format_args!("diff_physical_bytes: {}", layer.diff_physical_bytes.unwrap_or_default()))?;
        Ok(0)
    }

    async fn make(&self, client: &Client, sandbox: &SandboxInfo, args: Vec<String>) -> anyhow::Result<SnapshotInfo> {
        let request = ExecRequest { args, timeout_secs: self.exec_timeout_secs, ..ExecRequest::default() };
        let done = client.exec(&sandbox.id, &request).await?;
        if done.exit_code != 0 {
            let said = format!("{}{}", done.stdout, done.stderr);
            anyhow::bail!("the command ended with {}; no layer was made\n{}", done.exit_code, said.trim_end());
        }
        let request = BranchRequest {
            tag: Some(self.tag.to_string()),
            mode: Some(BranchMode::Diff),
            parent_tag: Some(self.from.to_string()),
            sync: true,
            ..BranchRequest::default()
        };
        client.branch(&sandbox.id, &request).await.map_err(snapshot_error)
    }
}

/// Arguments of `forkd snapshot-compact`.
#[derive(Args, Debug)]
pub(crate) struct SnapshotCompactArgs {
    /// The snapshot
    #[arg(long)]
    from: Tag,
    /// Name of its equal that depends on no other
    #[arg(long)]
    to: Tag,
}

impl SnapshotCompactArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        if self.from == self.to {
            return Err(advised(anyhow::anyhow!("--from and --to are both {}", self.from), "forkd images"));
        }
        let client = context.client().await?;
        let step = context.progress.quick_step(format!("Writing {} anew", self.from));
        let info = client.compact(&self.from, &self.to).await.map_err(snapshot_error)?;
        step.vanish();
        output::line(format_args!("tag: {}", info.tag))?;
        output::line(format_args!("dir: {}", info.dir))?;
        output::line(format_args!("branched_from: {}", info.branched_from.unwrap_or_default()))?;
        Ok(0)
    }
}
