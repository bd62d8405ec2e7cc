//! The lifecycle of one child.
//!
//! ```text
//!            fork sent                 agent answered               monitor ends by itself
//! (nothing) ──────────► Starting ───────────────────► Running ───────────────────────────► Stopped
//!                           │ failure, deadline,         │ removed                            │ removed, or
//!                           │ caller gone                │                                    │ kept long enough
//!                           ▼                            ▼                                    ▼
//!                       (nothing)  ◄── process ended, files unlinked, record forgotten ── (nothing)
//! ```
//!
//! *Starting* is a [`Newborn`], which undoes itself when dropped; the others are a [`Sandbox`] in the
//! [`Roster`]. A stopped sandbox keeps its reason and its console until it is removed. Every step
//! into or out of *Running* is recorded in the database.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use forkd_types::rest::{GUEST_ADDR, SandboxInfo};
use forkd_types::{SandboxId, Tag};

use crate::control::Control;
use crate::error::{NodeError, NodeResult};
use crate::guest::Guest;
use crate::host::{Host, unix_now};
use crate::process::Process;

/// How long a monitor that closed its control connection may take to end.
const ENDING_LIMIT: Duration = Duration::from_secs(5);

/// The live part of a sandbox.
pub(crate) struct Running {
    /// Its monitor's control connection.
    pub(crate) control: Arc<Control>,
    /// Its monitor.
    pub(crate) process: Process,
}

#[derive(Clone)]
enum Condition {
    Running(Arc<Running>),
    Stopped { reason: String, at_unix: u64 },
}

/// One sandbox that clients know of.
pub(crate) struct Sandbox {
    pub(crate) id: SandboxId,
    pub(crate) snapshot_tag: Tag,
    pub(crate) created_at_unix: u64,
    pub(crate) memory_limit_mib: Option<u64>,
    guest: Guest,
    condition: Mutex<Condition>,
}

impl Sandbox {
    /// A sandbox that ended before this daemon started.
    pub(crate) fn stopped(host: &Host, about: About, reason: String, at_unix: u64) -> Arc<Self> {
        Self::new(host, about, Condition::Stopped { reason, at_unix })
    }

    fn new(host: &Host, about: About, condition: Condition) -> Arc<Self> {
        let guest = Guest::behind(host.files.vsock(about.id.as_str()));
        let About { id, snapshot_tag, created_at_unix, memory_limit_mib } = about;
        Arc::new(Self { id, snapshot_tag, created_at_unix, memory_limit_mib, guest, condition: condition.into() })
    }

    /// Its live part.
    ///
    /// # Errors
    /// [`NodeError::SandboxStopped`] with the reason.
    pub(crate) fn running(&self) -> NodeResult<Arc<Running>> {
        match self.condition() {
            Condition::Running(running) => Ok(running),
            Condition::Stopped { reason, .. } => Err(NodeError::SandboxStopped { id: self.id.clone(), reason }),
        }
    }

    /// Its agent, while it runs.
    pub(crate) fn guest(&self) -> NodeResult<&Guest> {
        self.running()?;
        Ok(&self.guest)
    }

    /// What clients see of it.
    pub(crate) fn info(&self) -> SandboxInfo {
        let (pid, stopped) = match self.condition() {
            Condition::Running(running) => (Some(running.process.key().pid.unsigned_abs()), None),
            Condition::Stopped { reason, .. } => (None, Some(reason)),
        };
        SandboxInfo {
            id: self.id.clone(),
            snapshot_tag: self.snapshot_tag.clone(),
            netns: None,
            guest_addr: GUEST_ADDR.to_owned(),
            created_at_unix: self.created_at_unix,
            pid,
            memory_limit_mib: self.memory_limit_mib,
            has_branched: false,
            last_branch_memory_path: None,
            branch_count: 0,
            stopped,
        }
    }

    fn condition(&self) -> Condition {
        self.condition.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_stopped(&self, reason: String, at_unix: u64) {
        *self.condition.lock().unwrap_or_else(PoisonError::into_inner) = Condition::Stopped { reason, at_unix };
    }

    fn stopped_since(&self) -> Option<u64> {
        match self.condition() {
            Condition::Running(_) => None,
            Condition::Stopped { at_unix, .. } => Some(at_unix),
        }
    }
}

/// What a sandbox is, apart from its process.
#[derive(Clone, Debug)]
pub(crate) struct About {
    pub(crate) id: SandboxId,
    pub(crate) snapshot_tag: Tag,
    pub(crate) created_at_unix: u64,
    pub(crate) memory_limit_mib: Option<u64>,
}

/// A child that nobody has been told of yet; dropping it removes every trace.
pub(crate) struct Newborn {
    host: Arc<Host>,
    id: SandboxId,
    running: Option<Running>,
    grown_up: bool,
}

impl Newborn {
    /// Takes charge of the recorded id; its process comes later, or never.
    pub(crate) fn expecting(host: &Arc<Host>, id: SandboxId) -> Self {
        Self { host: Arc::clone(host), id, running: None, grown_up: false }
    }

    /// Its id.
    pub(crate) fn id(&self) -> &SandboxId {
        &self.id
    }

    /// Takes charge of its monitor.
    pub(crate) fn born(&mut self, running: Running) {
        self.host.database.note_process(self.id.clone(), running.process.key());
        self.running = Some(running);
    }

    /// Its live part, once born.
    pub(crate) fn running(&self) -> Option<&Running> {
        self.running.as_ref()
    }

    fn grow_up(mut self) -> Option<Running> {
        let running = self.running.take()?;
        self.grown_up = true;
        Some(running)
    }
}

impl Drop for Newborn {
    fn drop(&mut self) {
        if self.grown_up {
            return;
        }
        let Some(running) = self.running.take() else { return clear(&self.host, &self.id) };
        running.process.kill();
        let (host, id) = (Arc::clone(&self.host), self.id.clone());
        tokio::spawn(async move {
            running.process.exited().await;
            clear(&host, &id);
        });
    }
}

/// Removes what is left of a sandbox whose process has ended, or never was.
pub(crate) fn clear(host: &Host, id: &SandboxId) {
    host.files.remove(id.as_str(), false);
    host.cgroups.remove(id.as_str());
    host.database.forget(vec![id.clone()]);
}

/// Every sandbox that clients know of.
pub(crate) struct Roster {
    host: Arc<Host>,
    sandboxes: RwLock<BTreeMap<SandboxId, Arc<Sandbox>>>,
}

impl Roster {
    /// An empty roster.
    pub(crate) fn new(host: Arc<Host>) -> Arc<Self> {
        Arc::new(Self { host, sandboxes: RwLock::default() })
    }

    /// The sandbox called `id`.
    pub(crate) fn get(&self, id: &SandboxId) -> NodeResult<Arc<Sandbox>> {
        let sandboxes = self.sandboxes.read().unwrap_or_else(PoisonError::into_inner);
        sandboxes.get(id).cloned().ok_or_else(|| NodeError::SandboxNotFound { id: id.clone() })
    }

    /// All sandboxes in the order of their ids.
    pub(crate) fn all(&self) -> Vec<Arc<Sandbox>> {
        self.sandboxes.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Takes in a child whose agent has answered and watches over it.
    pub(crate) fn admit(self: &Arc<Self>, about: About, newborn: Newborn) -> Option<Arc<Sandbox>> {
        let running = newborn.grow_up()?;
        Some(self.watch_over(about, running))
    }

    /// Takes in a sandbox found running.
    pub(crate) fn adopt(self: &Arc<Self>, about: About, running: Running) -> Arc<Sandbox> {
        self.watch_over(about, running)
    }

    fn watch_over(self: &Arc<Self>, about: About, running: Running) -> Arc<Sandbox> {
        let running = Arc::new(running);
        let sandbox = Sandbox::new(&self.host, about, Condition::Running(Arc::clone(&running)));
        self.insert(Arc::clone(&sandbox));
        tokio::spawn(Arc::clone(self).watch(Arc::clone(&sandbox), running));
        sandbox
    }

    /// Takes in a sandbox that is not running.
    pub(crate) fn insert(&self, sandbox: Arc<Sandbox>) {
        let mut sandboxes = self.sandboxes.write().unwrap_or_else(PoisonError::into_inner);
        sandboxes.insert(sandbox.id.clone(), sandbox);
    }

    /// Ends a sandbox at once; the rest of the work follows when its process has ended.
    pub(crate) fn remove(&self, id: &SandboxId) -> NodeResult<()> {
        let removed = self.sandboxes.write().unwrap_or_else(PoisonError::into_inner).remove(id);
        let sandbox = removed.ok_or_else(|| NodeError::SandboxNotFound { id: id.clone() })?;
        match sandbox.running() {
            Ok(running) => {
                running.process.kill();
                // At once, so that a restart meanwhile does not list it as one that ended by itself.
                self.host.database.forget(vec![id.clone()]);
            }
            Err(_) => clear(&self.host, id),
        }
        Ok(())
    }

    /// Forgets sandboxes that stopped by themselves long ago.
    pub(crate) fn forget_stopped(&self) {
        let limit = self.host.config.keep_stopped.as_secs();
        let now = unix_now();
        for sandbox in self.all() {
            if sandbox.stopped_since().is_some_and(|since| since + limit < now) {
                let _ = self.remove(&sandbox.id);
            }
        }
    }

    async fn watch(self: Arc<Self>, sandbox: Arc<Sandbox>, running: Arc<Running>) {
        let ending = tokio::select! {
            ending = running.control.closed() => {
                if tokio::time::timeout(ENDING_LIMIT, running.process.exited()).await.is_err() {
                    tracing::warn!(sandbox = %sandbox.id, "ending a monitor that closed its control connection");
                    running.process.kill();
                    running.process.exited().await;
                }
                ending
            }
            () = running.process.exited() => {
                // What it said last is still in the socket, followed by the end; forks of it may
                // hold the connection open, so the wait is bounded.
                match tokio::time::timeout(Duration::from_secs(1), running.control.closed()).await {
                    Ok(ending) => ending,
                    Err(_) => crate::control::Ending { stopped: None, fault: None },
                }
            }
        };
        if self.note_stopped(&sandbox, ending.describe()) {
            self.host.files.remove(sandbox.id.as_str(), true);
            self.host.cgroups.remove(sandbox.id.as_str());
        } else {
            clear(&self.host, &sandbox.id);
        }
    }

    /// Marks a sandbox as stopped unless it was removed; a removal sees it either running or stopped,
    /// never in between.
    fn note_stopped(&self, sandbox: &Arc<Sandbox>, reason: String) -> bool {
        let sandboxes = self.sandboxes.write().unwrap_or_else(PoisonError::into_inner);
        let known = sandboxes.get(&sandbox.id).is_some_and(|known| Arc::ptr_eq(known, sandbox));
        if known {
            let at_unix = unix_now();
            tracing::warn!(sandbox = %sandbox.id, reason, "sandbox stopped");
            sandbox.set_stopped(reason.clone(), at_unix);
            self.host.database.stopped(sandbox.id.clone(), reason, at_unix);
        }
        known
    }
}
