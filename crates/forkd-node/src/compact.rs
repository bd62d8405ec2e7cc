//! From a snapshot over others to an equal one that depends on none, in one layer.

use forkd_proto::monitor::Contents;
use forkd_store::StoreError;
use forkd_types::Tag;
use forkd_types::rest::SnapshotInfo;

use crate::branch::{Brancher, describe};
use crate::error::{NodeError, NodeResult, with_causes};
use crate::host::blocking;
use crate::snapshot_writer::SnapshotWriter;
use crate::snapshots;
use crate::zygotes::ZygoteKey;

impl Brancher {
    /// Writes the snapshot `from` anew as `to`.
    pub(crate) async fn compact(&self, from: &Tag, to: &Tag) -> NodeResult<SnapshotInfo> {
        if from == to {
            let rule = "give the new snapshot another tag than the old";
            return Err(NodeError::BadField { field: "to", value: to.to_string(), rule });
        }
        let claim = self.claims.claim(to)?;
        let (store, source, target) = (self.host.store.clone(), from.clone(), to.clone());
        let found = blocking("staging a snapshot", move || {
            let source = store.get(&source)?;
            if store.get(&target).is_ok() {
                return Err(StoreError::AlreadyExists { tag: target });
            }
            Ok((source, store.stage(&target)?))
        });
        let (source, staged) = found.await??;
        let zygote = self.zygotes.lease(&ZygoteKey { tag: from.clone(), huge_pages: false }).await?;
        let failed = |reason: String| NodeError::Branch { tag: to.clone(), reason };
        let writer = SnapshotWriter::fork(&self.host, &zygote.control, 0, &staged, Contents::Whole).await;
        let writer = writer.map_err(|error| failed(error.to_string()))?;
        let (facts, _) = writer.finish(&self.host).await.map_err(failed)?;
        let (store, tag) = (self.host.store.clone(), to.clone());
        let publishing = blocking("publishing a snapshot", move || {
            let mut meta = describe(&tag, &facts, &source.meta, staged.vmstate_bytes()?);
            meta.branched_from = Some(format!("compact:{}", source.meta.tag));
            let snapshot = store.publish(staged, meta, false)?;
            let stored = snapshots::stored_bytes(&snapshot.dir);
            Ok::<_, StoreError>(snapshots::ready_info(&snapshot, Some(stored)))
        });
        let published = publishing.await?;
        drop(claim);
        published.map_err(|error| match error {
            exists @ StoreError::AlreadyExists { .. } => exists.into(),
            other => failed(with_causes(&other)),
        })
    }
}
