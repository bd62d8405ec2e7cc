//! Snapshots of running sandboxes.
//!
//! ```text
//! stage ──► fork a writer (the source stands still) ──► write ──► publish
//!   │                       │                             │          │
//!   └── failed: nothing     └── the source runs on ───────┴──────────┴──► failed: staged files
//!       was done                whatever comes after                      removed, tag listed as failed
//! ```
//!
//! Only what differs from the sandbox's own snapshot is written. A branch with a parent is a layer over
//! that snapshot; one without has that snapshot's files as its own by hard links, so that neither needs the
//! other and nothing is copied.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use forkd_proto::monitor::{Contents, SnapshotFacts};
use forkd_store::{
    DiffFacts, DiskLayer, MEMORY_LAYER, MemoryLayer, ParentRef, Snapshot, SnapshotMeta, StagedSnapshot, StoreError,
};
use forkd_types::rest::{BranchMode, BranchRequest, SnapshotInfo, SnapshotStatus};
use forkd_types::{PageCount, SandboxId, Tag};

use crate::claims::{Claim, Claims};
use crate::error::{NodeError, NodeResult, with_causes};
use crate::host::{Host, blocking, unix_now};
use crate::sandbox::Sandbox;
use crate::snapshot_writer::SnapshotWriter;
use crate::snapshots;
use crate::zygotes::Zygotes;

/// How long the guest may take to flush its file systems.
const SYNC_LIMIT: Duration = Duration::from_secs(60);

/// A snapshot that depends on no other is written whole when it would have more memory layers than this.
/// Each is a descriptor of a zygote, and twice that with the disk's.
const LAYERS_LIMIT: usize = 48;

/// Branches that failed after their request had been answered, by tag; shown until the tag is used again.
#[derive(Clone, Default)]
pub(crate) struct FailedBranches(Arc<Mutex<BTreeMap<Tag, SnapshotInfo>>>);

impl FailedBranches {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Tag, SnapshotInfo>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them, in the order of their tags.
    pub(crate) fn all(&self) -> Vec<SnapshotInfo> {
        self.lock().values().cloned().collect()
    }

    /// Why the branch `tag` failed.
    pub(crate) fn reason(&self, tag: &Tag) -> Option<String> {
        self.lock().get(tag).and_then(|info| info.warning.clone())
    }

    /// Forgets `tag`; false when it was not there.
    pub(crate) fn forget(&self, tag: &Tag) -> bool {
        self.lock().remove(tag).is_some()
    }
}

/// What a branch is to be, checked.
struct Order {
    tag: Tag,
    wait: bool,
    measure: bool,
    /// Keep it as a layer over the sandbox's snapshot.
    layered: bool,
    sync: bool,
}

impl Order {
    /// Checks what can be checked without the sandbox, in the order that clients know.
    fn check(request: &BranchRequest) -> NodeResult<Self> {
        let tag = match &request.tag {
            Some(tag) => tag.parse()?,
            None => generated_tag(),
        };
        let selectors = [request.measure_diff, request.diff, request.live].into_iter().filter(|set| *set).count();
        let wrong = |field, value: String, rule| Err(NodeError::BadField { field, value, rule });
        if request.mode.is_some() && (request.diff || request.live) {
            return wrong("mode", "given together with diff or live".to_owned(), "use mode alone");
        }
        if selectors > 1 {
            return wrong("diff", "given together with live or measure_diff".to_owned(), "use one of them");
        }
        let live = request.live || request.mode == Some(BranchMode::Live);
        let diff = request.diff || request.mode == Some(BranchMode::Diff);
        if !request.wait && !live {
            return wrong("wait", "false".to_owned(), "it needs mode live");
        }
        if request.parent_tag.is_some() && !diff {
            return wrong("parent_tag", "given".to_owned(), "it needs mode diff");
        }
        let measure = diff || request.measure_diff;
        Ok(Self { tag, wait: request.wait, measure, layered: request.parent_tag.is_some(), sync: request.sync })
    }
}

fn generated_tag() -> Tag {
    static SERIAL: AtomicU64 = AtomicU64::new(0);
    let text = format!("branch-{:08x}-{:04x}", unix_now(), SERIAL.fetch_add(1, Ordering::Relaxed));
    text.parse().expect("hex digits and dashes make a legal tag")
}

/// Takes snapshots of sandboxes.
#[derive(Clone)]
pub(crate) struct Brancher {
    pub(crate) host: Arc<Host>,
    pub(crate) zygotes: Arc<Zygotes>,
    pub(crate) claims: Claims,
    pub(crate) failed: FailedBranches,
}

/// A branch whose source runs again.
struct Begun {
    order: Order,
    source: SandboxId,
    /// The sandbox's own snapshot and all it derives from, the base first.
    chain: Vec<Snapshot>,
    contents: Contents,
    staged: StagedSnapshot,
    claim: Claim,
    writer: SnapshotWriter,
    began: Instant,
}

impl Brancher {
    /// Takes a snapshot of `sandbox` as `request` asks. With `wait: false` the answer comes when the
    /// sandbox runs again, and the snapshot is `writing`.
    ///
    /// # Errors
    /// The sandbox runs on after each of them, and nothing is left of the snapshot.
    pub(crate) async fn branch(&self, sandbox: &Arc<Sandbox>, request: &BranchRequest) -> NodeResult<SnapshotInfo> {
        let order = Order::check(request)?;
        let claim = self.claims.claim(&order.tag)?;
        let own = order.tag.clone();
        let store = self.host.store.clone();
        if blocking("looking for a snapshot", move || store.get(&own).is_ok()).await? {
            return Err(forkd_store::StoreError::AlreadyExists { tag: order.tag }.into());
        }
        if let Some(parent) = &request.parent_tag
            && *parent != sandbox.origin.snapshot_tag.as_str()
        {
            let rule = "it must be the snapshot that the sandbox was forked from";
            return Err(NodeError::BadField { field: "parent_tag", value: parent.clone(), rule });
        }
        self.failed.forget(&order.tag);
        let wait = order.wait;
        let begun = self.begin(sandbox, order, claim).await?;
        if wait {
            return self.finish(begun).await;
        }
        let answer = SnapshotInfo {
            status: SnapshotStatus::Writing,
            branched_from: Some(begun.source.to_string()),
            pause_ms: Some(begun.writer.pause_us / 1000),
            stages: Some(begun.writer.stages.clone()),
            ..snapshots::unusable(&begun.order.tag, begun.staged.path(), None)
        };
        let (brancher, tag, failed) = (self.clone(), begun.order.tag.clone(), answer.clone());
        tokio::spawn(async move {
            if let Err(error) = brancher.finish(begun).await {
                let reason = with_causes(&error);
                tracing::warn!(%tag, reason, "a snapshot of a running sandbox failed");
                let warning = Some(reason);
                let info = SnapshotInfo { status: SnapshotStatus::Failed, warning, stages: None, ..failed };
                brancher.failed.lock().insert(tag, info);
            }
        });
        Ok(answer)
    }

    /// Forks the writer; the sandbox runs again when this returns.
    async fn begin(&self, sandbox: &Arc<Sandbox>, order: Order, claim: Claim) -> NodeResult<Begun> {
        let began = Instant::now();
        let _turn = sandbox.turn.lock().await;
        let running = sandbox.running()?;
        let (staged, chain) = self.stage(sandbox, &order.tag).await?;
        let contents =
            if layer_count(&chain) < LAYERS_LIMIT || order.layered { Contents::Changes } else { Contents::Whole };
        if order.sync {
            let failed = |source| NodeError::Guest { what: "sync", id: sandbox.id.clone(), source };
            sandbox.guest()?.sync(SYNC_LIMIT).await.map_err(failed)?;
        }
        let memory_file = snapshots::directory(&self.host.store, &order.tag).join(MEMORY_LAYER);
        sandbox.note_branch(&self.host, memory_file.display().to_string());
        let failed = |source| NodeError::Monitor { what: "take a snapshot", id: sandbox.id.clone(), source };
        let disks = sandbox.origin.disks;
        let writer =
            SnapshotWriter::fork(&self.host, &running.control, disks, &staged, contents).await.map_err(failed)?;
        Ok(Begun { order, source: sandbox.id.clone(), chain, contents, staged, claim, writer, began })
    }

    /// A place for the snapshot `tag`, and the snapshots that `sandbox` changes.
    async fn stage(&self, sandbox: &Sandbox, tag: &Tag) -> NodeResult<(StagedSnapshot, Vec<Snapshot>)> {
        let (store, own, origin) = (self.host.store.clone(), tag.clone(), sandbox.origin.clone());
        let staging = blocking("staging a snapshot", move || {
            let staged = store.stage(&own)?;
            // Another snapshot may have the tag by now: what the sandbox changes is known by its digest.
            let chain = store.chain(&origin.snapshot_tag).ok();
            let same = |chain: &Vec<Snapshot>| chain.last().map(|newest| newest.digest) == origin.snapshot_digest;
            Ok::<_, StoreError>((staged, chain.filter(same)))
        });
        match staging.await?? {
            (staged, Some(chain)) => Ok((staged, chain)),
            (_, None) => {
                let (id, tag) = (&sandbox.id, sandbox.origin.snapshot_tag.clone());
                let reason = format!("sandbox {id} was forked from it, and it was removed or replaced since");
                Err(NodeError::SnapshotNotReady { tag, reason })
            }
        }
    }

    /// Waits for the writer and publishes what it wrote.
    async fn finish(&self, begun: Begun) -> NodeResult<SnapshotInfo> {
        let Begun { order, source, chain, contents, staged, claim, writer, began } = begun;
        let failed = |reason: String| NodeError::Branch { tag: order.tag.clone(), reason };
        let (pause_us, mut stages) = (writer.pause_us, writer.stages.clone());
        let (facts, writing) = writer.finish(&self.host).await.map_err(failed)?;
        for stage in &writing.0 {
            stages.record(&format!("write.{}", stage.name), Duration::from_micros(stage.us));
        }
        let (store, tag, since) = (self.host.store.clone(), order.tag.clone(), Instant::now());
        let publishing = blocking("publishing a snapshot", move || {
            let mut staged = staged;
            let newest = chain.last().expect("a chain ends in its snapshot");
            let mut meta = describe(&order.tag, &facts, &newest.meta, staged.vmstate_bytes()?);
            meta.branched_from = Some(source.to_string());
            meta.pause_us = Some(pause_us);
            if order.measure {
                let bytes = PageCount(facts.memory_pages).bytes();
                meta.diff = Some(DiffFacts { us: writing.total().as_micros() as u64, bytes });
            }
            if order.layered {
                meta.parent = Some(ParentRef { tag: newest.meta.tag.clone(), digest: newest.digest });
            } else if contents == Contents::Changes {
                adopt_layers(&mut staged, &mut meta, &chain)?;
            }
            let snapshot = store.publish(staged, meta, false)?;
            let stored = snapshots::stored_bytes(&snapshot.dir);
            Ok::<_, StoreError>(snapshots::ready_info(&snapshot, Some(stored)))
        });
        let published = publishing.await?;
        drop(claim);
        stages.record("publish", since.elapsed());
        let info = published.map_err(|error| match error {
            exists @ StoreError::AlreadyExists { .. } => exists.into(),
            other => NodeError::Branch { tag: tag.clone(), reason: with_causes(&other) },
        })?;
        self.zygotes.discard(&tag);
        tracing::info!(%tag, pause_us, took_ms = began.elapsed().as_millis() as u64, "took a snapshot");
        Ok(SnapshotInfo { stages: Some(stages), ..info })
    }
}

/// How many layers of memory a chain has in all.
fn layer_count(chain: &[Snapshot]) -> usize {
    chain.iter().map(|snapshot| snapshot.meta.memory_layers.len()).sum()
}

/// The description of a snapshot with the disks and the past of `origin`, as yet without layers below its own.
pub(crate) fn describe(tag: &Tag, facts: &SnapshotFacts, origin: &SnapshotMeta, vmstate_bytes: u64) -> SnapshotMeta {
    let bases: Vec<_> = origin.disks.iter().map(|disk| (disk.base, disk.logical_bytes)).collect();
    let mut meta = SnapshotMeta::new(tag.clone(), unix_now(), facts, vmstate_bytes, &bases, origin.boot.clone());
    meta.warm.clone_from(&origin.warm);
    meta.memory_backing = origin.memory_backing;
    meta
}

/// Makes every layer of `chain` a file of the staged snapshot too, below its own.
fn adopt_layers(staged: &mut StagedSnapshot, meta: &mut SnapshotMeta, chain: &[Snapshot]) -> Result<(), StoreError> {
    let mut below = Vec::new();
    for (snapshot, layer) in chain.iter().flat_map(|s| s.meta.memory_layers.iter().map(move |layer| (s, layer))) {
        let file = format!("memory-{}.layer", below.len());
        staged.link(&snapshot.dir.join(&layer.file), &file)?;
        below.push(MemoryLayer { file, ..layer.clone() });
    }
    meta.memory_layers.splice(..0, below);
    for (index, disk) in meta.disks.iter_mut().enumerate() {
        let mut below = Vec::new();
        for snapshot in chain {
            for layer in snapshot.meta.disks.get(index).map(|disk| disk.layers.as_slice()).unwrap_or_default() {
                let file = format!("disk-{index}-{}.layer", below.len());
                staged.link(&snapshot.dir.join(&layer.file), &file)?;
                below.push(DiskLayer { file, ..layer.clone() });
            }
        }
        disk.layers.splice(..0, below);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(body: serde_json::Value) -> NodeResult<Order> {
        Order::check(&serde_json::from_value(body).expect("valid"))
    }

    #[test]
    fn an_empty_request_is_a_full_branch_with_a_generated_tag_that_waits() {
        let one = check(serde_json::json!({})).expect("fine");
        let other = check(serde_json::json!({})).expect("fine");
        assert!(one.wait && !one.layered && !one.measure && one.tag != other.tag);
    }

    #[test]
    fn selectors_that_contradict_each_other_are_refused() {
        for (body, field) in [
            (serde_json::json!({"mode": "full", "diff": true}), "mode"),
            (serde_json::json!({"live": true, "diff": true}), "diff"),
            (serde_json::json!({"measure_diff": true, "live": true}), "diff"),
            (serde_json::json!({"wait": false}), "wait"),
            (serde_json::json!({"wait": false, "diff": true}), "wait"),
            (serde_json::json!({"parent_tag": "py"}), "parent_tag"),
        ] {
            let found = match check(body.clone()) {
                Err(NodeError::BadField { field, .. }) => field,
                _ => panic!("{body} was taken"),
            };
            assert_eq!(found, field, "{body}");
        }
        assert!(check(serde_json::json!({"live": true, "wait": false})).is_ok());
        assert!(check(serde_json::json!({"mode": "diff", "parent_tag": "py"})).is_ok_and(|order| order.layered));
    }
}
