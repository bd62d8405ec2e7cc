//! From a snapshot over others to an equal one that depends on none, in one layer.

use forkd_proto::monitor::Contents;
use forkd_store::{StagedSnapshot, StoreError};
use forkd_types::Tag;
use forkd_types::rest::SnapshotInfo;

use crate::branch::Brancher;
use crate::error::{NodeError, NodeResult};
use crate::host::blocking;
use crate::lineage::describe;
use crate::publication::Written;
use crate::snapshot_writer::SnapshotWriter;
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
        let writer = SnapshotWriter::fork(&self.host, &zygote.control, 0, &staged, Contents::Whole).await;
        let writer = writer.map_err(|error| NodeError::Branch { tag: to.clone(), reason: error.to_string() })?;
        let describe = move |staged: &mut StagedSnapshot, written: &Written| {
            let mut meta = describe(staged.tag(), &written.facts, &source.meta, staged.vmstate_bytes()?);
            meta.branched_from = Some(format!("compact:{}", source.meta.tag));
            Ok(meta)
        };
        let info = self.complete(to, writer, staged, false, describe).await?;
        drop(claim);
        self.claims.forget_failure(to);
        Ok(SnapshotInfo { stages: None, ..info })
    }
}
