//! Workspaces: sandboxes with a name, that can be put on disk and brought back.
//!
//! ```text
//!            created               suspended, or idle for long
//! (nothing) ─────────► running ─────────────────────────────────► suspended
//!                      │  ▲  ▲  resumed, from the newest state          │
//!      its sandbox     │  │  └──────────────────────────────────────────┘
//!      ended otherwise ▼  │ resumed, from the newest state or else the source
//!                      stale                              (nothing) ◄── deleted, from any of these
//! ```
//!
//! The state of workspace `w` is the snapshot `ws-w-state`, which each suspend replaces in one step when the new one
//! is durable, and which depends on no other. One thing at a time is done to a workspace; a second waits. What
//! changes a workspace runs to its end also when nobody waits for it any longer.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use forkd_store::{MEMORY_LAYER, StoreError};
use forkd_types::rest::{
    CreateWorkspaceRequest, EventKind, SnapshotInfo, SpawnRequest, WORKSPACE_NAME_LIMIT, WorkspaceInfo, WorkspaceStatus,
};
use forkd_types::{SandboxId, Tag};

use crate::branch::Brancher;
use crate::checkpoints::Checkpoints;
use crate::database::workspaces::{Shape, WorkspaceRecord};
use crate::error::{NodeError, NodeResult};
use crate::events::News;
use crate::host::{Host, blocking, unix_now};
use crate::sandbox::{Roster, Sandbox};
use crate::snapshots::{self, Removal};
use crate::spawn;

/// Every workspace of the node.
pub(crate) struct Workspaces {
    host: Arc<Host>,
    roster: Arc<Roster>,
    checkpoints: Arc<Checkpoints>,
    brancher: Brancher,
    known: Mutex<BTreeMap<String, Arc<Workspace>>>,
}

/// One workspace.
struct Workspace {
    name: String,
    /// The snapshot that a suspend makes.
    state_tag: Tag,
    /// Nothing while it is being created.
    record: Mutex<Option<WorkspaceRecord>>,
    /// Held by what changes it.
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl Workspace {
    fn new(name: String, record: Option<WorkspaceRecord>) -> NodeResult<Arc<Self>> {
        let state_tag = state_tag(&name)?;
        Ok(Arc::new(Self { name, state_tag, record: Mutex::new(record), turn: Arc::default() }))
    }

    fn record(&self) -> Option<WorkspaceRecord> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, record: Option<WorkspaceRecord>) {
        *self.record.lock().unwrap_or_else(PoisonError::into_inner) = record;
    }

    /// Its record, unless it is being created or was deleted meanwhile.
    fn known(&self) -> NodeResult<WorkspaceRecord> {
        self.record().ok_or_else(|| NodeError::WorkspaceNotFound { name: self.name.clone() })
    }

    fn in_state(&self, is: &'static str, advice: &'static str) -> NodeError {
        NodeError::WorkspaceState { name: self.name.clone(), is, advice }
    }
}

/// The tag of a workspace's state, and with it whether the name is one.
fn state_tag(name: &str) -> NodeResult<Tag> {
    let bad = |reason: String| NodeError::BadWorkspaceName { name: name.to_owned(), reason };
    if name.parse::<Tag>().is_err() && name.len() <= 64 {
        return Err(bad("it has characters other than A-Z a-z 0-9 _ - . or starts with a dot, or is empty".to_owned()));
    }
    if name.len() > WORKSPACE_NAME_LIMIT {
        let reason = format!(
            "it has {} characters, and its state is kept as snapshot ws-<name>-state, whose tag may have 64; \
             {WORKSPACE_NAME_LIMIT} are the most",
            name.len()
        );
        return Err(bad(reason));
    }
    Ok(format!("ws-{name}-state").parse()?)
}

impl Workspaces {
    /// Those that are on record.
    pub(crate) async fn load(
        host: &Arc<Host>,
        roster: &Arc<Roster>,
        checkpoints: &Arc<Checkpoints>,
        brancher: &Brancher,
    ) -> NodeResult<Arc<Self>> {
        let mut known = BTreeMap::new();
        for record in host.database.workspaces().await? {
            known.insert(record.name.clone(), Workspace::new(record.name.clone(), Some(record))?);
        }
        let (host, roster, checkpoints) = (Arc::clone(host), Arc::clone(roster), Arc::clone(checkpoints));
        let workspaces = Self { host, roster, checkpoints, brancher: brancher.clone(), known: Mutex::new(known) };
        Ok(Arc::new(workspaces))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Workspace>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, name: &str) -> NodeResult<Arc<Workspace>> {
        let found = self.lock().get(name).cloned();
        found.ok_or_else(|| NodeError::WorkspaceNotFound { name: name.to_owned() })
    }

    /// All of them, by name.
    pub(crate) fn list(&self) -> Vec<WorkspaceInfo> {
        let all: Vec<_> = self.lock().values().cloned().collect();
        all.iter().filter_map(|workspace| Some(self.describe(workspace.record()?))).collect()
    }

    /// One of them.
    pub(crate) fn get(&self, name: &str) -> NodeResult<WorkspaceInfo> {
        Ok(self.describe(self.find(name)?.known()?))
    }

    /// What clients see of it. One whose sandbox is gone is stale from that instant on.
    fn describe(&self, record: WorkspaceRecord) -> WorkspaceInfo {
        let sandbox = self.sandbox(&record);
        let status = match record.status {
            WorkspaceStatus::Running if sandbox.is_none() => WorkspaceStatus::Stale,
            status => status,
        };
        let active = sandbox.as_ref().map_or(0, |sandbox| sandbox.activity.last_unix());
        WorkspaceInfo {
            id: record.id,
            name: record.name,
            source_snapshot_tag: record.source,
            current_state_tag: record.state,
            status,
            live_sandbox_id: sandbox.map(|sandbox| sandbox.id.clone()),
            created_at_unix: record.created_at_unix,
            last_active_unix: record.last_active_unix.max(active),
            last_branch_memory_path: record.memory_path,
            idle_suspend_secs: record.idle_suspend_secs,
        }
    }

    /// The sandbox of a workspace that runs, if it has a machine.
    fn sandbox(&self, record: &WorkspaceRecord) -> Option<Arc<Sandbox>> {
        let id = record.sandbox.as_ref().filter(|_| record.status == WorkspaceStatus::Running)?;
        self.roster.get(id).ok().filter(|sandbox| sandbox.machine().is_some())
    }

    /// The workspace whose sandbox this is.
    pub(crate) fn of_sandbox(&self, id: &SandboxId) -> Option<String> {
        self.whose(|record| record.sandbox.as_ref() == Some(id))
    }

    /// The workspace whose state this snapshot is.
    pub(crate) fn of_state(&self, tag: &Tag) -> Option<String> {
        self.whose(|record| record.state.as_ref() == Some(tag))
    }

    fn whose(&self, mine: impl Fn(&WorkspaceRecord) -> bool) -> Option<String> {
        let all: Vec<_> = self.lock().values().cloned().collect();
        all.iter().filter_map(|workspace| workspace.record()).find(mine).map(|record| record.name)
    }

    /// Makes a workspace of a snapshot, which runs.
    pub(crate) async fn create(self: &Arc<Self>, request: CreateWorkspaceRequest) -> NodeResult<WorkspaceInfo> {
        let source: Tag = request.snapshot_tag.parse()?;
        let workspace = Workspace::new(request.name.clone(), None)?;
        {
            let mut known = self.lock();
            if known.contains_key(&request.name) {
                return Err(NodeError::WorkspaceExists { name: request.name });
            }
            known.insert(request.name.clone(), Arc::clone(&workspace));
        }
        let this = Arc::clone(self);
        to_the_end("creating a workspace", async move {
            let created = this.begin(&workspace, request, source).await;
            if created.is_err() {
                this.lock().remove(&workspace.name);
            }
            created
        })
        .await
    }

    async fn begin(
        &self,
        workspace: &Arc<Workspace>,
        request: CreateWorkspaceRequest,
        source: Tag,
    ) -> NodeResult<WorkspaceInfo> {
        let _turn = workspace.turn.lock().await;
        // The first suspend would replace a snapshot that is somebody else's.
        self.brancher.check_place(&workspace.state_tag, false).await?;
        let CreateWorkspaceRequest { per_child_netns, memory_limit_mib, hugepages, .. } = request;
        let shape = Shape { per_child_netns, memory_limit_mib, hugepages };
        let sandbox = self.spawn(&source, shape).await?;
        let now = unix_now();
        let idle = request.idle_suspend_secs.or(self.host.config.workspace_idle.map(|limit| limit.as_secs()));
        let record = WorkspaceRecord {
            name: workspace.name.clone(),
            id: format!("ws-{}", sandbox.as_str().get(..16).unwrap_or(sandbox.as_str())),
            source,
            state: None,
            sandbox: Some(sandbox.clone()),
            status: WorkspaceStatus::Running,
            created_at_unix: now,
            last_active_unix: now,
            memory_path: None,
            shape,
            idle_suspend_secs: idle.filter(|seconds| *seconds > 0),
        };
        self.runs(workspace, record, EventKind::WorkspaceCreated).await
    }

    /// Records that a workspace runs in its new sandbox, which is ended when that fails.
    async fn runs(&self, workspace: &Workspace, record: WorkspaceRecord, kind: EventKind) -> NodeResult<WorkspaceInfo> {
        if let Err(error) = self.host.database.note_workspace(record.clone()).await {
            if let Some(sandbox) = &record.sandbox {
                let _ = self.roster.end(sandbox, Some("its workspace could not be recorded"));
            }
            return Err(error.into());
        }
        let news = News::of(kind).workspace(&record.name);
        workspace.set(Some(record.clone()));
        self.host.events.tell(match &record.sandbox {
            Some(sandbox) => news.sandbox(sandbox),
            None => news,
        });
        Ok(self.describe(record))
    }

    async fn spawn(&self, tag: &Tag, shape: Shape) -> NodeResult<SandboxId> {
        let Shape { per_child_netns, memory_limit_mib, hugepages } = shape;
        let request = SpawnRequest { per_child_netns, memory_limit_mib, hugepages, ..SpawnRequest::of(tag, 1) };
        let report = spawn::spawn(&self.host, &self.brancher.zygotes, &self.roster, &request, Instant::now()).await?;
        match report.sandboxes.into_iter().next() {
            Some(sandbox) => Ok(sandbox.id),
            None => {
                let first = report.failures.into_iter().next().map(|failure| failure.error).unwrap_or_default();
                Err(NodeError::AllFailed { tag: tag.clone(), n: 1, first })
            }
        }
    }

    /// Puts a workspace on disk and ends its sandbox; returns the snapshot it is in.
    pub(crate) async fn suspend(self: &Arc<Self>, name: &str) -> NodeResult<SnapshotInfo> {
        let (this, workspace) = (Arc::clone(self), self.find(name)?);
        to_the_end("suspending a workspace", async move {
            let _turn = workspace.turn.lock().await;
            this.put_on_disk(&workspace).await
        })
        .await
    }

    async fn put_on_disk(&self, workspace: &Workspace) -> NodeResult<SnapshotInfo> {
        let record = workspace.known()?;
        let Some(sandbox) = self.sandbox(&record) else {
            return Err(match record.status {
                WorkspaceStatus::Suspended => workspace.in_state("suspended already", "resume it first"),
                WorkspaceStatus::Running | WorkspaceStatus::Stale => {
                    workspace.in_state("stale: its sandbox is gone", "resume it to go back to its newest state")
                }
            });
        };
        let active = sandbox.activity.last_unix();
        let suspended = self.brancher.suspend(&sandbox, &workspace.state_tag).await?;
        let memory_file = Path::new(&suspended.snapshot.dir).join(MEMORY_LAYER);
        let record = WorkspaceRecord {
            state: Some(workspace.state_tag.clone()),
            sandbox: None,
            status: WorkspaceStatus::Suspended,
            last_active_unix: active,
            memory_path: Some(memory_file.display().to_string()),
            ..record
        };
        self.host.database.note_suspended(record.clone(), sandbox.id.clone(), suspended.key()).await?;
        workspace.set(Some(record));
        let snapshot = suspended.done();
        // Somebody else may have ended it meanwhile.
        let _ = self.roster.remove(&sandbox.id);
        self.checkpoints.forget(&sandbox.id);
        for kind in [EventKind::SandboxSuspended, EventKind::WorkspaceSuspended] {
            let news = News::of(kind).sandbox(&sandbox.id).snapshot(&workspace.state_tag);
            self.host.events.tell(news.workspace(&workspace.name));
        }
        Ok(snapshot)
    }

    /// Brings a workspace back from its newest state, or from its source when it has none.
    pub(crate) async fn resume(self: &Arc<Self>, name: &str) -> NodeResult<WorkspaceInfo> {
        let (this, workspace) = (Arc::clone(self), self.find(name)?);
        to_the_end("resuming a workspace", async move {
            let _turn = workspace.turn.lock().await;
            let record = workspace.known()?;
            if this.sandbox(&record).is_some() {
                return Err(workspace.in_state("running already", "suspend it first"));
            }
            let sandbox = this.spawn(record.state.as_ref().unwrap_or(&record.source), record.shape).await?;
            let (status, last_active_unix) = (WorkspaceStatus::Running, unix_now());
            let record = WorkspaceRecord { sandbox: Some(sandbox), status, last_active_unix, ..record };
            this.runs(&workspace, record, EventKind::WorkspaceResumed).await
        })
        .await
    }

    /// Removes a workspace, its sandbox and its state; the snapshot it began as stays.
    ///
    /// # Errors
    /// Also while other snapshots are layers over its state; it is as it was then.
    pub(crate) async fn delete(self: &Arc<Self>, name: &str) -> NodeResult<()> {
        let (this, workspace) = (Arc::clone(self), self.find(name)?);
        to_the_end("deleting a workspace", async move {
            let _turn = workspace.turn.lock().await;
            let record = workspace.known()?;
            if let Some(state) = record.state.clone() {
                this.remove_state(state).await?;
            }
            this.host.database.forget_workspace(record.name.clone()).await?;
            workspace.set(None);
            this.lock().remove(&record.name);
            if let Some(sandbox) = &record.sandbox {
                // It may be gone already.
                let _ = this.roster.end(sandbox, Some("its workspace was deleted"));
                this.checkpoints.forget(sandbox);
            }
            this.host.events.tell(News::of(EventKind::WorkspaceDeleted).workspace(&record.name));
            Ok(())
        })
        .await
    }

    async fn remove_state(&self, tag: Tag) -> NodeResult<()> {
        let (store, own) = (self.host.store.clone(), tag.clone());
        let removing = blocking("removing a snapshot", move || snapshots::remove(&store, own, Removal::Guarded, drop));
        match removing.await? {
            Ok(()) => {
                self.brancher.zygotes.discard(&tag);
                self.host.events.tell(News::of(EventKind::SnapshotRemoved).snapshot(&tag));
                Ok(())
            }
            Err(StoreError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Looks for workspaces whose sandbox is gone, and for those that have been idle for long enough.
    pub(crate) fn look(self: &Arc<Self>, now: u64) {
        let all: Vec<_> = self.lock().values().cloned().collect();
        for workspace in all {
            // One that something is being done to is neither.
            let Ok(turn) = Arc::clone(&workspace.turn).try_lock_owned() else { continue };
            let Some(record) = workspace.record().filter(|record| record.status == WorkspaceStatus::Running) else {
                continue;
            };
            match self.sandbox(&record) {
                None => {
                    let this = Arc::clone(self);
                    tokio::spawn(async move {
                        let _turn = turn;
                        this.note_stale(&workspace, record).await;
                    });
                }
                Some(sandbox) => {
                    let active = sandbox.activity.last_unix();
                    if active > record.last_active_unix {
                        self.host.database.note_activity(record.name.clone(), active);
                        workspace.set(Some(WorkspaceRecord { last_active_unix: active, ..record.clone() }));
                    }
                    if record.idle_suspend_secs.is_some_and(|limit| now.saturating_sub(active) >= limit) {
                        let this = Arc::clone(self);
                        tokio::spawn(async move {
                            let _turn = turn;
                            this.suspend_idle(&workspace, &sandbox).await;
                        });
                    }
                }
            }
        }
    }

    async fn note_stale(&self, workspace: &Workspace, record: WorkspaceRecord) {
        let lost = record.sandbox.clone();
        let record = WorkspaceRecord { status: WorkspaceStatus::Stale, sandbox: None, ..record };
        if let Err(error) = self.host.database.note_workspace(record.clone()).await {
            tracing::error!(workspace = record.name, %error, "cannot record that it is stale");
            return;
        }
        tracing::warn!(workspace = record.name, "its sandbox is gone");
        let news = News::of(EventKind::WorkspaceStale).workspace(&record.name);
        self.host.events.tell(match &lost {
            Some(sandbox) => news.sandbox(sandbox),
            None => news,
        });
        workspace.set(Some(record));
    }

    async fn suspend_idle(&self, workspace: &Workspace, sandbox: &Sandbox) {
        match self.put_on_disk(workspace).await {
            Ok(_) => tracing::info!(workspace = workspace.name, "suspended for being idle"),
            Err(error) => {
                let reason = error.message();
                tracing::warn!(workspace = workspace.name, reason, "cannot be suspended for being idle; it runs on");
                // It is tried again when it has been idle for as long once more.
                sandbox.activity.touch();
                let news = News::of(EventKind::SandboxSuspendFailed).sandbox(&sandbox.id);
                self.host.events.tell(news.workspace(&workspace.name).because(reason));
            }
        }
    }
}

/// Does `work` also when nobody waits for it any longer.
async fn to_the_end<T: Send + 'static>(
    what: &'static str,
    work: impl Future<Output = NodeResult<T>> + Send + 'static,
) -> NodeResult<T> {
    tokio::spawn(work).await.map_err(|_| NodeError::Interrupted { what })?
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_name_is_taken_exactly_when_its_state_has_a_legal_tag(name in "\\PC{0,70}|[A-Za-z0-9_.-]{50,60}") {
            let legal = name.parse::<Tag>().is_ok() && format!("ws-{name}-state").parse::<Tag>().is_ok();
            prop_assert_eq!(state_tag(&name).is_ok(), legal, "{}", name);
        }
    }

    #[test]
    fn a_name_that_is_too_long_is_told_so_with_the_limit() {
        let longest = "w".repeat(WORKSPACE_NAME_LIMIT);
        assert_eq!(state_tag(&longest).expect("just fits").as_str().len(), 64);
        let error = state_tag(&format!("{longest}w")).expect_err("one too long");
        assert_eq!(error.code(), "bad_workspace_name");
        assert!(error.to_string().contains("56") && error.to_string().contains("55"), "{error}");
    }
}
