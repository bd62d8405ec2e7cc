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

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use forkd_proto::monitor::Contents;
use forkd_store::{DiffFacts, MEMORY_LAYER, ParentRef, Snapshot, StagedSnapshot, StoreError};
use forkd_types::rest::{BranchMode, BranchRequest, EventKind, SnapshotInfo, SnapshotStatus};
use forkd_types::{PageCount, Tag};

use crate::branch_slots::BranchSlots;
use crate::claims::Claims;
use crate::database::Base;
use crate::error::{NodeError, NodeResult, with_causes};
use crate::events::News;
use crate::gauges::observe_branch;
use crate::host::{Host, blocking, unix_now};
use crate::lineage::{adopt_layers, chain_of, contents_over, describe, lies_over};
use crate::publication::Written;
use crate::sandbox::Sandbox;
use crate::snapshot_writer::SnapshotWriter;
use crate::snapshots;
use crate::zygotes::Zygotes;

/// How long the guest may take to flush its file systems.
const SYNC_LIMIT: Duration = Duration::from_secs(60);

/// What a branch is to be, checked.
pub(crate) struct Order {
    tag: Tag,
    wait: bool,
    measure: bool,
    /// Keep it as a layer over this snapshot, which must be the sandbox's.
    parent: Option<String>,
    sync: bool,
    replace: bool,
}

impl Order {
    /// One that waits and takes the place of an earlier snapshot of `tag`.
    pub(crate) fn replacing(tag: Tag) -> Self {
        Self { tag, wait: true, measure: false, parent: None, sync: false, replace: true }
    }

    /// Checks what can be checked without the sandbox, in the order that clients know.
    pub(crate) fn check(request: &BranchRequest) -> NodeResult<Self> {
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
        let (parent, sync, replace) = (request.parent_tag.clone(), request.sync, request.replace);
        Ok(Self { tag, wait: request.wait, measure, parent, sync, replace })
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
    pub(crate) slots: BranchSlots,
}

/// A branch whose source runs again.
pub(crate) struct Begun {
    order: Order,
    source: Arc<Sandbox>,
    /// The snapshot that the sandbox changes and all it derives from, the base first.
    chain: Vec<Snapshot>,
    /// The one that the new snapshot is to lie over, and all that derives from, if it is to be a layer.
    over: Option<Vec<Snapshot>>,
    contents: Contents,
    staged: StagedSnapshot,
    writer: SnapshotWriter,
    began: Instant,
}

/// A place for a snapshot, and what it lies over.
struct Staged {
    staged: StagedSnapshot,
    chain: Vec<Snapshot>,
    over: Option<Vec<Snapshot>>,
}

impl Brancher {
    /// Takes a snapshot of `sandbox`. With `wait: false` the answer comes when the
    /// sandbox runs again, and the snapshot is `writing`.
    ///
    /// # Errors
    /// The sandbox runs on after each of them, and nothing is left of the snapshot.
    pub(crate) async fn branch(&self, sandbox: &Arc<Sandbox>, order: Order) -> NodeResult<SnapshotInfo> {
        let slot = self.slots.take()?;
        let claim = self.claims.claim(&order.tag)?;
        self.check_place(&order.tag, order.replace).await?;
        if let Some(parent) = &order.parent
            && *parent != sandbox.origin.snapshot_tag.as_str()
        {
            let rule = "it must be the snapshot that the sandbox was forked from";
            return Err(NodeError::BadField { field: "parent_tag", value: parent.clone(), rule });
        }
        self.claims.forget_failure(&order.tag);
        let begun = self.begin(sandbox, order).await?;
        if begun.order.wait {
            return self.finish(begun).await;
        }
        let answer = SnapshotInfo {
            status: SnapshotStatus::Writing,
            branched_from: Some(sandbox.id.to_string()),
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
                claim.fail(SnapshotInfo { status: SnapshotStatus::Failed, warning, stages: None, ..failed });
            } else {
                // Not before its outcome can be seen.
                drop(claim);
            }
            drop(slot);
        });
        Ok(answer)
    }

    /// Fails unless a snapshot may be published as `tag`: there is none, or it may be replaced and no other builds on it.
    pub(crate) async fn check_place(&self, tag: &Tag, replace: bool) -> NodeResult<()> {
        let (store, tag) = (self.host.store.clone(), tag.clone());
        let looking = blocking("looking for a snapshot", move || match store.get(&tag) {
            Ok(_) if !replace => Err(StoreError::AlreadyExists { tag }),
            Ok(_) => store.refuse_children(&tag),
            Err(_) => Ok(()),
        });
        Ok(looking.await??)
    }

    /// Forks the writer; the sandbox runs again when this returns.
    pub(crate) async fn begin(&self, sandbox: &Arc<Sandbox>, order: Order) -> NodeResult<Begun> {
        let began = Instant::now();
        let _turn = sandbox.turn.lock().await;
        let running = sandbox.running()?;
        let Staged { staged, chain, over } = self.stage(sandbox, &order).await?;
        let contents = if order.parent.is_some() { Contents::Changes } else { contents_over(&chain) };
        if order.sync {
            let failed = |source| NodeError::Guest { what: "sync", id: sandbox.id.clone(), source };
            sandbox.idle_guest()?.sync(SYNC_LIMIT).await.map_err(failed)?;
        }
        let failed = |source| NodeError::Monitor { what: "take a snapshot", id: sandbox.id.clone(), source };
        let disks = sandbox.origin.disks;
        let writer =
            SnapshotWriter::fork(&self.host, &running.control, disks, &staged, contents).await.map_err(failed)?;
        self.host.events.tell(News::of(EventKind::SnapshotWriting).snapshot(&order.tag).sandbox(&sandbox.id));
        Ok(Begun { order, source: Arc::clone(sandbox), chain, over, contents, staged, writer, began })
    }

    /// A place for the snapshot, and the snapshots that `sandbox` changes.
    async fn stage(&self, sandbox: &Sandbox, order: &Order) -> NodeResult<Staged> {
        let (store, tag, origin) = (self.host.store.clone(), order.tag.clone(), sandbox.origin.snapshot());
        // Other than the origin after a rewind to a checkpoint on disk.
        let (base, layered) = (sandbox.base(), order.parent.is_some());
        let staging = blocking("staging a snapshot", move || {
            let staged = store.stage(&tag)?;
            let find = |base: Option<&Base>| base.map(|base| chain_of(&store, base)).transpose().map(Option::flatten);
            let over = if layered { Some(find(origin.as_ref())?) } else { None };
            Ok::<_, StoreError>((staged, find(base.as_ref())?, over))
        });
        let (id, tag) = (&sandbox.id, &sandbox.origin.snapshot_tag);
        let gone = || {
            let reason = format!("sandbox {id} was forked from it, and it was removed or replaced since");
            NodeError::SnapshotNotReady { tag: tag.clone(), reason }
        };
        let (staged, chain, over) = staging.await??;
        let chain = chain.ok_or_else(gone)?;
        let over = over.map(|over| over.ok_or_else(gone)).transpose()?;
        if over.as_ref().is_some_and(|over| !lies_over(&chain, over)) {
            let rule = "leave it out: the sandbox was rewound to a checkpoint on disk that has all of its memory";
            return Err(NodeError::BadField { field: "parent_tag", value: tag.to_string(), rule });
        }
        Ok(Staged { staged, chain, over })
    }

    /// Waits for the writer and publishes what it wrote.
    pub(crate) async fn finish(&self, begun: Begun) -> NodeResult<SnapshotInfo> {
        let Begun { order, source, chain, over, contents, staged, writer, began } = begun;
        let (tag, pause_us, mut stages) = (order.tag.clone(), writer.pause_us, writer.stages.clone());
        let branched_from = Some(source.id.to_string());
        let describe = move |staged: &mut StagedSnapshot, written: &Written| {
            let newest = chain.last().expect("a chain ends in its snapshot");
            let mut meta = describe(&order.tag, &written.facts, &newest.meta, staged.vmstate_bytes()?);
            (meta.branched_from, meta.pause_us) = (branched_from, Some(pause_us));
            if order.measure {
                let bytes = PageCount(written.facts.memory_pages).bytes();
                meta.diff = Some(DiffFacts { us: written.stages.total().as_micros() as u64, bytes });
            }
            match over {
                Some(over) => {
                    let newest = over.last().expect("a chain ends in its snapshot");
                    meta.parent = Some(ParentRef { tag: newest.meta.tag.clone(), digest: newest.digest });
                    adopt_layers(staged, &mut meta, &chain, &over)?;
                }
                None if contents == Contents::Changes => adopt_layers(staged, &mut meta, &chain, &[])?,
                None => {}
            }
            Ok(meta)
        };
        let info = self.complete(&tag, writer, staged, order.replace, describe).await.inspect_err(|error| {
            let news = News::of(EventKind::SnapshotFailed).snapshot(&tag).sandbox(&source.id);
            self.host.events.tell(news.because(with_causes(error)));
        })?;
        source.note_branch(&self.host, Path::new(&info.dir).join(MEMORY_LAYER).display().to_string());
        stages.0.extend(info.stages.into_iter().flat_map(|written| written.0));
        observe_branch(pause_us, &stages);
        tracing::info!(%tag, pause_us, took_ms = began.elapsed().as_millis() as u64, "took a snapshot");
        Ok(SnapshotInfo { stages: Some(stages), ..info })
    }
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
        assert!(one.wait && one.parent.is_none() && !one.measure && one.tag != other.tag);
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
        assert!(
            check(serde_json::json!({"mode": "diff", "parent_tag": "py"})).is_ok_and(|order| order.parent.is_some())
        );
    }
}
