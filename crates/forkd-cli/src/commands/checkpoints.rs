//! `checkpoint`, `checkpoints`, `rewind`: a sandbox's past.

use clap::Args;
use forkd_types::rest::{CheckpointInfo, CheckpointPlace, CheckpointRequest, RewindRequest};
use forkd_types::{ByteSize, SandboxId};

use super::{Context, sandbox_error};
use crate::client::ClientError;
use crate::failure::advised;
use crate::{output, units};

/// Arguments of `forkd checkpoint`.
#[derive(Args, Debug)]
pub(crate) struct CheckpointArgs {
    /// The sandbox; it runs on
    sandbox: SandboxId,
    /// Name of the checkpoint; cp-N when absent
    name: Option<String>,
    /// Put it on disk at once; otherwise the daemon does that when checkpoints take too much memory
    #[arg(long)]
    disk: bool,
    /// Print the daemon's answer as JSON
    #[arg(long)]
    json: bool,
}

impl CheckpointArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let request = CheckpointRequest { name: self.name, disk: self.disk };
        let info = context.client().await?.checkpoint(&self.sandbox, &request).await;
        let info = info.map_err(|error| checkpoint_error(error, &self.sandbox))?;
        if self.json {
            output::json(&info)?;
            return Ok(0);
        }
        output::line(&info.name)?;
        context.progress.say(format_args!("{} stood still for {}", self.sandbox, units::microseconds(info.pause_us)));
        Ok(0)
    }
}

/// Arguments of `forkd checkpoints`.
#[derive(Args, Debug)]
pub(crate) struct CheckpointsArgs {
    /// The sandbox
    sandbox: SandboxId,
    /// Remove this checkpoint instead of listing all
    #[arg(long, value_name = "NAME")]
    remove: Option<String>,
    /// Print the daemon's answer as JSON
    #[arg(long)]
    json: bool,
}

impl CheckpointsArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let client = context.client().await?;
        let failed = |error| checkpoint_error(error, &self.sandbox);
        if let Some(name) = &self.remove {
            client.remove_checkpoint(&self.sandbox, name).await.map_err(failed)?;
            output::line(format_args!("✓ {name}"))?;
            return Ok(0);
        }
        let all = client.checkpoints(&self.sandbox).await.map_err(failed)?;
        if self.json {
            output::json(&all)?;
            return Ok(0);
        }
        if all.is_empty() {
            context.progress.say(format_args!("no checkpoints; `forkd checkpoint {}` makes one", self.sandbox));
            return Ok(0);
        }
        let mut table = output::table(&["NAME", "CREATED", "IN", "SIZE", "PAUSE"]);
        for info in &all {
            table.add_row([
                info.name.clone(),
                units::age(info.created_at_unix),
                place(info.place).to_owned(),
                size(info).map_or_else(|| "—".to_owned(), |size| size.to_string()),
                units::microseconds(info.pause_us),
            ]);
        }
        output::print_table(&mut table)?;
        Ok(0)
    }
}

/// Where a checkpoint is, in a word.
pub(super) fn place(place: CheckpointPlace) -> &'static str {
    match place {
        CheckpointPlace::Memory => "memory",
        CheckpointPlace::Disk => "disk",
    }
}

/// What a checkpoint takes where it is.
pub(super) fn size(info: &CheckpointInfo) -> Option<ByteSize> {
    info.private_bytes.or(info.stored_bytes).map(ByteSize)
}

/// Arguments of `forkd rewind`.
#[derive(Args, Debug)]
pub(crate) struct RewindArgs {
    /// The sandbox; it keeps its id
    sandbox: SandboxId,
    /// The checkpoint; the newest when absent
    #[arg(conflicts_with = "back")]
    name: Option<String>,
    /// This many checkpoints back, 1 being the newest
    #[arg(short = 'n', long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    back: Option<u32>,
    /// Print the daemon's answer as JSON
    #[arg(long)]
    json: bool,
}

impl RewindArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let request = RewindRequest { name: self.name, back: self.back };
        let info = context.client().await?.rewind(&self.sandbox, &request).await;
        let info = info.map_err(|error| checkpoint_error(error, &self.sandbox))?;
        if self.json {
            output::json(&info)?;
        } else {
            output::line(format_args!("✓ {} is at {} again", self.sandbox, info.name))?;
        }
        Ok(0)
    }
}

/// Adds to an error what to type when the checkpoint, or the sandbox, is not there.
fn checkpoint_error(error: ClientError, sandbox: &SandboxId) -> anyhow::Error {
    if error.code() == Some("checkpoint_not_found") {
        return advised(error, format!("forkd checkpoints {sandbox}"));
    }
    sandbox_error(error)
}
