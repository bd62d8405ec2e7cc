//! Packs of this host's snapshots, and packs from elsewhere.

use std::io::Read;

use forkd_store::pack::{Fate, Pack, PackError, PackOptions, UnpackOptions, Unpacked};
use forkd_types::Tag;
use forkd_types::rest::{EventKind, UnpackFate, UnpackReport, UnpackedSnapshot};

use crate::branch::Brancher;
use crate::error::{NodeError, NodeResult};
use crate::events::News;
use crate::host::blocking;

impl From<PackError> for NodeError {
    fn from(error: PackError) -> Self {
        match error {
            PackError::Store(error) => Self::Store(error),
            other => Self::Pack(other),
        }
    }
}

impl Brancher {
    /// Opens and hashes what a pack of `tag` holds.
    pub(crate) async fn pack(&self, tag: &Tag, options: PackOptions) -> NodeResult<Pack> {
        let (store, tag) = (self.host.store.clone(), tag.clone());
        Ok(blocking("reading a snapshot", move || store.pack(&tag, &options, |_| ())).await??)
    }

    /// Takes in the pack that `source` gives.
    pub(crate) async fn unpack(
        &self,
        source: impl Read + Send + 'static,
        options: UnpackOptions,
    ) -> NodeResult<UnpackReport> {
        // A name that is being made is taken; that of an ancestor is seen when the pack is published.
        if let Some(tag) = options.rename.as_ref().filter(|tag| self.claims.has(tag)) {
            return Err(NodeError::SnapshotInProgress { tag: tag.clone() });
        }
        let store = self.host.store.clone();
        let layer_digest = |path: &std::path::Path| forkd_memory::layer::verify(path, |_| ());
        let unpacking = blocking("unpacking", move || store.unpack(source, &options, layer_digest, |_| ()));
        let unpacked = unpacking.await??;
        for snapshot in unpacked.snapshots.iter().filter(|snapshot| snapshot.fate != Fate::Reused) {
            // Children of the tag come from the new snapshot from now on, and no failure of an earlier one is told.
            self.zygotes.discard(&snapshot.tag);
            self.claims.forget_failure(&snapshot.tag);
            self.host.events.tell(News::of(EventKind::SnapshotReady).snapshot(&snapshot.tag));
        }
        Ok(report(unpacked))
    }
}

fn report(unpacked: Unpacked) -> UnpackReport {
    let fate = |fate| match fate {
        Fate::Published => UnpackFate::Published,
        Fate::Reused => UnpackFate::Reused,
        Fate::Replaced => UnpackFate::Replaced,
    };
    let Unpacked { tag, snapshots, new_blobs, reused_blobs, written_bytes, verified } = unpacked;
    let snapshots = snapshots.into_iter().map(|one| UnpackedSnapshot { tag: one.tag, fate: fate(one.fate) }).collect();
    UnpackReport { tag, snapshots, new_blobs, reused_blobs, written_bytes, verified }
}
