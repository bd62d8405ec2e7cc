//! Many children at once, each with its own outcome.
//!
//! All children come up concurrently, a bounded number at a time; each has its own deadline, and one
//! that fails is removed without touching the others. The forks of a wave go to the zygote
//! pipelined. Nothing of a spawn outlives a caller that goes away before it is told the ids.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forkd_proto::monitor::{Command, Role};
use forkd_types::rest::{SPAWN_LIMIT, SpawnFailure, SpawnReport, SpawnRequest, SpawnTimings};
use forkd_types::{ByteSize, SandboxId, StageTimings, Tag};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::console;
use crate::control::{Control, expect_event};
use crate::database::Batch;
use crate::error::{NodeError, NodeResult, with_causes};
use crate::guest::{Guest, fresh_identity};
use crate::host::{Host, unix_now};
use crate::launch::socket_pair;
use crate::process::Process;
use crate::sandbox::{About, Newborn, Roster, Running};
use crate::zygotes::{Zygote, ZygoteKey, Zygotes};

/// What a spawn is to do, checked.
struct Order {
    key: ZygoteKey,
    n: u32,
    memory_limit: Option<ByteSize>,
    arrived: Instant,
}

impl Order {
    fn check(request: &SpawnRequest, arrived: Instant) -> NodeResult<Self> {
        if !(1..=SPAWN_LIMIT).contains(&request.n) {
            return Err(NodeError::SpawnCount { n: request.n });
        }
        let tag: Tag = request.snapshot_tag.parse()?;
        if request.memory_limit_mib == Some(0) {
            let (field, value) = ("memory_limit_mib", "0".to_owned());
            return Err(NodeError::BadField { field, value, rule: "leave it out for no limit" });
        }
        Ok(Self {
            key: ZygoteKey { tag, huge_pages: request.hugepages },
            n: request.n,
            memory_limit: request.memory_limit_mib.map(|mib| ByteSize(mib.saturating_mul(1 << 20))),
            arrived,
        })
    }
}

/// Why one child did not come up, for its place in the report.
type Reason = String;

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
    let order = Order::check(request, arrived)?;
    let zygote = zygotes.lease(&order.key).await?;
    let batch = Batch {
        snapshot_tag: order.key.tag.clone(),
        created_at_unix: unix_now(),
        memory_limit_mib: request.memory_limit_mib,
        disks: zygote.disks,
    };
    let ids = host.database.begin(batch.clone(), order.n).await?;
    let leased = arrived.elapsed();

    let turns = Arc::new(Semaphore::new(host.config.spawn_concurrency));
    let mut coming = JoinSet::new();
    for id in ids {
        let newborn = Newborn::expecting(host, id);
        let (host, zygote, turns) = (Arc::clone(host), Arc::clone(&zygote), Arc::clone(&turns));
        let memory_limit = order.memory_limit;
        coming.spawn(async move {
            let id = newborn.id().clone();
            let _turn = turns.acquire_owned().await.expect("the semaphore is never closed");
            let mut stages = StageTimings::default();
            stages.record("lease", leased);
            stages.record("queue", arrived.elapsed().saturating_sub(leased));
            let limit = host.config.child_deadline;
            let rising = bring_up(&host, &zygote, newborn, memory_limit, &mut stages);
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
    admit(host, roster, &order, &batch, up, failures, total_us).await
}

/// Records the children that are up and makes them known.
async fn admit(
    host: &Host,
    roster: &Arc<Roster>,
    order: &Order,
    batch: &Batch,
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
        let about = About {
            id: child.newborn.id().clone(),
            snapshot_tag: order.key.tag.clone(),
            created_at_unix: batch.created_at_unix,
            memory_limit_mib: batch.memory_limit_mib,
        };
        if let Some(sandbox) = roster.admit(about, child.newborn) {
            sandboxes.push(sandbox.info());
            observe(&child.timings);
            timings.push(child.timings);
        }
    }
    metrics::counter!("forkd_children_failed_total").increment(failures.len() as u64);
    tracing::info!(
        tag = %order.key.tag, up = sandboxes.len(), failed = failures.len(),
        took_ms = order.arrived.elapsed().as_millis() as u64, "spawned"
    );
    Ok(SpawnReport { sandboxes, failures, timings, total_us })
}

fn observe(timings: &SpawnTimings) {
    metrics::counter!("forkd_children_spawned_total").increment(1);
    metrics::histogram!("forkd_spawn_answered_seconds").record(timings.answered_us as f64 / 1e6);
    for stage in &timings.stages.0 {
        metrics::histogram!("forkd_spawn_stage_seconds", "stage" => stage.name.clone()).record(stage.us as f64 / 1e6);
    }
}

/// Measures consecutive stages.
struct Stopwatch<'a> {
    stages: &'a mut StageTimings,
    since: Instant,
}

impl<'a> Stopwatch<'a> {
    fn start(stages: &'a mut StageTimings) -> Self {
        Self { stages, since: Instant::now() }
    }

    fn lap(&mut self, stage: &str) {
        let now = Instant::now();
        self.stages.record(stage, now - self.since);
        self.since = now;
    }

    /// Takes in a monitor's own account of a stage that lies within one of ours.
    fn detail(&mut self, within: &str, account: &StageTimings) {
        for stage in &account.0 {
            self.stages.record(&format!("{within}.{}", stage.name), Duration::from_micros(stage.us));
        }
    }
}

/// Forks one child and waits until its agent has answered.
async fn bring_up(
    host: &Arc<Host>,
    zygote: &Arc<Zygote>,
    newborn: Newborn,
    memory_limit: Option<ByteSize>,
    stages: &mut StageTimings,
) -> Result<Newborn, Reason> {
    let mut watch = Stopwatch::start(stages);
    let id = newborn.id().clone();
    let parts = Parts::make(host, &id, zygote.disks, memory_limit).map_err(|error| with_causes(&error))?;
    watch.lap("prepare");
    // In a task of its own, which ends only when the new process is known and owned: a fork that
    // was asked for happens even if nobody waits for it any longer.
    let forking = tokio::spawn(fork(Arc::clone(zygote), newborn, parts));
    let Forked { newborn, running, stages: forked } =
        forking.await.map_err(|error| format!("the fork was interrupted: {error}"))??;
    watch.lap("fork");
    watch.detail("fork", &forked);
    let control = newborn.running().map(|running| Arc::clone(&running.control)).expect("a forked child has a process");
    control.while_running(rise(host, &id, running, &mut watch)).await?;
    Ok(newborn)
}

/// From the fork until the agent has answered.
async fn rise(
    host: &Host,
    id: &SandboxId,
    running: crate::control::Answer,
    watch: &mut Stopwatch<'_>,
) -> Result<(), Reason> {
    let restored = running.wait().await.map_err(|error| error.to_string())?;
    let restored = expect_event!(id, restored, Running { stages }).map_err(|error| error.to_string())?;
    watch.lap("restore");
    watch.detail("restore", &restored);
    let guest = Guest::behind(host.files.vsock(id.as_str()));
    let connection = guest.connect_patiently().await.map_err(|error| error.to_string())?;
    watch.lap("connect");
    let identity = fresh_identity(id).map_err(|error| format!("cannot make its identity: {error}"))?;
    let warnings = guest.identify(connection, &identity).await.map_err(|error| error.to_string())?;
    watch.lap("identify");
    if !warnings.is_empty() {
        tracing::warn!(sandbox = %id, ?warnings, "the copy could not take on all of its identity");
    }
    Ok(())
}

/// What a child is given.
struct Parts {
    roles: Vec<Role>,
    fds: Vec<OwnedFd>,
    control: tokio::net::UnixStream,
}

impl Parts {
    fn make(host: &Host, id: &SandboxId, disks: usize, memory_limit: Option<ByteSize>) -> NodeResult<Self> {
        let files = &host.files;
        let name = id.as_str();
        let (control, theirs) = socket_pair().map_err(NodeError::io("make a control socket"))?;
        let mut roles = vec![Role::Control];
        let mut fds = vec![theirs];
        for (role, path) in [(Role::ControlListener, files.control(name)), (Role::VsockListener, files.vsock(name))] {
            roles.push(role);
            fds.push(files.listen(&path).map_err(NodeError::io(format!("listen on {}", path.display())))?);
        }
        let path = files.console(name);
        let console = console::create(&path).map_err(NodeError::io(format!("create {}", path.display())))?;
        roles.push(Role::Console);
        fds.push(console.into());
        for _ in 0..disks {
            roles.push(Role::DiskOverlay);
            fds.push(files.overlay().map_err(NodeError::io("create a scratch file for a disk"))?);
        }
        if let Some(limit) = memory_limit {
            match host.cgroups.limited(name, limit) {
                Ok(group) => {
                    roles.push(Role::Cgroup);
                    fds.push(group);
                }
                Err(error) => tracing::warn!(sandbox = name, %error, "runs without its memory limit"),
            }
        }
        Ok(Self { roles, fds, control })
    }
}

/// A child that exists as a process.
struct Forked {
    newborn: Newborn,
    running: crate::control::Answer,
    stages: StageTimings,
}

async fn fork(zygote: Arc<Zygote>, mut newborn: Newborn, parts: Parts) -> Result<Forked, Reason> {
    let name = newborn.id().to_string();
    let (control, running) = Control::expecting(&name, parts.control);
    let command = Command::Fork { fds: parts.roles, name: name.clone() };
    let event = zygote.control.request(&command, parts.fds).wait().await.map_err(|error| error.to_string())?;
    let (pid, _pause_us, stages) =
        expect_event!(name, event, Forked { pid, pause_us, stages }).map_err(|error| error.to_string())?;
    let process = match Process::open(pid) {
        Ok(process) => process,
        Err(error) => {
            // It ended already; what it said before that is the better explanation.
            let ended = tokio::time::timeout(Duration::from_secs(1), running.wait()).await;
            return Err(match ended {
                Ok(Err(said)) => said.to_string(),
                _ => format!("its monitor, process {pid}, cannot be watched: {error}"),
            });
        }
    };
    newborn.born(Running { control, process });
    Ok(Forked { newborn, running, stages })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(tag: &str, n: u32) -> SpawnRequest {
        serde_json::from_value(serde_json::json!({ "snapshot_tag": tag, "n": n })).expect("valid")
    }

    #[test]
    fn counts_and_tags_are_checked_at_their_edges() {
        let check = |tag: &str, n| Order::check(&request(tag, n), Instant::now()).map(|order| order.n);
        assert_eq!(check("py", 1).expect("one"), 1);
        assert_eq!(check("py", 1000).expect("a thousand"), 1000);
        assert!(matches!(check("py", 0), Err(NodeError::SpawnCount { n: 0 })));
        assert!(matches!(check("py", 1001), Err(NodeError::SpawnCount { n: 1001 })));
        assert!(matches!(check("a b", 1), Err(NodeError::BadTag(_))));
    }

    #[test]
    fn laps_add_up_and_details_keep_their_place() {
        let mut stages = StageTimings::default();
        let mut watch = Stopwatch::start(&mut stages);
        watch.lap("fork");
        let mut inner = StageTimings::default();
        inner.record("vm", Duration::from_micros(150));
        watch.detail("fork", &inner);
        watch.lap("restore");
        let names: Vec<_> = stages.0.iter().map(|stage| stage.name.as_str()).collect();
        assert_eq!(names, ["fork", "fork.vm", "restore"]);
        assert_eq!(stages.get("fork.vm"), Some(Duration::from_micros(150)));
    }
}
