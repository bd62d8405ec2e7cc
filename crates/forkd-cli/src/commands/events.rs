//! `events`: what happens, as it happens. `top`: what sandboxes cost, now.

use std::io::{self, IsTerminal};
use std::time::Duration;

use clap::Args;
use comfy_table::Table;
use forkd_types::rest::{Event, SandboxUsage};
use forkd_types::{ByteSize, SandboxId};

use super::Context;
use crate::client::Client;
use crate::interrupt::Interrupts;
use crate::{output, units};

/// Moves to the top left corner and clears from there on.
const CLEAR: &str = "\x1b[H\x1b[J";

/// Arguments of `forkd events`.
#[derive(Args, Debug)]
pub(crate) struct EventsArgs {
    /// Only what is about this sandbox
    #[arg(long)]
    sandbox: Option<SandboxId>,
    /// Also what happened since this event
    #[arg(long, value_name = "ID")]
    after: Option<u64>,
    /// Print each event as one line of JSON
    #[arg(long)]
    json: bool,
}

impl EventsArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let client = context.client().await?;
        let mut interrupts = Interrupts::catch()?;
        let following = client.events(self.sandbox.as_ref(), self.after, |event| {
            if self.json { output::line(serde_json::to_string(&event)?) } else { output::line(describe(&event)) }
        });
        tokio::select! {
            ended = following => ended?,
            // Being stopped is how it is meant to end.
            _ = interrupts.next() => return Ok(0),
        }
        context.progress.say("the daemon stopped");
        Ok(0)
    }
}

/// An event as one line.
fn describe(event: &Event) -> String {
    let mut words = vec![event.id.to_string(), format!("{:<23}", event.event.name())];
    words.extend(event.sandbox.as_ref().map(SandboxId::to_string));
    words.extend(event.snapshot.as_ref().map(|tag| format!("snapshot={tag}")));
    words.extend(event.checkpoint.as_ref().map(|name| format!("checkpoint={name}")));
    words.extend(event.workspace.as_ref().map(|name| format!("workspace={name}")));
    words.extend(event.reason.as_ref().map(|reason| format!("({})", reason.lines().next().unwrap_or_default())));
    words.join("  ").trim_end().to_owned()
}

/// Arguments of `forkd top`.
#[derive(Args, Debug)]
pub(crate) struct TopArgs {
    /// Show it once and end; so it is when the output is no terminal
    #[arg(long)]
    once: bool,
    /// How often it is shown anew
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..))]
    interval: u64,
    /// Print the daemon's answer as JSON, one line each time
    #[arg(long)]
    json: bool,
}

impl TopArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let client = context.client().await?;
        let once = self.once || !(self.json || io::stdout().is_terminal());
        let mut interrupts = Interrupts::catch()?;
        let mut ticks = tokio::time::interval(Duration::from_secs(self.interval));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => self.show(&client, once).await?,
                _ = interrupts.next() => return Ok(0),
            }
            if once {
                return Ok(0);
            }
        }
    }

    async fn show(&self, client: &Client, once: bool) -> anyhow::Result<()> {
        let usage = client.usage().await?;
        if self.json {
            return output::line(serde_json::to_string(&usage)?);
        }
        if !once {
            output::bytes(CLEAR.as_bytes())?;
        }
        output::print_table(&mut table(&usage))?;
        let running = usage.iter().filter(|usage| usage.stopped.is_none());
        let private = running.clone().filter_map(|usage| usage.private_bytes).sum();
        output::line(format_args!("{} running, {} private in all", running.count(), ByteSize(private)))
    }
}

fn table(usage: &[SandboxUsage]) -> Table {
    let mut table = output::table(&["ID", "SNAPSHOT", "AGE", "STATE", "PRIVATE", "CPU", "UPTIME"]);
    for usage in usage {
        let or_none = |text: Option<String>| text.unwrap_or_else(|| "—".to_owned());
        table.add_row([
            usage.id.to_string(),
            usage.snapshot_tag.to_string(),
            units::age(usage.created_at_unix),
            usage.stopped.clone().unwrap_or_else(|| "running".to_owned()),
            or_none(usage.private_bytes.map(|bytes| ByteSize(bytes).to_string())),
            or_none(usage.cpu_ms.map(|ms| units::duration(Duration::from_millis(ms)))),
            or_none(usage.uptime_secs.map(|seconds| units::duration(Duration::from_secs(seconds)))),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line() {
        let event: Event = serde_json::from_str(
            r#"{"id":7,"at_unix":1,"event":"snapshot.failed","snapshot":"py","sandbox":"sb-7-0001","reason":"full\nmore"}"#,
        )
        .expect("valid");
        assert_eq!(describe(&event), "7  snapshot.failed          sb-7-0001  snapshot=py  (full)");
    }

    #[test]
    fn what_has_ended_has_no_sizes() {
        let usage: Vec<SandboxUsage> = serde_json::from_str(
            r#"[{"id":"sb-7-0001","snapshot_tag":"py","created_at_unix":0,"private_bytes":1048576,"cpu_ms":1500,"uptime_secs":70},
                {"id":"sb-7-0002","snapshot_tag":"py","created_at_unix":0,"stopped":"was powered off"}]"#,
        )
        .expect("valid");
        let text = table(&usage).to_string();
        assert!(text.contains("1.5 s") && text.contains("1 min 10 s") && text.contains("was powered off"), "{text}");
    }
}
