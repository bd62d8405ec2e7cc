//! Single calls, one after the other, next to what the monitor and the agent took for them.

use std::time::Instant;

use forkd_types::rest::{SpawnReport, SpawnRequest};
use forkd_types::{SandboxId, Tag};
use serde::Serialize;

use crate::children::Children;
use crate::client::Client;
use crate::interrupt::Interrupts;
use crate::progress::Progress;
use crate::statistics::{Summary, summarise};

/// The stages of a spawn that are the monitor's and the guest's; the rest is the daemon's.
const BELOW_THE_DAEMON: [&str; 4] = ["fork", "restore", "connect", "identify"];

/// One kind of call: all of it, the part of it below the daemon, and what is left.
#[derive(Debug, Serialize)]
pub(super) struct Call {
    /// As the client sees it, the connection included.
    pub(super) whole_ms: Summary,
    /// What the monitor and the agent took.
    pub(super) below_ms: Summary,
    /// The difference, call by call: HTTP both ways, the daemon, its connection to the monitor.
    pub(super) overhead_ms: Summary,
}

/// Single calls.
#[derive(Debug, Serialize)]
pub(super) struct Calls {
    /// `POST /v1/sandboxes` for one child.
    pub(super) spawn: Call,
    /// `POST /v1/sandboxes/:id/ping`.
    pub(super) ping: Call,
}

/// Microseconds of one call, all of it and below the daemon.
type Sample = (u64, u64);

impl Call {
    fn of(samples: &[Sample]) -> Self {
        let ms = |pick: fn(&Sample) -> u64| summarise(samples.iter().map(|sample| pick(sample) as f64 / 1e3));
        Self {
            whole_ms: ms(|sample| sample.0),
            below_ms: ms(|sample| sample.1),
            overhead_ms: ms(|sample| sample.0.saturating_sub(sample.1)),
        }
    }
}

/// Makes each call `runs` times.
pub(super) async fn measure(
    client: &Client,
    tag: &Tag,
    runs: u32,
    interrupts: &mut Interrupts,
    progress: &Progress,
) -> anyhow::Result<Calls> {
    let request = SpawnRequest::of(tag, 1);
    // Loads the snapshot's zygote, and is pinged.
    let first = Children::spawn(client, &request, interrupts, progress).await?;
    let ids: Vec<_> = first.report().sandboxes.iter().map(|sandbox| sandbox.id.clone()).collect();
    let pings = first.scope(interrupts, pings(client, &ids, runs, progress)).await?;
    let step = progress.step("single spawns");
    step.set_items(runs.into());
    let mut spawns = Vec::new();
    for number in 1..=runs {
        let began = Instant::now();
        let child = Children::spawn(client, &request, interrupts, progress).await?;
        let whole = began.elapsed().as_micros() as u64;
        spawns.extend(below(child.report()).map(|below| (whole, below)));
        child.kill().await;
        step.set_position(number.into());
    }
    step.done("single spawns");
    Ok(Calls { spawn: Call::of(&spawns), ping: Call::of(&pings) })
}

async fn pings(client: &Client, ids: &[SandboxId], runs: u32, progress: &Progress) -> anyhow::Result<Vec<Sample>> {
    let step = progress.step("single pings");
    step.set_items(runs.into());
    let mut samples = Vec::new();
    // The first finds caches cold.
    for (number, id) in (0..=runs).zip(ids.iter().cycle()) {
        let began = Instant::now();
        let pong = client.ping(id).await?;
        let whole = began.elapsed().as_micros() as u64;
        let below = pong.get("round_trip_us").and_then(serde_json::Value::as_u64);
        let below =
            below.ok_or_else(|| anyhow::anyhow!("this daemon does not say how long its agents take to answer"))?;
        if number > 0 {
            samples.push((whole, below));
        }
        step.set_position(number.into());
    }
    step.done("single pings");
    Ok(samples)
}

/// What the monitor and the guest took for a spawn of one child, microseconds.
fn below(report: &SpawnReport) -> Option<u64> {
    let stages = &report.timings.first()?.stages.0;
    Some(stages.iter().filter(|stage| BELOW_THE_DAEMON.contains(&stage.name.as_str())).map(|stage| stage.us).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemons_part_of_a_spawn_is_what_nobody_below_it_took() {
        let report = serde_json::json!({
            "sandboxes": [], "failures": [], "total_us": 9000,
            "timings": [{"id": "sb-1-0000", "answered_us": 9000, "stages": [
                {"name": "lease", "us": 50}, {"name": "fork", "us": 1000}, {"name": "fork.fork", "us": 900},
                {"name": "restore", "us": 2000}, {"name": "connect", "us": 300}, {"name": "identify", "us": 400},
            ]}],
        });
        let below = below(&serde_json::from_value(report).expect("whole")).expect("one child");
        assert_eq!(below, 3700);
        let call = Call::of(&[(4000, below), (5000, below), (3000, below)]);
        assert_eq!((call.overhead_ms.min, call.overhead_ms.p50, call.overhead_ms.max), (0.0, 0.3, 1.3));
    }
}
