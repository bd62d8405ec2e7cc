//! The operations that a node offers.

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forkd_proto::agent::{Eval, Evaluated, Exec, FailureCode, Pong};
use forkd_proto::monitor::Command;
use forkd_store::pack::{Pack, PackOptions, UnpackOptions};
use forkd_store::{BlobWriter, Listed, Store, StoreError};
use forkd_types::rest::{
    BakeEvent, BakeRequest, BranchRequest, CheckpointInfo, CheckpointRequest, CreateWorkspaceRequest, EvalRequest,
    EvalResponse, EventKind, ExecRequest, ExecResponse, ForkRequest, RewindRequest, SandboxInfo, SandboxMemory,
    SnapshotDetail, SnapshotInfo, SpawnReport, SpawnRequest, TimeoutRequest, UnpackReport, VerifyProgress,
    WorkspaceInfo,
};
use forkd_types::{Digest, PageCount, SandboxId, Tag};
use rustix::process::{Resource, Rlimit};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::activity::InUse;
use crate::admission::{Admission, HostMemory};
use crate::allotment::Groups;
use crate::bake::Bake;
use crate::branch::{Brancher, Order};
use crate::branch_slots::BranchSlots;
use crate::checkpoints::Checkpoints;
use crate::claims::Claims;
use crate::config::NodeConfig;
use crate::console_stream::ConsoleStream;
use crate::control::expect_event;
use crate::database::Database;
use crate::database::answers::RememberedAnswer;
use crate::error::{NodeError, NodeResult};
use crate::events::{Events, Listener, News};
use crate::gauges::{self, NodeGauges, ZygoteGauge};
use crate::guest::{GuestConnection, GuestError};
use crate::host::{Host, blocking};
use crate::lifecycle::End;
use crate::lifetime::Lifetimes;
use crate::run_files::RunFiles;
use crate::sandbox::{Roster, Sandbox, clear, dissolve};
use crate::snapshots::{self, Removal};
use crate::workspaces::Workspaces;
use crate::zygotes::Zygotes;
use crate::{adoption, console, cpu, memory, networks, spawn};

/// How often idle zygotes, old records and large consoles are looked for.
const TIDY_EVERY: Duration = Duration::from_secs(15);

/// What is added to a program's own time limit before the guest counts as silent.
pub const ANSWER_GRACE: Duration = Duration::from_secs(5);

/// How long a ping may take.
const PING_LIMIT: Duration = Duration::from_secs(5);

/// Every sandbox of this host. Clones share it.
#[derive(Clone)]
pub struct Node {
    pub(crate) host: Arc<Host>,
    pub(crate) zygotes: Arc<Zygotes>,
    pub(crate) roster: Arc<Roster>,
    pub(crate) checkpoints: Arc<Checkpoints>,
    pub(crate) brancher: Brancher,
    lifetimes: Arc<Lifetimes>,
    _tidying: Arc<[AbortOnDrop; 2]>,
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Node {
    /// Opens the store and the state, adopts the sandboxes that still run and clears what else an
    /// earlier node left.
    pub async fn start(config: NodeConfig) -> NodeResult<Self> {
        raise_descriptor_limit();
        let host = blocking("opening the state directory", move || open_host(config)).await??;
        let host = Arc::new(host);
        let roster = Roster::new(Arc::clone(&host));
        let zygotes = Arc::new(Zygotes::new(Arc::clone(&host)));
        let brancher = Brancher {
            host: Arc::clone(&host),
            zygotes: Arc::clone(&zygotes),
            claims: Claims::default(),
            slots: BranchSlots::new(host.config.branch_concurrency),
        };
        let checkpoints = Arc::new(Checkpoints::new(Arc::clone(&host), Arc::clone(&roster), brancher.clone()));
        adoption::adopt_all(&host, &roster, &checkpoints).await?;
        checkpoints.sweep().await;
        let tidying =
            tokio::spawn(tidy(Arc::clone(&host), Arc::clone(&zygotes), Arc::clone(&roster), Arc::clone(&checkpoints)));
        let workspaces = Workspaces::load(&host, &roster, &checkpoints, &brancher).await?;
        let lifetimes = Arc::new(Lifetimes {
            host: Arc::clone(&host),
            roster: Arc::clone(&roster),
            checkpoints: Arc::clone(&checkpoints),
            brancher: brancher.clone(),
            workspaces,
        });
        let enforcing = tokio::spawn(Arc::clone(&lifetimes).enforce());
        let tidying = Arc::new([tidying, enforcing].map(AbortOnDrop));
        Ok(Self { host, zygotes, roster, checkpoints, brancher, lifetimes, _tidying: tidying })
    }

    /// Lets listeners end once they have been given everything.
    pub fn end_listening(&self) {
        self.host.events.close();
    }

    /// What happens from now on, or happened after the event `after`; with `sandbox`, only what is about that.
    pub fn listen(&self, after: Option<u64>, sandbox: Option<SandboxId>) -> Listener {
        Listener::new(&self.host, after, sandbox)
    }

    /// The workspaces, by name.
    pub fn workspaces(&self) -> Vec<WorkspaceInfo> {
        self.lifetimes.workspaces.list()
    }

    /// One workspace.
    pub fn workspace(&self, name: &str) -> NodeResult<WorkspaceInfo> {
        self.lifetimes.workspaces.get(name)
    }

    /// Makes a workspace of a snapshot.
    pub async fn create_workspace(&self, request: CreateWorkspaceRequest) -> NodeResult<WorkspaceInfo> {
        self.lifetimes.workspaces.create(request).await.map_err(|error| self.explain_unready(error))
    }

    /// Puts a workspace on disk and ends its sandbox.
    pub async fn suspend_workspace(&self, name: &str) -> NodeResult<WorkspaceInfo> {
        self.lifetimes.workspaces.suspend(name).await?;
        self.workspace(name)
    }

    /// Brings a workspace back.
    pub async fn resume_workspace(&self, name: &str) -> NodeResult<WorkspaceInfo> {
        self.lifetimes.workspaces.resume(name).await.map_err(|error| self.explain_unready(error))
    }

    /// Removes a workspace with its sandbox and its state.
    pub async fn delete_workspace(&self, name: &str) -> NodeResult<()> {
        self.lifetimes.workspaces.delete(name).await
    }

    /// Changes when a sandbox ends by itself.
    pub async fn change_timeout(&self, id: &SandboxId, request: &TimeoutRequest) -> NodeResult<SandboxInfo> {
        self.lifetimes.change(id, request).await
    }

    /// Puts a sandbox on disk and ends it, also when nobody waits for it any longer; returns the snapshot it is in.
    pub async fn suspend(&self, id: &SandboxId) -> NodeResult<SnapshotInfo> {
        let (lifetimes, sandbox) = (Arc::clone(&self.lifetimes), self.roster.get(id)?);
        let suspending = tokio::spawn(async move { lifetimes.suspend(&sandbox).await });
        suspending.await.map_err(|_| NodeError::Interrupted { what: "suspending a sandbox" })?
    }

    /// Notes that a sandbox is in use until what is returned is dropped.
    pub fn in_use(&self, id: &SandboxId) -> NodeResult<InUse> {
        Ok(self.roster.get(id)?.in_use())
    }

    /// What a request with this idempotency key was answered, if that is kept still.
    pub async fn remembered_answer(&self, key: [u8; 32]) -> NodeResult<Option<RememberedAnswer>> {
        Ok(self.host.database.answer(key).await?)
    }

    /// Keeps what a request with this idempotency key was answered.
    pub async fn remember_answer(&self, key: [u8; 32], answer: RememberedAnswer) -> NodeResult<()> {
        Ok(self.host.database.note_answer(key, answer).await?)
    }

    /// Puts away the networks that no sandbox has; those of sandboxes that run on stay for the next node.
    pub async fn close_networks(&self) {
        if let Some(networks) = self.host.networks.clone()
            && let Err(error) = blocking("putting networks away", move || networks.close()).await
        {
            tracing::warn!(%error, "networks may be left; the next daemon removes them");
        }
    }

    /// Ends every sandbox and waits until the monitors have ended.
    pub async fn kill_all(&self) {
        for sandbox in self.roster.all() {
            let machine = sandbox.machine();
            self.checkpoints.forget(&sandbox.id);
            if self.roster.end(&sandbox.id, Some("the daemon stops")).is_ok()
                && let Some(running) = machine
            {
                running.process.exited().await;
                clear(&self.host, &sandbox.id);
                dissolve(running).await;
            }
        }
    }

    /// Waits until everything noted so far is in the state database.
    pub async fn settle(&self) -> NodeResult<()> {
        Ok(self.host.database.settle().await?)
    }

    /// Forks children of a snapshot. `arrived` is when the request came, the zero of all timings.
    ///
    /// Failures of single children are in the report, also when all of them failed.
    pub async fn spawn(&self, request: &SpawnRequest, arrived: Instant) -> NodeResult<SpawnReport> {
        let spawned = spawn::spawn(&self.host, &self.zygotes, &self.roster, request, arrived).await;
        spawned.map_err(|error| self.explain_unready(error))
    }

    /// A snapshot that is being baked is not ready, rather than not there.
    fn explain_unready(&self, error: NodeError) -> NodeError {
        match error {
            NodeError::Store(StoreError::NotFound { tag }) if self.brancher.claims.has(&tag) => {
                NodeError::SnapshotNotReady { tag, reason: "it is still being made".to_owned() }
            }
            NodeError::Store(StoreError::NotFound { tag }) => match self.brancher.claims.failure(&tag) {
                Some(reason) => NodeError::SnapshotNotReady { tag, reason },
                None => StoreError::NotFound { tag }.into(),
            },
            other => other,
        }
    }

    /// Copies a running sandbox; all copies are of one instant. The sandbox runs on, whatever comes.
    pub async fn fork(&self, id: &SandboxId, request: &ForkRequest, arrived: Instant) -> NodeResult<SpawnReport> {
        let sandbox = self.roster.get(id)?;
        spawn::fork(&self.host, &self.roster, &sandbox, request, arrived).await
    }

    /// Takes a snapshot of a running sandbox. The sandbox runs on, whatever comes.
    pub async fn branch(&self, id: &SandboxId, request: &BranchRequest) -> NodeResult<SnapshotInfo> {
        let order = Order::check(request)?;
        let sandbox = self.roster.get(id)?;
        self.brancher.branch(&sandbox, order).await
    }

    /// Writes a snapshot anew as one that depends on no other.
    pub async fn compact(&self, from: &Tag, to: &Tag) -> NodeResult<SnapshotInfo> {
        self.brancher.compact(from, to).await.map_err(|error| self.explain_unready(error))
    }

    /// Freezes a sandbox as it is now.
    pub async fn checkpoint(&self, id: &SandboxId, request: CheckpointRequest) -> NodeResult<CheckpointInfo> {
        self.checkpoints.take(&self.roster.get(id)?, request).await
    }

    /// The checkpoints of a sandbox, oldest first.
    pub async fn checkpoints(&self, id: &SandboxId) -> NodeResult<Vec<CheckpointInfo>> {
        Ok(self.checkpoints.list(&*self.roster.get(id)?).await)
    }

    /// Removes one checkpoint of a sandbox.
    pub fn remove_checkpoint(&self, id: &SandboxId, name: &str) -> NodeResult<()> {
        self.roster.get(id)?;
        self.checkpoints.remove(id, name)
    }

    /// Brings a sandbox back to a checkpoint, also one that ended.
    pub async fn rewind(&self, id: &SandboxId, request: &RewindRequest) -> NodeResult<CheckpointInfo> {
        self.checkpoints.rewind(&self.roster.get(id)?, request).await
    }

    /// All sandboxes in the order of their ids.
    pub fn sandboxes(&self) -> Vec<SandboxInfo> {
        self.roster.all().iter().map(|sandbox| sandbox.info()).collect()
    }

    /// One sandbox.
    pub fn sandbox(&self, id: &SandboxId) -> NodeResult<SandboxInfo> {
        Ok(self.roster.get(id)?.info())
    }

    /// Ends a sandbox at once and forgets it.
    pub fn kill(&self, id: &SandboxId) -> NodeResult<()> {
        self.roster.end(id, None)?;
        self.checkpoints.forget(id);
        Ok(())
    }

    /// Runs a program to its end and collects its output.
    pub async fn exec(&self, id: &SandboxId, request: ExecRequest) -> NodeResult<ExecResponse> {
        let sandbox = self.roster.get(id)?;
        if request.args.is_empty() {
            let rule = "name the program to run";
            return Err(NodeError::BadField { field: "args", value: "empty".to_owned(), rule });
        }
        let ExecRequest { args, timeout_secs, env, cwd, user, stdin } = request;
        let timeout = Duration::from_secs(timeout_secs);
        let timeout_ms = Some(timeout_secs.saturating_mul(1000));
        let _in_use = sandbox.in_use();
        self.checkpoints.take_automatically(&sandbox).await?;
        let exec = Exec { args, env, cwd, user, timeout_ms, ..Exec::default() };
        let (limit, output_limit) = (timeout.saturating_add(ANSWER_GRACE), self.host.config.exec_output_limit);
        match sandbox.guest()?.exec(exec, stdin.as_deref(), output_limit, limit).await {
            Ok(done) => Ok(ExecResponse {
                stdout: text(done.stdout),
                stderr: text(done.stderr),
                exit_code: done.exited.code,
                timed_out: done.exited.timed_out,
            }),
            // A program that is not there, or no program, is an outcome of running it, as in a shell.
            Err(GuestError::Refused(failure))
                if matches!(failure.code, FailureCode::NotFound | FailureCode::Denied) =>
            {
                Ok(ExecResponse { stdout: String::new(), stderr: failure.message, exit_code: 1, timed_out: false })
            }
            Err(source) => Err(explain_loss(&sandbox, "exec", source).await),
        }
    }

    /// Runs source text in a warm runtime of a sandbox.
    pub async fn eval(&self, id: &SandboxId, request: EvalRequest) -> NodeResult<EvalResponse> {
        let sandbox = self.roster.get(id)?;
        let timeout_ms = Some(request.timeout_secs.saturating_mul(1000));
        let eval = Eval { language: request.language, code: request.code, timeout_ms };
        let limit = Duration::from_secs(request.timeout_secs).saturating_add(ANSWER_GRACE);
        let _in_use = sandbox.in_use();
        self.checkpoints.take_automatically(&sandbox).await?;
        match sandbox.guest()?.eval(eval, limit).await {
            Ok(Evaluated { result, error, stdout, .. }) => {
                let exit_code = i32::from(error.is_some());
                Ok(EvalResponse { result, error, exit_code, stdout })
            }
            // The runtime is missing, or was ended by the time limit: the outcome of this code.
            Err(GuestError::Refused(failure)) => {
                Ok(EvalResponse { result: None, error: Some(failure.message), exit_code: 1, stdout: String::new() })
            }
            Err(source) => Err(explain_loss(&sandbox, "eval", source).await),
        }
    }

    /// Asks a sandbox's agent whether it is there.
    pub async fn ping(&self, id: &SandboxId) -> NodeResult<Pong> {
        let sandbox = self.roster.get(id)?;
        match sandbox.idle_guest()?.ping(PING_LIMIT).await {
            Ok(pong) => Ok(pong),
            Err(source) => Err(explain_loss(&sandbox, "ping", source).await),
        }
    }

    /// A connection to a sandbox's agent, for one request of the agent's own protocol; `to_exec` says that the
    /// request will be to run something.
    pub async fn agent(&self, id: &SandboxId, to_exec: bool) -> NodeResult<GuestConnection> {
        let sandbox = self.roster.get(id)?;
        if to_exec {
            self.checkpoints.take_automatically(&sandbox).await?;
        }
        match sandbox.guest()?.connect().await {
            Ok(connection) => Ok(connection),
            Err(source) => Err(explain_loss(&sandbox, "agent connection", source).await),
        }
    }

    /// The error for a request of a client's own to a sandbox's agent, `what`, that failed with `source`.
    pub async fn explain(&self, id: &SandboxId, what: &'static str, source: GuestError) -> NodeError {
        match self.roster.get(id) {
            Ok(sandbox) => explain_loss(&sandbox, what, source).await,
            Err(gone) => gone,
        }
    }

    /// What a sandbox costs the host.
    pub async fn memory(&self, id: &SandboxId) -> NodeResult<SandboxMemory> {
        let running = self.roster.get(id)?.running()?;
        let pid = running.process.key().pid;
        let event = running.control.request(&Command::Pages, Vec::new()).wait().await;
        let private_pages = event
            .and_then(|event| expect_event!(id, event, Pages { private_count }))
            .map_err(|source| NodeError::Monitor { what: "list the pages", id: id.clone(), source })?;
        let own = blocking("reading a monitor's sizes", move || memory::of_process(pid)).await?;
        let own = own.map_err(NodeError::io(format!("read the sizes of process {pid}")))?;
        Ok(SandboxMemory {
            pss_bytes: own.pss,
            private_bytes: own.private,
            page_table_bytes: own.page_tables,
            guest_dirty_bytes: PageCount(private_pages).bytes(),
        })
    }

    /// What a sandbox's guest wrote to its console, the newest part of it when it is long.
    pub async fn console(&self, id: &SandboxId) -> NodeResult<Vec<u8>> {
        self.roster.get(id)?;
        let path = self.host.files.console(id.as_str());
        let what = format!("read {}", path.display());
        blocking("reading a console", move || console::read(&path)).await?.map_err(NodeError::io(what))
    }

    /// What a sandbox's guest has written to its console, and what it goes on to write.
    pub fn follow_console(&self, id: &SandboxId) -> NodeResult<ConsoleStream> {
        let sandbox = self.roster.get(id)?;
        Ok(ConsoleStream::new(console::Follower::new(self.host.files.console(id.as_str())), sandbox))
    }

    /// All snapshots in the order of their tags.
    pub async fn snapshots(&self) -> NodeResult<Vec<SnapshotInfo>> {
        let store = self.host.store.clone();
        let mut failed = self.brancher.claims.all_failed();
        blocking("listing snapshots", move || {
            let mut listed = store.list()?;
            listed.retain(|listed| !snapshots::is_checkpoint(listed));
            let mut all: Vec<_> = listed.iter().map(|listed| snapshots::info(&store, listed)).collect();
            failed.retain(|info| all.iter().all(|there| there.tag != info.tag));
            all.extend(failed);
            all.sort_by(|one, other| one.tag.cmp(&other.tag));
            Ok(all)
        })
        .await?
    }

    /// Everything about one snapshot.
    pub async fn snapshot(&self, tag: &Tag) -> NodeResult<SnapshotDetail> {
        let (store, own) = (self.host.store.clone(), tag.clone());
        let detail = blocking("reading a snapshot", move || snapshots::detail(&store, &own)).await?;
        detail.map_err(|error| self.explain_unready(error))
    }

    /// Removes a snapshot. Sandboxes that were forked from it live on.
    pub async fn remove_snapshot(&self, tag: &Tag, removal: Removal) -> NodeResult<()> {
        let (store, own) = (self.host.store.clone(), tag.clone());
        let checkpoint_of = blocking("reading a snapshot", move || store.get(&own).ok()?.meta.checkpoint_of).await?;
        if let Some(id) = checkpoint_of {
            return Err(NodeError::IsCheckpoint { tag: tag.clone(), id });
        }
        if removal != Removal::Forced
            && let Some(name) = self.lifetimes.workspaces.of_state(tag)
        {
            return Err(NodeError::IsWorkspaceState { tag: tag.clone(), name });
        }
        let was_failed = self.brancher.claims.forget_failure(tag);
        let (store, own) = (self.host.store.clone(), tag.clone());
        let (removed, outcome) = blocking("removing a snapshot", move || {
            let mut removed = Vec::new();
            let outcome = snapshots::remove(&store, own, removal, |tag| removed.push(tag));
            (removed, outcome)
        })
        .await?;
        for tag in &removed {
            self.zygotes.discard(tag);
            self.host.events.tell(News::of(EventKind::SnapshotRemoved).snapshot(tag));
        }
        match outcome {
            // All there was of it is the memory of its failure, which is gone now.
            Err(StoreError::NotFound { .. }) if was_failed => Ok(()),
            Err(StoreError::NotFound { tag }) if self.brancher.claims.has(&tag) => {
                Err(NodeError::SnapshotInProgress { tag })
            }
            outcome => Ok(outcome?),
        }
    }

    /// Recomputes every digest of a snapshot, telling `progress`. The last line is `Done` or `Failed`.
    pub async fn verify(&self, tag: &Tag, progress: mpsc::Sender<VerifyProgress>) -> NodeResult<()> {
        let (store, tag) = (self.host.store.clone(), tag.clone());
        blocking("verifying a snapshot", move || verify(&store, &tag, &progress)).await
    }

    /// Whether there is a snapshot of this tag, whole.
    pub async fn check_snapshot(&self, tag: &Tag) -> NodeResult<()> {
        let (store, own) = (self.host.store.clone(), tag.clone());
        blocking("reading a snapshot", move || store.get(&own).map(drop))
            .await?
            .map_err(|error| self.explain_unready(error.into()))
    }

    /// Opens and hashes what a pack of a snapshot holds; writing it blocks on the file system.
    pub async fn pack(&self, tag: &Tag, options: PackOptions) -> NodeResult<Pack> {
        self.brancher.pack(tag, options).await.map_err(|error| self.explain_unready(error))
    }

    /// Takes in the pack that `source` gives, which may block. Either all of it is there at the end or nothing that
    /// was not there before.
    pub async fn unpack(&self, source: impl Read + Send + 'static, options: UnpackOptions) -> NodeResult<UnpackReport> {
        self.brancher.unpack(source, options).await
    }

    /// Size of the blob of this digest, if it is in the store.
    pub async fn blob_size(&self, digest: &Digest) -> NodeResult<Option<u64>> {
        let (store, digest) = (self.host.store.clone(), *digest);
        let blob = blocking("looking for a blob", move || store.blob(&digest)).await??;
        Ok(blob.map(|blob| blob.size))
    }

    /// Begins a blob. What is returned blocks on the file system.
    pub fn upload(&self) -> NodeResult<BlobUpload> {
        Ok(BlobUpload(self.host.store.stage_blob()?))
    }

    /// Checks a bake's request; the returned future does it and reports to `events`.
    ///
    /// Dropping the future, or the receiver of its events, abandons the bake and leaves nothing.
    pub async fn bake(
        &self,
        request: BakeRequest,
        events: mpsc::Sender<BakeEvent>,
    ) -> NodeResult<impl Future<Output = ()> + Send + use<>> {
        let bake = Bake::prepare(&self.host, &self.zygotes, &self.brancher.claims, request).await?;
        Ok(bake.run(events))
    }

    /// Numbers for `/metrics`.
    pub async fn gauges(&self) -> NodeResult<NodeGauges> {
        let store = self.host.store.clone();
        let listed = blocking("listing snapshots", move || store.list()).await??;
        let snapshots = listed.iter().filter(|listed| matches!(listed, Listed::Ready { .. })).count();
        let sandboxes = self.roster.all().iter().filter(|sandbox| sandbox.running().is_ok()).count();
        let (branches_in_flight, branch_cap) = (self.brancher.slots.taken(), self.brancher.slots.cap());
        Ok(NodeGauges { snapshots, sandboxes, branches_in_flight, branch_cap })
    }

    /// The warm zygotes, with what they cost.
    pub async fn zygotes(&self) -> NodeResult<Vec<ZygoteGauge>> {
        let warm = self.zygotes.warm();
        blocking("reading the sizes of zygotes", move || warm.into_iter().filter_map(|one| one.measure()).collect())
            .await
    }

    /// Tries whether the state database can be written.
    pub async fn try_database(&self) -> NodeResult<()> {
        Ok(self.host.database.try_to_write().await?)
    }

    /// Tries whether the store can be written.
    pub async fn try_store(&self) -> NodeResult<()> {
        let store = self.host.store.clone();
        blocking("writing to the store", move || gauges::try_to_write(&store)).await?
    }
}

/// A blob on its way into the store. Dropping it unfinished leaves nothing.
pub struct BlobUpload(BlobWriter);

impl BlobUpload {
    /// Logical bytes written so far.
    pub fn written(&self) -> u64 {
        self.0.written()
    }

    /// Makes the blob permanent if its content has digest `expected`.
    pub fn finish(self, expected: Digest) -> NodeResult<Digest> {
        Ok(self.0.finish(Some(expected))?)
    }
}

impl Write for BlobUpload {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// A connection that broke may be the first sign that the machine stopped, whose own reason is the
/// better explanation. It follows within a moment, or never.
async fn explain_loss(sandbox: &Sandbox, what: &'static str, source: GuestError) -> NodeError {
    const MOMENT: Duration = Duration::from_millis(500);
    let id = sandbox.id.clone();
    if source.is_loss() {
        match sandbox.running() {
            Err(stopped) => return stopped,
            Ok(running) => {
                if let Ok(ending) = tokio::time::timeout(MOMENT, running.control.closed()).await {
                    // The end of the connection is seen before that of the process, whose group tells why.
                    let _ = tokio::time::timeout(MOMENT, running.process.exited()).await;
                    let End { code, reason } = match running.allotment.out_of_memory() {
                        Some(end) => end,
                        None => match sandbox.running() {
                            Err(stopped) => return stopped,
                            Ok(_) => ending.end(),
                        },
                    };
                    return NodeError::SandboxStopped { id, code, reason };
                }
            }
        }
    }
    NodeError::Guest { what, id, source }
}

fn open_host(config: NodeConfig) -> NodeResult<Host> {
    let path: PathBuf = config.state_dir.clone();
    let files =
        RunFiles::open(&path).map_err(NodeError::io(format!("prepare the state directory {}", path.display())))?;
    let store = Store::open(&config.store_root)?;
    let database = Database::open(&path.join("forkd.db"))?;
    let cpu = cpu::host().map_err(NodeError::io("read /proc/cpuinfo"))?;
    let groups = Groups::open(&config);
    let total = HostMemory::now().map_err(NodeError::io("read /proc/meminfo"))?.total;
    let admission = Admission::new(total, config.memory_reserve, config.memory_overcommit);
    let networks = networks::open(&config)?;
    Ok(Host { config, store, database, files, groups, admission, networks, cpu, events: Events::new() })
}

/// Each sandbox costs two descriptors, and a spawn of a thousand some thousands more for a moment.
fn raise_descriptor_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

async fn tidy(host: Arc<Host>, zygotes: Arc<Zygotes>, roster: Arc<Roster>, checkpoints: Arc<Checkpoints>) {
    let mut ticks = tokio::time::interval(TIDY_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        zygotes.retire_idle();
        roster.forget_stopped();
        checkpoints.forget_orphans();
        checkpoints.trim();
        checkpoints.sweep().await;
        let consoles: Vec<_> = roster.all().iter().map(|sandbox| host.files.console(sandbox.id.as_str())).collect();
        let cut = blocking("looking at consoles", move || {
            for path in consoles {
                match console::cut_if_large(&path) {
                    Ok(true) => tracing::info!(path = %path.display(), "cut a console that grew too large"),
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        tracing::warn!(path = %path.display(), %error, "cannot look at a console");
                    }
                    _ => {}
                }
            }
        });
        let _ = cut.await;
    }
}

fn verify(store: &Store, tag: &Tag, progress: &mpsc::Sender<VerifyProgress>) {
    let report = store.verify(
        tag,
        |path| forkd_memory::layer::verify(path, |_| {}).map_err(|error| crate::error::with_causes(&error)),
        |now| {
            // A reader that has gone away, or is slow, does not hold the verification up.
            let _ = progress.try_send(VerifyProgress::Checking {
                what: now.what.to_owned(),
                done_bytes: now.done_bytes,
                total_bytes: now.total_bytes,
            });
        },
    );
    match report {
        Ok(report) => {
            for bad in report.bad().filter_map(snapshots::bad) {
                let _ = progress.blocking_send(bad);
            }
            let total_bytes = report.checked.iter().map(|checked| checked.bytes).sum();
            let files = report.checked.len();
            let _ = progress.blocking_send(VerifyProgress::Done { good: report.is_good(), files, total_bytes });
        }
        Err(error) => {
            let error = crate::error::with_causes(&error);
            let _ = progress.blocking_send(VerifyProgress::Failed { error });
        }
    }
}

/// Bytes as text; what is not UTF-8 is replaced.
fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}
