//! `ls`, `kill`, `logs`.

use clap::Args;
use forkd_types::{SandboxId, Tag};

use super::{Context, sandbox_error};
use crate::client::ClientError;
use crate::failure::advised;
use crate::interrupt::Interrupts;
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
    /// Go on with what its guest writes from now on, until it ends
    #[arg(short, long)]
    follow: bool,
    /// Begin with the last lines only
    #[arg(short = 'n', long, value_name = "LINES", conflicts_with = "follow")]
    tail: Option<usize>,
}

impl LogsArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let client = context.client().await?;
        if self.follow {
            let mut interrupts = Interrupts::catch()?;
            let following = async {
                let followed = client.follow_console(&self.sandbox, output::bytes).await;
                followed.map_err(|error| match error.downcast::<ClientError>() {
                    Ok(error) => sandbox_error(error),
                    Err(error) => error,
                })
            };
            return interrupts.guard(following).await.map(|()| 0);
        }
        let console = client.console(&self.sandbox).await.map_err(sandbox_error)?;
        output::bytes(self.tail.map_or(&console[..], |lines| last_lines(&console, lines)))?;
        Ok(0)
    }
}

/// The last `count` lines of `text`; one that is not ended yet counts.
fn last_lines(text: &[u8], count: usize) -> &[u8] {
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    let mut ends = body.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1);
    match count {
        0 => &[],
        count => &text[ends.nth(count - 1).unwrap_or(0)..],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_log_is_whole_lines() {
        let last = |text: &str, count| String::from_utf8_lossy(last_lines(text.as_bytes(), count)).into_owned();
        assert_eq!(last("a\nb\nc\n", 2), "b\nc\n");
        assert_eq!(last("a\nb\nc", 1), "c");
        assert_eq!(last("a\nb\n", 9), "a\nb\n");
        assert_eq!(last("a\n", 0), "");
        assert_eq!(last("", 3), "");
    }
}
