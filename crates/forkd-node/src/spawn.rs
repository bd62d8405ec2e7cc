//! Many children at once, each with its own outcome.
//!
//! All children come up concurrently, a bounded number at a time; each has its own deadline, and one
//! that fails is removed without touching the others. The forks of a wave go to the zygote
//! pipelined. Nothing of a spawn outlives a caller that goes away before it is told the ids.

use std::sync::Arc;
use std::time::{Duration, Instant};

use forkd_types::StageTimings;
use forkd_types::rest::{
    ForkRequest, OnTimeout, SPAWN_LIMIT, SandboxLimits, SpawnFailure, SpawnReport, SpawnRequest, SpawnTimings,
};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::admission::{HostMemory, Promise};
use crate::birth::{Parent, bring_up};
use crate::database::{Branches, Expiry, Origin};
use crate::error::{NodeError, NodeResult};
use crate::frozen::{Frozen, Lifetime};
use crate::host::{Host, unix_now};
use crate::lifetime;
use crate::limits;
use crate::sandbox::{About, Newborn, Roster, Sandbox};
use crate::zygotes::{ZygoteKey, Zygotes};

/// How many children, and with what limit, checked.
#[derive(Clone, Copy)]
struct Order {
    n: u32,
    limits: SandboxLimits,
    expiry: Option<Expiry>,
    /// Whether clients are told the names of namespaces.
    shows_netns: bool,
    arrived: Instant,
}

impl Order {
    fn check(
        n: u32,
        limits: NodeResult<SandboxLimits>,
        timeout: (Option<u64>, Option<OnTimeout>),
        arrived: Instant,
    ) -> NodeResult<Self> {
        if !(1..=SPAWN_LIMIT).contains(&n) {
            return Err(NodeError::SpawnCount { n });
        }
        let limits = limits?;
        let expiry = lifetime::expiry(timeout.0, timeout.1)?;
        Ok(Self { n, limits, expiry, shows_netns: false, arrived })
    }
}

/// A child whose agent has answered.
struct Up {
    newborn: Newborn,
    timings: SpawnTimings,
}

/// Spawns what `request` asks for, which arrived at `arrived`.
///
/// # Errors
/// What concerns the request or the snapshot. Failures of single children are in the report, also
/// when all failed.
pub(crate) async fn spawn(
    host: &Arc<Host>,
    zygotes: &Zygotes,
    roster: &Arc<Roster>,
    request: &SpawnRequest,
    arrived: Instant,
) -> NodeResult<SpawnReport> {
    let timeout = (request.timeout_secs, request.on_timeout);
    let limits = limits::asked(request.memory_limit_mib, request.limits);
    let order = Order::check(request.n, limits, timeout, arrived)?;
    let order = Order { shows_netns: request.per_child_netns, ..order };
    let key = ZygoteKey { tag: request.snapshot_tag.parse()?, huge_pages: request.hugepages };
    let zygote = zygotes.lease(&key).await?;
    // After that, so that nobody is told what the host lacks who asked for what there is not.
    let warning = host.groups.check(&order.limits)?;
    let promises = promises(host, &order)?;
    let origin = Origin {
        snapshot_tag: key.tag,
        snapshot_digest: Some(zygote.snapshot_digest),
        forked_from: None,
        created_at_unix: unix_now(),
        limits: order.limits,
        disks: zygote.disks,
        base: None,
        auto_checkpoint: request.auto_checkpoint.is_some(),
    };
    let mut stages = StageTimings::default();
    stages.record("lease", arrived.elapsed());
    let warnings = zygote.warnings.iter().cloned().chain(warning).collect();
    let report = raise(host, roster, Parent::Zygote(Arc::clone(&zygote)), origin, order, promises, stages).await?;
    if let Some(running) = report.sandboxes.first().and_then(|first| roster.get(&first.id).ok()?.running().ok()) {
        zygote.working_set.learn(host, Arc::clone(&running.control));
    }
    Ok(SpawnReport { warnings, ..report })
}

/// Copies a running sandbox as `request` asks, which arrived at `arrived`. All copies are of one instant.
///
/// # Errors
/// As [`spawn`], and what keeps the sandbox from being copied; it runs on in every case.
pub(crate) async fn fork(
    host: &Arc<Host>,
    roster: &Arc<Roster>,
    sandbox: &Arc<Sandbox>,
    request: &ForkRequest,
    arrived: Instant,
) -> NodeResult<SpawnReport> {
    let limits = limits::asked_of_copy(request.memory_limit_mib, request.limits, sandbox.origin.limits);
    let timeout = (request.timeout_secs, request.on_timeout);
    let order = Order::check(request.n, limits, timeout, arrived)?;
    let of_source = sandbox.machine().and_then(|machine| machine.network.clone());
    let order = Order { shows_netns: of_source.is_some_and(|network| network.is_shown()), ..order };
    let warning = host.groups.check(&order.limits)?;
    let promises = promises(host, &order)?;
    let frozen = Frozen::of(host, sandbox, Lifetime::Daemon).await?;
    let origin = Origin {
        forked_from: Some(sandbox.id.clone()),
        created_at_unix: unix_now(),
        limits: order.limits,
        base: sandbox.base(),
        ..sandbox.origin.clone()
    };
    let mut stages = StageTimings::default();
    stages.record("freeze", arrived.elapsed());
    for stage in &frozen.stages.0 {
        stages.record(&format!("freeze.{}", stage.name), Duration::from_micros(stage.us));
    }
    let report = raise(host, roster, Parent::Frozen(Arc::new(frozen)), origin, order, promises, stages).await?;
    Ok(SpawnReport { warnings: Vec::from_iter(warning), ..report })
}

/// Room for all children, or the reason why there is none.
fn promises(host: &Host, order: &Order) -> NodeResult<Vec<Option<Promise>>> {
    let now = HostMemory::now().map_err(NodeError::io("read /proc/meminfo"))?;
    host.admission.admit(order.n, limits::memory(&order.limits), now)
}

/// Forks the children of one request; `stages` is what was done for all of them.
async fn raise(
    host: &Arc<Host>,
    roster: &Arc<Roster>,
    parent: Parent,
    origin: Origin,
    order: Order,
    promises: Vec<Option<Promise>>,
    stages: StageTimings,
) -> NodeResult<SpawnReport> {
    let arrived = order.arrived;
    let ids = host.database.begin(origin.clone(), order.expiry, order.n).await?;
    let ready = arrived.elapsed();
    let turns = Arc::new(Semaphore::new(host.config.spawn_concurrency));
    let mut coming = JoinSet::new();
    for (id, promise) in ids.into_iter().zip(promises) {
        let newborn = Newborn::expecting(host, id);
        let (host, parent, turns) = (Arc::clone(host), parent.clone(), Arc::clone(&turns));
        let mut stages = stages.clone();
        coming.spawn(async move {
            let id = newborn.id().clone();
            let _turn = turns.acquire_owned().await.expect("the semaphore is never closed");
            stages.record("queue", arrived.elapsed().saturating_sub(ready));
            let limit = host.config.child_deadline;
            let rising = bring_up(&host, &parent, newborn, &order.limits, promise, order.shows_netns, &mut stages);
            let newborn = match tokio::time::timeout(limit, rising).await {
                Ok(result) => result.map_err(|reason| (id.clone(), reason))?,
                Err(_) => {
                    let reached = stages.0.last().map_or("nothing", |stage| stage.name.as_str());
                    let reason = format!(
                        "its agent did not answer within {} s (last stage done: {reached})",
                        limit.as_secs_f32()
                    );
                    return Err((id, reason));
                }
            };
            let answered_us = arrived.elapsed().as_micros() as u64;
            Ok(Up { newborn, timings: SpawnTimings { id, answered_us, stages } })
        });
    }
    let mut up = Vec::with_capacity(order.n as usize);
    let mut failures = Vec::new();
    while let Some(outcome) = coming.join_next().await {
        match outcome {
            Ok(Ok(child)) => up.push(child),
            Ok(Err((id, error))) => {
                tracing::warn!(sandbox = %id, error, "child did not come up");
                failures.push(SpawnFailure { id, error });
            }
            Err(panic) => return Err(NodeError::Io { what: "spawn a child".to_owned(), source: panic.into() }),
        }
    }
    let total_us = arrived.elapsed().as_micros() as u64;
    up.sort_by(|a, b| a.timings.id.cmp(&b.timings.id));
    failures.sort_by(|a, b| a.id.cmp(&b.id));
    admit(host, roster, &order, &origin, up, failures, total_us).await
}

/// Records the children that are up and makes them known.
async fn admit(
    host: &Host,
    roster: &Arc<Roster>,
    order: &Order,
    origin: &Origin,
    up: Vec<Up>,
    failures: Vec<SpawnFailure>,
    total_us: u64,
) -> NodeResult<SpawnReport> {
    let keys = up
        .iter()
        .filter_map(|child| Some((child.newborn.id().clone(), child.newborn.running()?.process.key())))
        .collect();
    host.database.running(keys).await?;
    let (mut sandboxes, mut timings) = (Vec::with_capacity(up.len()), Vec::with_capacity(up.len()));
    for child in up {
        let id = child.newborn.id().clone();
        let (origin, branches, expiry) = (origin.clone(), Branches::default(), order.expiry);
        let about = About { id, origin, branches, expiry };
        if let Some(sandbox) = roster.admit(about, child.newborn) {
            sandboxes.push(sandbox.info());
            observe(&child.timings);
            timings.push(child.timings);
        }
    }
    metrics::counter!("forkd_children_failed_total").increment(failures.len() as u64);
    tracing::info!(
        tag = %origin.snapshot_tag, up = sandboxes.len(), failed = failures.len(),
        took_ms = order.arrived.elapsed().as_millis() as u64, "spawned"
    );
    Ok(SpawnReport { sandboxes, failures, timings, total_us, warnings: Vec::new() })
}

fn observe(timings: &SpawnTimings) {
    metrics::counter!("forkd_children_spawned_total").increment(1);
    metrics::histogram!("forkd_spawn_answered_seconds").record(timings.answered_us as f64 / 1e6);
    for stage in &timings.stages.0 {
        metrics::histogram!("forkd_spawn_stage_seconds", "stage" => stage.name.clone()).record(stage.us as f64 / 1e6);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_limits_are_checked_at_their_edges() {
        let check =
            |n, limit| Order::check(n, limits::asked(limit, None), (None, None), Instant::now()).map(|order| order.n);
        assert_eq!(check(1, None).expect("one"), 1);
        assert_eq!(check(1000, Some(64)).expect("a thousand"), 1000);
        assert!(matches!(check(0, None), Err(NodeError::SpawnCount { n: 0 })));
        assert!(matches!(check(1001, None), Err(NodeError::SpawnCount { n: 1001 })));
        assert!(matches!(check(1, Some(0)), Err(NodeError::BadField { field: "memory_limit_mib", .. })));
    }
}
