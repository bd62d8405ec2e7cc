//! Checkpoints of sandboxes: frozen copies, kept in memory, that a sandbox can be brought back to.
//!
//! ```text
//!  sandbox ──checkpoint──► a ──checkpoint──► b ──checkpoint──► c        (oldest first)
//!     ▲                                      │
//!     └────────── rewind b ──────────────────┘   c goes, a and b stay
//! ```
//!
//! A rewind forks a copy of the checkpoint, waits until its agent answers, and only then ends the machine
//! that the sandbox had. Until then nothing has happened to the sandbox; its id stays the same throughout.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use forkd_proto::monitor::Command;
use forkd_types::rest::{CheckpointInfo, CheckpointRequest, RewindRequest};
use forkd_types::{ByteSize, PageCount, SandboxId, StageTimings};

use crate::birth::{self, Parent, Parts, Stopwatch};
use crate::control::expect_event;
use crate::error::{NodeError, NodeResult, with_causes};
use crate::frozen::Frozen;
use crate::host::{Host, Traces, unix_now};
use crate::sandbox::{Roster, Running, Sandbox};

/// The longest name of a checkpoint.
const NAME_LIMIT: usize = 64;

/// A frozen copy with a name.
#[derive(Clone)]
struct Checkpoint {
    name: String,
    created_at_unix: u64,
    frozen: Arc<Frozen>,
}

#[derive(Default)]
struct Line {
    /// Oldest first.
    points: Vec<Checkpoint>,
    /// For names that are made up.
    serial: u64,
}

/// All checkpoints of a node's sandboxes.
pub(crate) struct Checkpoints {
    host: Arc<Host>,
    roster: Arc<Roster>,
    lines: Mutex<HashMap<SandboxId, Line>>,
}

impl Checkpoints {
    /// None yet.
    pub(crate) fn new(host: Arc<Host>, roster: Arc<Roster>) -> Self {
        Self { host, roster, lines: Mutex::default() }
    }

    fn lines(&self) -> MutexGuard<'_, HashMap<SandboxId, Line>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Freezes `sandbox` as it is now.
    pub(crate) async fn take(&self, sandbox: &Arc<Sandbox>, request: CheckpointRequest) -> NodeResult<CheckpointInfo> {
        let _turn = sandbox.turn.lock().await;
        let name = self.name_for(&sandbox.id, request.name)?;
        let frozen = Arc::new(Frozen::of(&self.host, sandbox).await?);
        let point = Checkpoint { name, created_at_unix: unix_now(), frozen };
        let info = point.info();
        self.lines().entry(sandbox.id.clone()).or_default().points.push(point);
        if self.roster.get(&sandbox.id).is_err() {
            // Removed meanwhile.
            self.forget(&sandbox.id);
            return Err(NodeError::SandboxNotFound { id: sandbox.id.clone() });
        }
        Ok(info)
    }

    /// The name that was asked for, if it is free and legal, or one that is.
    fn name_for(&self, id: &SandboxId, wanted: Option<String>) -> NodeResult<String> {
        let mut lines = self.lines();
        let line = lines.entry(id.clone()).or_default();
        let taken = |line: &Line, name: &str| line.points.iter().any(|point| point.name == name);
        let Some(name) = wanted else {
            loop {
                line.serial += 1;
                let name = format!("cp-{}", line.serial);
                if !taken(line, &name) {
                    return Ok(name);
                }
            }
        };
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if name.is_empty() || name.len() > NAME_LIMIT || !name.bytes().all(legal) {
            let rule = "use 1 to 64 letters, digits, dots, dashes and underscores";
            return Err(NodeError::BadField { field: "name", value: format!("{name:?}"), rule });
        }
        if taken(line, &name) {
            return Err(NodeError::CheckpointExists { id: id.clone(), name });
        }
        Ok(name)
    }

    /// The checkpoints of `sandbox`, oldest first, with what each holds now.
    pub(crate) async fn list(&self, sandbox: &Sandbox) -> Vec<CheckpointInfo> {
        let points: Vec<Checkpoint> = self.lines().get(&sandbox.id).map(|line| line.points.clone()).unwrap_or_default();
        let mut infos = Vec::with_capacity(points.len());
        for point in points {
            let event = point.frozen.control.request(&Command::Pages, Vec::new()).wait().await;
            let counted = event.and_then(|event| expect_event!(point.name, event, Pages { private_count }));
            let private_bytes = counted.ok().map(|pages| PageCount(pages).bytes());
            infos.push(CheckpointInfo { private_bytes, ..point.info() });
        }
        infos
    }

    /// Removes one checkpoint.
    pub(crate) fn remove(&self, id: &SandboxId, name: &str) -> NodeResult<()> {
        let mut lines = self.lines();
        let line = lines.entry(id.clone()).or_default();
        let at = line.position(id, name)?;
        line.points.remove(at);
        Ok(())
    }

    /// Removes the checkpoints of sandboxes that nobody knows any more.
    pub(crate) fn forget_orphans(&self) {
        let gone: Vec<SandboxId> = self.lines().keys().filter(|id| self.roster.get(id).is_err()).cloned().collect();
        for id in gone {
            self.forget(&id);
        }
    }

    /// Removes all checkpoints of a sandbox that is gone.
    pub(crate) fn forget(&self, id: &SandboxId) {
        let line = self.lines().remove(id);
        drop(line);
    }

    /// Brings `sandbox` back to a checkpoint; those taken after it go. Also brings back one that ended.
    ///
    /// # Errors
    /// The sandbox and its checkpoints are as they were, after each of them.
    pub(crate) async fn rewind(&self, sandbox: &Arc<Sandbox>, request: &RewindRequest) -> NodeResult<CheckpointInfo> {
        let _turn = sandbox.turn.lock().await;
        let (at, point) = self.find(&sandbox.id, request)?;
        let id = &sandbox.id;
        let failed = |reason| NodeError::Rewind { id: id.clone(), name: point.name.clone(), reason };
        let running = self.raise(sandbox, &point).await.map_err(failed)?;
        self.roster.replace(sandbox, running).await?;
        if let Some(line) = self.lines().get_mut(id) {
            line.points.truncate(at + 1);
        }
        tracing::info!(sandbox = %id, checkpoint = point.name, "rewound");
        Ok(point.info())
    }

    fn find(&self, id: &SandboxId, request: &RewindRequest) -> NodeResult<(usize, Checkpoint)> {
        let mut lines = self.lines();
        let line = lines.entry(id.clone()).or_default();
        let at = match (&request.name, request.back) {
            (Some(_), Some(back)) => {
                let rule = "give the name or how far back, not both";
                return Err(NodeError::BadField { field: "back", value: back.to_string(), rule });
            }
            (Some(name), None) => line.position(id, name)?,
            (None, back) => {
                let back = back.unwrap_or(1);
                let at = (back > 0).then(|| line.points.len().checked_sub(back as usize)).flatten();
                at.ok_or_else(|| line.not_found(id, &format!("{back} back")))?
            }
        };
        Ok((at, line.points[at].clone()))
    }

    /// Brings up a machine from `point`, whose run files then take the places of the sandbox's.
    async fn raise(&self, sandbox: &Sandbox, point: &Checkpoint) -> Result<Running, String> {
        let id = &sandbox.id;
        // Gone again when this fails, or when its files have taken the sandbox's names.
        let traces = Traces::of(&self.host, rewinding_name(id));
        let limit = sandbox.origin.memory_limit_mib.map(|mib| ByteSize(mib.saturating_mul(1 << 20)));
        let parts =
            Parts::make(&self.host, traces.name(), point.frozen.disks, limit).map_err(|error| with_causes(&error))?;
        let mut stages = StageTimings::default();
        let mut watch = Stopwatch::start(&mut stages);
        let (parent, name, host) =
            (Parent::Frozen(Arc::clone(&point.frozen)), traces.name().to_owned(), Arc::clone(&self.host));
        let forking = tokio::spawn(async move {
            let forked = birth::fork(parent, &name, parts).await?;
            let key = forked.process.key();
            // Until it is the sandbox's own, a restarted daemon ends it.
            host.database.note_helper(key, name);
            let running = Running { control: forked.control, process: forked.process };
            Ok::<_, String>((Rising(Some(running)), forked.running))
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
            running.process.kill();
        }
    }
}

/// What a machine is called until it is the sandbox's own. Its control group keeps the name.
pub(crate) fn rewinding_name(id: &SandboxId) -> String {
    format!("{id}-rewinding")
}

impl Line {
    fn position(&self, id: &SandboxId, name: &str) -> NodeResult<usize> {
        self.points.iter().position(|point| point.name == name).ok_or_else(|| self.not_found(id, name))
    }

    fn not_found(&self, id: &SandboxId, wanted: &str) -> NodeError {
        let have = self.points.iter().map(|point| point.name.clone()).collect();
        NodeError::CheckpointNotFound { id: id.clone(), wanted: wanted.to_owned(), have }
    }
}

impl Checkpoint {
    fn info(&self) -> CheckpointInfo {
        CheckpointInfo {
            name: self.name.clone(),
            created_at_unix: self.created_at_unix,
            pause_us: self.frozen.pause_us,
            private_bytes: None,
        }
    }
}
