//! The last part of every snapshot that is made: wait for its writer, describe what it wrote, publish that.
//!
//! ```text
//! written ──► described ──► published
//!    │            │             │
//!    └────────────┴─────────────┴──► failed: the writer has ended, the staged files are removed
//! ```

use std::time::Instant;

use forkd_proto::monitor::SnapshotFacts;
use forkd_store::{SnapshotMeta, StagedSnapshot, Store, StoreError};
use forkd_types::rest::{EventKind, SnapshotInfo};
use forkd_types::{StageTimings, Tag};

use crate::branch::Brancher;
use crate::error::{NodeError, NodeResult, with_causes};
use crate::events::News;
use crate::host::blocking;
use crate::snapshot_writer::SnapshotWriter;
use crate::snapshots::{self, CHECKPOINT_PREFIX};

/// What a writer said of its work.
pub(crate) struct Written {
    pub(crate) facts: SnapshotFacts,
    pub(crate) stages: StageTimings,
}

/// Publishes `staged` as `describe` says, in place of an earlier snapshot of the tag if `replace`.
pub(crate) async fn publish(
    store: &Store,
    mut staged: StagedSnapshot,
    replace: bool,
    describe: impl FnOnce(&mut StagedSnapshot) -> Result<SnapshotMeta, StoreError> + Send + 'static,
) -> NodeResult<SnapshotInfo> {
    let store = store.clone();
    let publishing = blocking("publishing a snapshot", move || {
        let meta = describe(&mut staged)?;
        let snapshot = store.publish(staged, meta, replace)?;
        let stored = snapshots::stored_bytes(&snapshot.dir);
        Ok::<_, StoreError>(snapshots::ready_info(&snapshot, Some(stored)))
    });
    Ok(publishing.await??)
}

impl Brancher {
    /// Waits for `writer` and publishes the snapshot `tag` that it wrote into `staged`. The stages of the
    /// answer are the writer's and that of publishing.
    ///
    /// # Errors
    /// What stands in the way of the tag as the store says it; anything else as [`NodeError::Branch`].
    pub(crate) async fn complete(
        &self,
        tag: &Tag,
        writer: SnapshotWriter,
        staged: StagedSnapshot,
        replace: bool,
        describe: impl FnOnce(&mut StagedSnapshot, &Written) -> Result<SnapshotMeta, StoreError> + Send + 'static,
    ) -> NodeResult<SnapshotInfo> {
        let failed = |reason| NodeError::Branch { tag: tag.clone(), reason };
        let written = match writer.finish(&self.host).await {
            Ok((facts, stages)) => Written { facts, stages },
            Err(reason) => return Err(failed(format!("{reason}, in {}", staged.path().display()))),
        };
        let mut stages = StageTimings::default();
        for stage in &written.stages.0 {
            stages.record(&format!("write.{}", stage.name), std::time::Duration::from_micros(stage.us));
        }
        let since = Instant::now();
        let published = publish(&self.host.store, staged, replace, move |staged| describe(staged, &written)).await;
        let info = published.map_err(|error| match error {
            NodeError::Store(error) if is_conflict(&error) => error.into(),
            other => failed(with_causes(&other)),
        })?;
        stages.record("publish", since.elapsed());
        // Children of the tag come from the new snapshot from now on.
        self.zygotes.discard(tag);
        if !tag.as_str().starts_with(CHECKPOINT_PREFIX) {
            let news = News::of(EventKind::SnapshotReady).snapshot(tag);
            let source = info.branched_from.as_ref().and_then(|source| source.parse().ok());
            self.host.events.tell(match &source {
                Some(source) => news.sandbox(source),
                None => news,
            });
        }
        Ok(SnapshotInfo { stages: Some(stages), ..info })
    }
}

/// Whether another snapshot stands in the way, rather than the making having failed.
fn is_conflict(error: &StoreError) -> bool {
    matches!(error, StoreError::AlreadyExists { .. } | StoreError::HasChildren { .. })
}
