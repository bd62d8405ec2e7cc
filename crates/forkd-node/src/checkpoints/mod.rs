//! Checkpoints of sandboxes: machines of one instant, that a sandbox can be brought back to.
//!
//! ```text
//!  sandbox ──checkpoint──► a ──checkpoint──► b ──checkpoint──► c        (oldest first)
//!     ▲                                      │
//!     └────────── rewind b ──────────────────┘   c goes, a and b stay
//!
//!              checkpoint          over the budget, or asked for          no longer needed
//!  (nothing) ─────────────► frozen ──────────────────────────────► on disk ───────────────► (nothing)
//!                              └────────────── removed, sandbox gone ──────────────────────────┘
//! ```
//!
//! A rewind brings up a copy of the checkpoint, waits until its agent answers, and only then ends the machine
//! that the sandbox had. Until then nothing has happened to the sandbox; its id stays the same throughout.
//!
//! All are on record, and outlive the daemon as sandboxes do.

mod line;
mod recovery;
mod spill;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use forkd_proto::monitor::Command;
use forkd_types::rest::{CheckpointInfo, CheckpointRequest, EventKind, RewindRequest};
use forkd_types::{PageCount, SandboxId, StageTimings};

use crate::allotment::Allotment;
use crate::birth::{self, Parent, Parts, Stopwatch};
use crate::branch::Brancher;
use crate::control::expect_event;
use crate::error::{NodeError, NodeResult, with_causes};
use crate::events::News;
use crate::frozen::{Frozen, Lifetime};
use crate::host::{Host, Traces, unix_now};
use crate::limits;
use crate::sandbox::{Roster, Running, Sandbox, discard};
use crate::zygotes::ZygoteKey;
use line::{Checkpoint, Held, Line};

/// The most automatic checkpoints of one sandbox; the oldest goes when there is one more.
const MOST_AUTOMATIC: usize = 64;

/// All checkpoints of a node's sandboxes.
pub(crate) struct Checkpoints {
    host: Arc<Host>,
    roster: Arc<Roster>,
    /// Writes those that go to disk.
    brancher: Brancher,
    lines: Mutex<HashMap<SandboxId, Line>>,
    /// Held while one goes to disk, and while snapshots are removed that nobody needs.
    moving: tokio::sync::Mutex<()>,
}

impl Checkpoints {
    /// None yet.
    pub(crate) fn new(host: Arc<Host>, roster: Arc<Roster>, brancher: Brancher) -> Self {
        Self { host, roster, brancher, lines: Mutex::default(), moving: tokio::sync::Mutex::default() }
    }

    fn lines(&self) -> MutexGuard<'_, HashMap<SandboxId, Line>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Freezes `sandbox` as it is now.
    pub(crate) async fn take(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        request: CheckpointRequest,
    ) -> NodeResult<CheckpointInfo> {
        let name = {
            let mut lines = self.lines();
            let line = lines.entry(sandbox.id.clone()).or_default();
            match request.name {
                Some(name) => line.check_name(&sandbox.id, name)?,
                None => line.free_name("cp"),
            }
        };
        let info = self.freeze(sandbox, name, false).await?;
        if request.disk {
            let spilled = self.spill(&sandbox.id, &info.name).await?;
            return Ok(CheckpointInfo { stages: info.stages, ..spilled });
        }
        self.trim();
        Ok(info)
    }

    /// Freezes `sandbox` before a program runs in it, if that is what it was made for.
    pub(crate) async fn take_automatically(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> NodeResult<()> {
        if !sandbox.origin.auto_checkpoint {
            return Ok(());
        }
        let (name, surplus) = {
            let mut lines = self.lines();
            let line = lines.entry(sandbox.id.clone()).or_default();
            let automatic = || line.points.iter().filter(|point| point.automatic);
            let surplus: Vec<_> = automatic().map(|point| point.name.clone()).collect();
            let surplus = surplus[..surplus.len().saturating_sub(MOST_AUTOMATIC - 1)].to_vec();
            (line.free_name("exec"), surplus)
        };
        self.freeze(sandbox, name, true).await?;
        for name in surplus {
            // It may have been removed meanwhile.
            let _ = self.remove(&sandbox.id, &name);
        }
        self.trim();
        Ok(())
    }

    async fn freeze(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        name: String,
        automatic: bool,
    ) -> NodeResult<CheckpointInfo> {
        let _turn = sandbox.turn.lock().await;
        let base = sandbox.base();
        let frozen = Arc::new(Frozen::of(&self.host, sandbox, Lifetime::Checkpoint).await?);
        let (pause_us, disks) = (frozen.pause_us, frozen.disks);
        let held = Held::Frozen(frozen);
        let point = Checkpoint { name, created_at_unix: unix_now(), pause_us, disks, automatic, base, held };
        let info = point.info();
        self.host.database.note_checkpoint(point.record(&sandbox.id));
        {
            let mut lines = self.lines();
            let line = lines.entry(sandbox.id.clone()).or_default();
            // Another request may have taken the name meanwhile.
            if line.points.iter().any(|other| other.name == point.name) {
                point.end();
                return Err(NodeError::CheckpointExists { id: sandbox.id.clone(), name: point.name });
            }
            self.host.events.tell(News::of(EventKind::CheckpointCreated).sandbox(&sandbox.id).checkpoint(&point.name));
            line.points.push(point);
        }
        if self.roster.get(&sandbox.id).is_err() {
            // Removed meanwhile.
            self.forget(&sandbox.id);
            return Err(NodeError::SandboxNotFound { id: sandbox.id.clone() });
        }
        Ok(info)
    }

    /// The checkpoints of `sandbox`, oldest first, with what each takes now.
    pub(crate) async fn list(&self, sandbox: &Sandbox) -> Vec<CheckpointInfo> {
        let points: Vec<Checkpoint> = self.lines().get(&sandbox.id).map(|line| line.points.clone()).unwrap_or_default();
        let mut infos = Vec::with_capacity(points.len());
        for point in points {
            let mut info = point.info();
            match &point.held {
                Held::Frozen(frozen) => {
                    let event = frozen.control.request(&Command::Pages, Vec::new()).wait().await;
                    let counted = event.and_then(|event| expect_event!(point.name, event, Pages { private_count }));
                    info.private_bytes = counted.ok().map(|pages| PageCount(pages).bytes());
                }
                Held::Snapshot(snapshot) => info.stored_bytes = self.stored_bytes(snapshot).await,
            }
            infos.push(info);
        }
        infos
    }

    /// Removes one checkpoint.
    pub(crate) fn remove(self: &Arc<Self>, id: &SandboxId, name: &str) -> NodeResult<()> {
        let removed = {
            let mut lines = self.lines();
            let line = lines.entry(id.clone()).or_default();
            let at = line.position(id, name)?;
            line.points.remove(at)
        };
        self.let_go(id, [removed]);
        Ok(())
    }

    /// Removes the checkpoints of sandboxes that nobody knows any more.
    pub(crate) fn forget_orphans(self: &Arc<Self>) {
        let gone: Vec<SandboxId> = self.lines().keys().filter(|id| self.roster.get(id).is_err()).cloned().collect();
        for id in gone {
            self.forget(&id);
        }
    }

    /// Removes all checkpoints of a sandbox that is gone.
    pub(crate) fn forget(self: &Arc<Self>, id: &SandboxId) {
        let line = self.lines().remove(id);
        self.let_go(id, line.into_iter().flat_map(|line| line.points));
    }

    /// What is left to do when `points` are in no line any more.
    fn let_go(self: &Arc<Self>, id: &SandboxId, points: impl IntoIterator<Item = Checkpoint>) {
        let mut left_a_snapshot = false;
        for point in points {
            point.end();
            left_a_snapshot |= matches!(point.held, Held::Snapshot(_));
            self.host.events.tell(News::of(EventKind::CheckpointRemoved).sandbox(id).checkpoint(&point.name));
            self.host.database.forget_checkpoint(id.clone(), point.name);
        }
        // Most sandboxes end without: a sweep lists the whole store, and the next regular one finds the rest.
        if left_a_snapshot {
            self.sweep_soon();
        }
    }

    /// Brings `sandbox` back to a checkpoint; those taken after it go. Also brings back one that ended.
    ///
    /// # Errors
    /// The sandbox and its checkpoints are as they were, after each of them.
    pub(crate) async fn rewind(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        request: &RewindRequest,
    ) -> NodeResult<CheckpointInfo> {
        let _turn = sandbox.turn.lock().await;
        let point = self.find(&sandbox.id, request)?;
        let id = &sandbox.id;
        let failed = |reason| NodeError::Rewind { id: id.clone(), name: point.name.clone(), reason };
        let running = self.raise(sandbox, &point).await.map_err(failed)?;
        self.roster.replace(sandbox, running, point.base_of_copies()).await?;
        let later = match self.lines().get_mut(id) {
            Some(line) => match line.position(id, &point.name) {
                Ok(at) => line.points.split_off(at + 1),
                // It was removed meanwhile, and what came after it is no longer known.
                Err(_) => Vec::new(),
            },
            None => Vec::new(),
        };
        self.let_go(id, later);
        tracing::info!(sandbox = %id, checkpoint = point.name, "rewound");
        self.host.events.tell(News::of(EventKind::SandboxRewound).sandbox(id).checkpoint(&point.name));
        Ok(point.info())
    }

    fn find(&self, id: &SandboxId, request: &RewindRequest) -> NodeResult<Checkpoint> {
        let mut lines = self.lines();
        let line = lines.entry(id.clone()).or_default();
        let at = match (&request.name, request.back) {
            (Some(_), Some(back)) => {
                let rule = "give the name or how far back, not both";
                return Err(NodeError::BadField { field: "back", value: back.to_string(), rule });
            }
            (Some(name), None) => line.position(id, name)?,
            (None, back) => line.back(id, back.unwrap_or(1))?,
        };
        Ok(line.points[at].clone())
    }

    /// What copies of `point` are forked from.
    async fn parent(&self, point: &Checkpoint) -> Result<Parent, String> {
        match &point.held {
            Held::Frozen(frozen) => Ok(Parent::Frozen(Arc::clone(frozen))),
            Held::Snapshot(snapshot) => {
                let key = ZygoteKey { tag: snapshot.tag.clone(), huge_pages: false };
                let zygote = self.brancher.zygotes.lease(&key).await.map_err(|error| with_causes(&error))?;
                Ok(Parent::Zygote(zygote))
            }
        }
    }

    /// Brings up a machine from `point`, whose run files then take the places of the sandbox's.
    async fn raise(&self, sandbox: &Sandbox, point: &Checkpoint) -> Result<Running, String> {
        let id = &sandbox.id;
        let parent = self.parent(point).await?;
        // Gone again when this fails, or when its files have taken the sandbox's names.
        let traces = Traces::of(&self.host, rewinding_name(id));
        let (limits, name) = (&sandbox.origin.limits, group_name(id));
        let promise = self.host.admission.promise(limits::memory(limits));
        let allotment = Allotment::make(&self.host.groups, &name, limits, promise);
        let network = match sandbox.machine().and_then(|machine| machine.network.clone()) {
            // Until the machine before has ended, a packet reaches one or the other.
            Some(network) => Some(network),
            None => parent.network(&self.host, id.as_str(), false).await?,
        };
        let parts =
            allotment.and_then(|allotment| Parts::make(&self.host, traces.name(), point.disks, allotment, network));
        let parts = parts.map_err(|error| with_causes(&error))?;
        let mut stages = StageTimings::default();
        let mut watch = Stopwatch::start(&mut stages);
        let (name, host) = (traces.name().to_owned(), Arc::clone(&self.host));
        let forking = tokio::spawn(async move {
            let forked = birth::fork(parent, &name, parts).await?;
            let key = forked.process.key();
            // Until it is the sandbox's own, a restarted daemon ends it.
            host.database.note_helper(key, name);
            let birth::Forked { control, process, allotment, network, running: answer, .. } = forked;
            let running = Running { control, process, allotment, network };
            Ok::<_, String>((Rising(Some(running)), answer))
        });
        let (mut rising, answer) = forking.await.map_err(|error| format!("it was interrupted: {error}"))??;
        let risen = rising.0.as_ref().expect("it is taken below");
        let deadline = self.host.config.child_deadline;
        let coming = birth::rise(&self.host, traces.name(), id, answer, &mut watch);
        match tokio::time::timeout(deadline, risen.control.while_running(coming)).await {
            Ok(outcome) => outcome?,
            Err(_) => return Err(format!("its agent did not answer within {} s", deadline.as_secs())),
        }
        self.host
            .files
            .rename(traces.name(), id.as_str())
            .map_err(|error| format!("cannot move its sockets: {error}"))?;
        self.host.database.forget_helper(risen.process.key());
        Ok(rising.0.take().expect("nobody else takes it"))
    }
}

/// A machine on its way up; it is ended when this is dropped with it.
struct Rising(Option<Running>);

impl Drop for Rising {
    fn drop(&mut self) {
        if let Some(running) = self.0.take() {
            discard(Arc::new(running));
        }
    }
}

/// What a machine is called until it is the sandbox's own.
fn rewinding_name(id: &SandboxId) -> String {
    format!("{id}-rewinding")
}

/// What the control group of a machine that a sandbox is rewound to is called: that of the one before may be there
/// still.
fn group_name(id: &SandboxId) -> String {
    static SERIAL: AtomicU64 = AtomicU64::new(0);
    format!("{id}-{:08x}-{:x}", unix_now(), SERIAL.fetch_add(1, Ordering::Relaxed))
}
