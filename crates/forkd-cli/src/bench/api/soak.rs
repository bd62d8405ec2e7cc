//! Many clients against many sandboxes for a while: are all answered, and does the daemon's memory stay flat?

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use forkd_types::rest::{ExecRequest, SpawnRequest};
use forkd_types::{SandboxId, Tag};
use http::Method;
use serde::Serialize;

use crate::children::Children;
use crate::client::{Client, RawBody};
use crate::interrupt::Interrupts;
use crate::progress::Progress;
use crate::statistics::{Summary, summarise};

/// The metric of the daemon's memory.
const RESIDENT: &str = "process_resident_memory_bytes ";

/// How many times the daemon's memory is read.
const READINGS: u32 = 40;

/// The largest page of metrics.
const METRICS_LIMIT: usize = 16 << 20;

/// Who asks whom for how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Order {
    pub(super) clients: u32,
    pub(super) sandboxes: u32,
    pub(super) time: Duration,
}

/// What came of it.
#[derive(Debug, Serialize)]
pub(super) struct Soak {
    pub(super) clients: u32,
    pub(super) sandboxes: usize,
    pub(super) seconds: f64,
    /// Answered as they should be.
    pub(super) answered: usize,
    pub(super) errors: usize,
    /// Each text once, with how often it came; those that came most.
    pub(super) error_texts: BTreeMap<String, usize>,
    pub(super) ping_ms: Summary,
    pub(super) exec_ms: Summary,
    /// Resident memory of the daemon in the first and in the last quarter of the time, medians.
    pub(super) resident_mib: Option<[f64; 2]>,
}

/// What one client saw.
#[derive(Default)]
struct Seen {
    pings: Vec<f64>,
    execs: Vec<f64>,
    errors: BTreeMap<String, usize>,
}

/// Brings the sandboxes up and has them asked.
pub(super) async fn measure(
    client: &Client,
    tag: &Tag,
    order: Order,
    interrupts: &mut Interrupts,
    progress: &Progress,
) -> anyhow::Result<Soak> {
    let Order { clients, sandboxes, time } = order;
    let title = format!("{clients} clients against {sandboxes} sandboxes for {} s", time.as_secs());
    let step = progress.step(&title);
    let children = Children::spawn(client, &SpawnRequest::of(tag, sandboxes), interrupts, progress).await?;
    let ids: Vec<_> = children.report().sandboxes.iter().map(|sandbox| sandbox.id.clone()).collect();
    let until = Instant::now() + time;
    let work = async {
        let asking = (0..clients as usize).map(|number| ask(client, &ids, number, until));
        let (seen, resident) = tokio::join!(futures_util::future::join_all(asking), watch(client, time));
        Ok((seen, resident))
    };
    let (seen, resident) = children.scope(interrupts, work).await?;
    step.done(title);
    let mut all = Seen::default();
    for one in seen {
        all.pings.extend(one.pings);
        all.execs.extend(one.execs);
        for (text, count) in one.errors {
            *all.errors.entry(text).or_default() += count;
        }
    }
    Ok(Soak {
        clients,
        sandboxes: ids.len(),
        seconds: time.as_secs_f64(),
        answered: all.pings.len() + all.execs.len(),
        errors: all.errors.values().sum(),
        error_texts: all.errors,
        ping_ms: summarise(all.pings),
        exec_ms: summarise(all.execs),
        resident_mib: ends(&resident),
    })
}

/// One client: a ping and a program in turns, each time of another sandbox.
async fn ask(client: &Client, ids: &[SandboxId], number: usize, until: Instant) -> Seen {
    let mut seen = Seen::default();
    let program = ExecRequest { args: vec!["true".to_owned()], timeout_secs: 60, ..ExecRequest::default() };
    for (count, id) in ids.iter().cycle().skip(number).enumerate() {
        let began = Instant::now();
        if began >= until {
            break;
        }
        let outcome = if count % 2 == 0 {
            client.ping(id).await.map(|_| &mut seen.pings)
        } else {
            client.exec(id, &program).await.map(|_| &mut seen.execs)
        };
        match outcome {
            Ok(times) => times.push(began.elapsed().as_secs_f64() * 1e3),
            // The id would make each text another one.
            Err(error) => *seen.errors.entry(error.to_string().replace(id.as_str(), "sb-…")).or_default() += 1,
        }
    }
    seen
}

/// Reads the daemon's memory now and then, bytes.
async fn watch(client: &Client, time: Duration) -> Vec<f64> {
    let mut readings = Vec::new();
    for _ in 0..READINGS {
        tokio::time::sleep(time / READINGS).await;
        let page = client.raw(Method::GET, "/metrics", RawBody::Empty, METRICS_LIMIT).await;
        readings.extend(page.ok().and_then(|page| resident(&String::from_utf8_lossy(&page))));
    }
    readings
}

fn resident(page: &str) -> Option<f64> {
    page.lines().find_map(|line| line.strip_prefix(RESIDENT)?.trim().parse().ok())
}

/// Medians of the first and the last quarter, MiB.
fn ends(readings: &[f64]) -> Option<[f64; 2]> {
    let quarter = (readings.len() / 4).max(1);
    let (first, last) = (readings.get(..quarter)?, readings.get(readings.len() - quarter..)?);
    let mib = |values: &[f64]| summarise(values.iter().map(|bytes| bytes / f64::from(1 << 20))).p50;
    Some([mib(first), mib(last)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_compared_at_both_ends() {
        let page = "# TYPE process_resident_memory_bytes gauge\nprocess_resident_memory_bytes 3145728\n";
        assert_eq!(resident(page), Some(3145728.0));
        let mib = f64::from(1 << 20);
        let rising: Vec<f64> = (1..=8).map(|n| f64::from(n) * mib).collect();
        assert_eq!(ends(&rising), Some([1.5, 7.5]));
        assert_eq!(ends(&[]), None);
    }
}
