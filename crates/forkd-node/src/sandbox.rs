//! One child, from its birth to its end, and the roster of all of them.
//!
//! Which states there are and what leads from which to which is in [`crate::lifecycle`]. A child that is
//! starting is a [`Newborn`]; after that it is a [`Sandbox`] in the [`Roster`]. A stopped sandbox keeps its reason and
//! its console until it is removed. Every step into or out of *running* is recorded in the database.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use forkd_types::SandboxId;
use forkd_types::rest::{EventKind, GUEST_ADDR, SandboxInfo};

use crate::activity::{Activity, InUse};
use crate::allotment::Allotment;
use crate::control::Control;
use crate::database::{Base, Branches, Expiry, Origin};
use crate::error::{NodeError, NodeResult};
use crate::events::News;
use crate::guest::Guest;
use crate::host::{Host, blocking, unix_now};
use crate::lifecycle::{self, End, Refusal, Step};
use crate::networks::Network;
use crate::process::Process;

/// How long a monitor that closed its control connection may take to end.
const ENDING_LIMIT: Duration = Duration::from_secs(5);

/// The live part of a sandbox.
pub(crate) struct Running {
    /// Its monitor's control connection.
    pub(crate) control: Arc<Control>,
    /// Its monitor.
    pub(crate) process: Process,
    /// What the host set aside for it.
    pub(crate) allotment: Allotment,
    /// What it is plugged into.
    pub(crate) network: Option<Network>,
}

type Condition = lifecycle::Condition<Arc<Running>>;

/// One sandbox that clients know of.
pub(crate) struct Sandbox {
    pub(crate) id: SandboxId,
    pub(crate) origin: Origin,
    branches: Mutex<Branches>,
    /// What its memory and disks are changes of.
    base: Mutex<Option<Base>>,
    guest: Guest,
    condition: Mutex<Condition>,
    expiry: Mutex<Option<Expiry>>,
    pub(crate) activity: Activity,
    /// Held by what replaces or copies the machine, so that only one such thing is done at a time.
    pub(crate) turn: tokio::sync::Mutex<()>,
}

impl Sandbox {
    /// A sandbox that ended before this daemon started.
    pub(crate) fn stopped(host: &Host, about: About, end: End, at_unix: u64) -> Arc<Self> {
        Self::new(host, about, Condition::Stopped { end, at_unix })
    }

    fn new(host: &Host, about: About, condition: Condition) -> Arc<Self> {
        let guest = Guest::behind(host.files.vsock(about.id.as_str()));
        let About { id, origin, branches, expiry } = about;
        let (branches, base, condition) = (branches.into(), origin.base().into(), condition.into());
        let (expiry, activity, turn) = (expiry.into(), Activity::now(), tokio::sync::Mutex::default());
        Arc::new(Self { id, origin, branches, base, guest, condition, expiry, activity, turn })
    }

    /// Its live part, while its guest runs.
    ///
    /// # Errors
    /// [`NodeError::SandboxStopped`] with the reason; [`NodeError::SandboxSuspending`].
    pub(crate) fn running(&self) -> NodeResult<Arc<Running>> {
        self.condition().running().cloned().map_err(|refusal| self.refused(refusal))
    }

    /// Its live part, also while it stands still.
    pub(crate) fn machine(&self) -> Option<Arc<Running>> {
        self.condition().machine().cloned()
    }

    /// Its agent, while it runs, to use it: that counts as activity.
    pub(crate) fn guest(&self) -> NodeResult<&Guest> {
        let guest = self.idle_guest()?;
        self.activity.touch();
        Ok(guest)
    }

    /// Its agent, while it runs, for what is no use of the sandbox.
    pub(crate) fn idle_guest(&self) -> NodeResult<&Guest> {
        self.running()?;
        Ok(&self.guest)
    }

    /// Notes that it is in use until what is returned is dropped.
    pub(crate) fn in_use(&self) -> InUse {
        self.activity.begin()
    }

    /// When it ends by itself.
    pub(crate) fn expiry(&self) -> Option<Expiry> {
        *self.expiry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes when it ends by itself; whoever records that does it before.
    pub(crate) fn set_expiry(&self, expiry: Option<Expiry>) {
        *self.expiry.lock().unwrap_or_else(PoisonError::into_inner) = expiry;
    }

    /// When it ends by itself, if that is not after `now`; it is not told a second time.
    pub(crate) fn take_due(&self, now: u64) -> Option<Expiry> {
        self.expiry.lock().unwrap_or_else(PoisonError::into_inner).take_if(|expiry| expiry.at_unix <= now)
    }

    /// What clients see of it.
    pub(crate) fn info(&self) -> SandboxInfo {
        let (pid, stopped) = match self.condition() {
            Condition::Running(running) | Condition::Suspending(running) => {
                (Some(running.process.key().pid.unsigned_abs()), None)
            }
            Condition::Stopped { end, .. } => (None, Some(end)),
        };
        let limits = self.origin.limits;
        let Branches { count, last } = self.branches().clone();
        SandboxInfo {
            id: self.id.clone(),
            snapshot_tag: self.origin.snapshot_tag.clone(),
            netns: self.machine().and_then(|machine| machine.network.as_ref()?.shown_name()),
            guest_addr: GUEST_ADDR.to_owned(),
            created_at_unix: self.origin.created_at_unix,
            pid,
            memory_limit_mib: limits.memory_mib,
            has_branched: count > 0,
            last_branch_memory_path: last,
            branch_count: count,
            stopped_code: stopped.as_ref().map(|end| end.code),
            stopped: stopped.map(|end| end.reason),
            forked_from: self.origin.forked_from.clone(),
            expires_at_unix: self.expiry().map(|expiry| expiry.at_unix),
            limits: (!limits.is_empty()).then_some(limits),
        }
    }

    /// Notes that a snapshot of it, with this memory file, was taken.
    pub(crate) fn note_branch(&self, host: &Host, memory_file: String) {
        let mut branches = self.branches();
        branches.count += 1;
        branches.last = Some(memory_file);
        host.database.note_branches(self.id.clone(), branches.clone());
    }

    /// The snapshot that its memory and disks are changes of; unknown when an earlier release made it.
    pub(crate) fn base(&self) -> Option<Base> {
        self.base.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn branches(&self) -> MutexGuard<'_, Branches> {
        self.branches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn condition(&self) -> Condition {
        self.condition.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes a step of its life.
    ///
    /// # Errors
    /// [`NodeError::SandboxStopped`] or [`NodeError::SandboxSuspending`] for one that does not belong; nothing
    /// happened then.
    pub(crate) fn step(&self, step: Step<Arc<Running>>) -> NodeResult<()> {
        let mut condition = self.condition.lock().unwrap_or_else(PoisonError::into_inner);
        *condition = condition.after(step).map_err(|refusal| self.refused(refusal))?;
        Ok(())
    }

    fn refused(&self, refusal: Refusal) -> NodeError {
        let id = self.id.clone();
        match refusal {
            Refusal::Stopped(End { code, reason }) => NodeError::SandboxStopped { id, code, reason },
            Refusal::Suspending => NodeError::SandboxSuspending { id },
            Refusal::NotSuspending => {
                let End { code, reason } = End::lost("is not being suspended, and runs");
                NodeError::SandboxStopped { id, code, reason }
            }
        }
    }

    fn stopped_since(&self) -> Option<u64> {
        match self.condition() {
            Condition::Running(_) | Condition::Suspending(_) => None,
            Condition::Stopped { at_unix, .. } => Some(at_unix),
        }
    }
}

/// What a sandbox is, apart from its process.
#[derive(Clone, Debug)]
pub(crate) struct About {
    pub(crate) id: SandboxId,
    pub(crate) origin: Origin,
    pub(crate) branches: Branches,
    pub(crate) expiry: Option<Expiry>,
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
            dissolve(Arc::new(running)).await;
        });
    }
}

/// Removes what is left of a sandbox whose process has ended, or never was.
pub(crate) fn clear(host: &Host, id: &SandboxId) {
    host.files.remove(id.as_str(), false);
    host.database.forget(vec![id.clone()]);
}

/// Ends a machine that is nobody's, and takes back what the host set aside for it.
pub(crate) fn discard(running: Arc<Running>) {
    running.process.kill();
    tokio::spawn(async move {
        running.process.exited().await;
        dissolve(running).await;
    });
}

/// Takes back what the host set aside for a machine that has ended.
pub(crate) async fn dissolve(running: Arc<Running>) {
    let dissolving = blocking("removing a control group", move || running.allotment.dissolve());
    if let Err(error) = dissolving.await {
        tracing::warn!(%error, "a control group may be left");
    }
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
        let sandbox = self.watch_over(about, running);
        let news = News::of(EventKind::SandboxCreated).sandbox(&sandbox.id);
        self.host.events.tell(news.snapshot(&sandbox.origin.snapshot_tag));
        Some(sandbox)
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

    /// Gives a sandbox another machine, whose run files are already in place and which changes `base`; the one
    /// before is ended.
    ///
    /// # Errors
    /// [`NodeError::SandboxNotFound`] when it was removed meanwhile, and what keeps it from having another machine;
    /// the new one is ended then.
    pub(crate) async fn replace(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        running: Running,
        base: Option<Base>,
    ) -> NodeResult<()> {
        let running = Arc::new(running);
        let key = running.process.key();
        {
            let sandboxes = self.sandboxes.write().unwrap_or_else(PoisonError::into_inner);
            if !sandboxes.get(&sandbox.id).is_some_and(|known| Arc::ptr_eq(known, sandbox)) {
                discard(running);
                return Err(NodeError::SandboxNotFound { id: sandbox.id.clone() });
            }
            let before = sandbox.machine();
            if let Err(refusal) = sandbox.step(Step::Replace(Arc::clone(&running))) {
                discard(running);
                return Err(refusal);
            }
            if let Some(before) = before {
                before.process.kill();
            }
            sandbox.base.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&base);
        }
        self.host.database.note_base(sandbox.id.clone(), base);
        tokio::spawn(Arc::clone(self).watch(Arc::clone(sandbox), running));
        Ok(self.host.database.running(vec![(sandbox.id.clone(), key)]).await?)
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
        match sandbox.machine() {
            Some(running) => {
                running.process.kill();
                // At once, so that a restart meanwhile does not list it as one that ended by itself.
                self.host.database.forget(vec![id.clone()]);
            }
            None => clear(&self.host, id),
        }
        Ok(())
    }

    /// [`Roster::remove`] for a reason that listeners are told.
    pub(crate) fn end(&self, id: &SandboxId, reason: Option<&str>) -> NodeResult<()> {
        self.remove(id)?;
        let news = News::of(EventKind::SandboxEnded).sandbox(id);
        self.host.events.tell(match reason {
            Some(reason) => news.because(reason),
            None => news,
        });
        Ok(())
    }

    /// Marks a sandbox whose machine is on disk as stopped, and ends the machine; `watch` clears up behind it.
    pub(crate) fn retire(&self, sandbox: &Sandbox, end: End) -> NodeResult<()> {
        let machine = sandbox.machine();
        sandbox.step(Step::Stop { end, at_unix: unix_now() })?;
        if let Some(machine) = machine {
            machine.process.kill();
        }
        Ok(())
    }

    /// Forgets sandboxes that stopped by themselves long ago.
    pub(crate) fn forget_stopped(&self) {
        let limit = self.host.config.keep_stopped.as_secs();
        let now = unix_now();
        for sandbox in self.all() {
            if sandbox.stopped_since().is_some_and(|since| since + limit < now) {
                let _ = self.end(&sandbox.id, Some("it had stopped long ago"));
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
        let end = running.allotment.out_of_memory().unwrap_or_else(|| ending.end());
        match self.note_stopped(&sandbox, &running, end) {
            Fate::Stopped => self.host.files.remove(sandbox.id.as_str(), true),
            Fate::Removed => clear(&self.host, &sandbox.id),
            Fate::Replaced => {}
        }
        // One that was put on disk was left to the next start to end, had this one not lived to.
        self.host.database.forget_helper(running.process.key());
        dissolve(running).await;
    }

    /// Marks a sandbox as stopped unless it was removed, or goes on in another machine; a removal sees it
    /// either running or stopped, never in between.
    fn note_stopped(&self, sandbox: &Arc<Sandbox>, ended: &Arc<Running>, end: End) -> Fate {
        let sandboxes = self.sandboxes.write().unwrap_or_else(PoisonError::into_inner);
        if !sandboxes.get(&sandbox.id).is_some_and(|known| Arc::ptr_eq(known, sandbox)) {
            return Fate::Removed;
        }
        match sandbox.machine() {
            Some(current) if !Arc::ptr_eq(&current, ended) => return Fate::Replaced,
            Some(_) => {}
            // It was put on disk, which is on record.
            None => return Fate::Stopped,
        }
        let at_unix = unix_now();
        tracing::warn!(sandbox = %sandbox.id, code = end.code.name(), reason = end.reason, "sandbox stopped");
        if sandbox.step(Step::Stop { end: end.clone(), at_unix }).is_ok() {
            let news = News::of(EventKind::SandboxStopped).sandbox(&sandbox.id);
            self.host.events.tell(news.ended(&end));
            self.host.database.stopped(sandbox.id.clone(), end, at_unix);
        }
        Fate::Stopped
    }
}

/// What became of a sandbox whose machine ended.
enum Fate {
    /// It is known as stopped now.
    Stopped,
    /// It had been removed.
    Removed,
    /// It has another machine.
    Replaced,
}
