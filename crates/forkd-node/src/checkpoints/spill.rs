//! Checkpoints that go from memory to disk, and the snapshots that they leave.
//!
//! A frozen copy costs the memory that its sandbox has written since. When all of them together take more than
//! the node was given for them, the oldest are written as snapshots: what differs from the sandbox's own
//! snapshot, whose layers the new one has by hard links, as every snapshot of a sandbox has that stands alone.
//! Such a snapshot is not listed and goes when no checkpoint is in it and no machine changes it any more.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use forkd_proto::monitor::Contents;
use forkd_store::{Listed, StagedSnapshot, StoreError};
use forkd_types::rest::{CheckpointInfo, EventKind};
use forkd_types::{SandboxId, Tag};

use super::Checkpoints;
use super::line::{Checkpoint, Held};
use crate::database::Base;
use crate::error::{NodeError, NodeResult, with_causes};
use crate::events::News;
use crate::frozen::Frozen;
use crate::host::{blocking, unix_now};
use crate::lineage;
use crate::memory;
use crate::publication::Written;
use crate::snapshot_writer::SnapshotWriter;
use crate::snapshots::{self, CHECKPOINT_PREFIX};

impl Checkpoints {
    /// Moves the oldest checkpoints to disk, in the background, until the others fit the budget.
    pub(crate) fn trim(self: &Arc<Self>) {
        let checkpoints = Arc::clone(self);
        tokio::spawn(async move {
            while let Some((id, name)) = checkpoints.surplus().await {
                if let Err(error) = checkpoints.spill(&id, &name).await {
                    let reason = with_causes(&error);
                    tracing::warn!(sandbox = %id, checkpoint = name, reason, "a checkpoint stays in memory");
                    return;
                }
            }
        });
    }

    /// The oldest checkpoint in memory, if all of them take more than they may.
    async fn surplus(&self) -> Option<(SandboxId, String)> {
        let frozen: Vec<(u64, SandboxId, String, i32)> = {
            let lines = self.lines();
            let points = lines.iter().flat_map(|(id, line)| line.points.iter().map(move |point| (id, point)));
            let frozen = points.filter_map(|(id, point)| match &point.held {
                Held::Frozen(frozen) => Some((point.created_at_unix, id.clone(), point.name.clone(), frozen.key().pid)),
                Held::Snapshot(_) => None,
            });
            frozen.collect()
        };
        let budget = self.host.config.checkpoint_memory_bytes;
        let pids: Vec<i32> = frozen.iter().map(|(.., pid)| *pid).collect();
        // What several share counts in parts for each, so that the sum is what all of them take. One that has
        // ended takes nothing.
        let sum = move || pids.into_iter().filter_map(|pid| Some(memory::of_process(pid).ok()?.pss)).sum::<u64>();
        if blocking("measuring checkpoints", sum).await.ok()? <= budget {
            return None;
        }
        let oldest = frozen.into_iter().min_by_key(|(created, ..)| *created);
        oldest.map(|(_, id, name, _)| (id, name))
    }

    /// Moves one checkpoint to disk; nothing happens to one that is there already.
    ///
    /// # Errors
    /// The checkpoint is where it was.
    pub(super) async fn spill(self: &Arc<Self>, id: &SandboxId, name: &str) -> NodeResult<CheckpointInfo> {
        let _moving = self.moving.lock().await;
        let point = {
            let lines = self.lines();
            let line = lines.get(id).ok_or_else(|| NodeError::SandboxNotFound { id: id.clone() })?;
            line.points[line.position(id, name)?].clone()
        };
        let Held::Frozen(frozen) = &point.held else { return Ok(point.info()) };
        let snapshot = self.write(id, &point, frozen).await?;
        let stored_bytes = self.stored_bytes(&snapshot).await;
        let moved = {
            let mut lines = self.lines();
            let line = lines.entry(id.clone()).or_default();
            // It may have been removed meanwhile; the sweep then removes the snapshot.
            let at = line.position(id, name)?;
            line.points[at].held = Held::Snapshot(snapshot);
            line.points[at].clone()
        };
        self.host.database.note_checkpoint(moved.record(id));
        frozen.end();
        tracing::info!(sandbox = %id, checkpoint = name, "a checkpoint went to disk");
        self.host.events.tell(News::of(EventKind::CheckpointMoved).sandbox(id).checkpoint(name));
        Ok(CheckpointInfo { stored_bytes, ..moved.info() })
    }

    /// Writes what `frozen` holds as a snapshot of its own.
    async fn write(&self, id: &SandboxId, point: &Checkpoint, frozen: &Arc<Frozen>) -> NodeResult<Base> {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let tag: Tag = format!("{CHECKPOINT_PREFIX}{:08x}-{serial:04x}", unix_now()).parse().expect("legal characters");
        let _claim = self.brancher.claims.claim(&tag)?;
        let (store, own, base) = (self.host.store.clone(), tag.clone(), point.base.clone());
        let staging = blocking("staging a checkpoint", move || {
            let chain = base.as_ref().map(|base| lineage::chain_of(&store, base)).transpose()?.flatten();
            Ok::<_, StoreError>((store.stage(&own)?, chain))
        });
        let failed = |reason: String| NodeError::Branch { tag: tag.clone(), reason };
        let (staged, chain) = staging.await??;
        let chain = chain.ok_or_else(|| failed(format!("the snapshot that {id} was forked from is gone")))?;
        let contents = lineage::contents_over(&chain);
        let writer = SnapshotWriter::fork(&self.host, &frozen.control, 0, &staged, contents).await;
        let writer = writer.map_err(|error| failed(error.to_string()))?;
        let (sandbox, pause_us) = (id.to_string(), point.pause_us);
        let describe = move |staged: &mut StagedSnapshot, written: &Written| {
            let newest = chain.last().expect("a chain ends in its snapshot");
            let mut meta = lineage::describe(staged.tag(), &written.facts, &newest.meta, staged.vmstate_bytes()?);
            (meta.branched_from, meta.pause_us) = (Some(sandbox.clone()), Some(pause_us));
            meta.checkpoint_of = Some(sandbox);
            if contents == Contents::Changes {
                lineage::adopt_layers(staged, &mut meta, &chain, &[])?;
            }
            Ok(meta)
        };
        self.brancher.complete(&tag, writer, staged, false, describe).await?;
        let (store, own) = (self.host.store.clone(), tag);
        let snapshot = blocking("reading a checkpoint", move || store.get(&own)).await??;
        Ok(Base { tag: snapshot.meta.tag, digest: snapshot.digest })
    }

    pub(super) async fn stored_bytes(&self, snapshot: &Base) -> Option<u64> {
        let (store, tag) = (self.host.store.clone(), snapshot.tag.clone());
        let stored = blocking("measuring a checkpoint", move || Some(snapshots::own_bytes(&store.get(&tag).ok()?)));
        stored.await.ok()?
    }

    /// Removes snapshots of checkpoints that nobody needs, in the background.
    pub(super) fn sweep_soon(self: &Arc<Self>) {
        let checkpoints = Arc::clone(self);
        tokio::spawn(async move { checkpoints.sweep().await });
    }

    /// Removes snapshots of checkpoints in which there is none any more and which no machine changes.
    pub(crate) async fn sweep(&self) {
        let _moving = self.moving.lock().await;
        let store = self.host.store.clone();
        let listed = blocking("listing checkpoints on disk", move || store.list()).await;
        let Ok(Ok(listed)) = listed else { return };
        let needed = self.needed();
        for entry in listed {
            let Listed::Ready { snapshot, .. } = entry else { continue };
            if snapshot.meta.checkpoint_of.is_none() || needed.contains(&snapshot.meta.tag) {
                continue;
            }
            let (store, tag) = (self.host.store.clone(), snapshot.meta.tag);
            self.brancher.zygotes.discard(&tag);
            let removed = blocking("removing a checkpoint", move || store.remove(&tag)).await;
            if let Ok(Err(error)) = removed
                && !matches!(error, StoreError::NotFound { .. })
            {
                tracing::warn!(reason = with_causes(&error), "cannot remove a checkpoint's snapshot");
            }
        }
    }

    /// The snapshots that a checkpoint is in, or that a machine or a frozen copy changes.
    fn needed(&self) -> HashSet<Tag> {
        let machines = self.roster.all().into_iter().filter_map(|sandbox| Some(sandbox.base()?.tag));
        let mut needed: HashSet<Tag> = machines.collect();
        for point in self.lines().values().flat_map(|line| &line.points) {
            needed.extend(point.base_of_copies().map(|base| base.tag));
        }
        needed
    }
}
