//! What a snapshot of a machine lies over: the snapshots that the machine changes, and their layers.

use std::path::PathBuf;

use forkd_proto::monitor::{Contents, SnapshotFacts};
use forkd_store::{DiskLayer, MemoryLayer, Snapshot, SnapshotMeta, StagedSnapshot, Store, StoreError};
use forkd_types::{Digest, Tag};

use crate::database::Base;
use crate::host::unix_now;

/// A snapshot that depends on no other is written whole when it would have more memory layers than this.
const LAYERS_LIMIT: usize = 48;

/// And also when it would have more layers of memory and disks together. Each is a descriptor of a zygote and of its
/// children, which close all others and so are slower to come up the more there are.
const DESCRIPTORS_LIMIT: usize = 192;

/// How many layers of memory a chain has in all.
fn layer_count(chain: &[Snapshot]) -> usize {
    chain.iter().map(|snapshot| snapshot.meta.memory_layers.len()).sum()
}

/// The description of a snapshot with the disks and the past of `origin`, as yet without layers below its own.
pub(crate) fn describe(tag: &Tag, facts: &SnapshotFacts, origin: &SnapshotMeta, vmstate_bytes: u64) -> SnapshotMeta {
    let bases: Vec<_> = origin.disks.iter().map(|disk| (disk.base, disk.logical_bytes)).collect();
    let mut meta = SnapshotMeta::new(tag.clone(), unix_now(), facts, vmstate_bytes, &bases, origin.boot.clone());
    meta.set_volumes(origin.volumes().map(|(_, volume)| volume.clone()));
    meta.warm.clone_from(&origin.warm);
    meta.memory_backing = origin.memory_backing;
    meta
}

/// How much is written of a machine that changes `chain`, for a snapshot that is to depend on no other.
pub(crate) fn contents_over(chain: &[Snapshot]) -> Contents {
    let of_disks = |snapshot: &Snapshot| snapshot.meta.disks.iter().map(|disk| disk.layers.len()).sum::<usize>();
    let memory = layer_count(chain);
    let all = memory + chain.iter().map(of_disks).sum::<usize>();
    if memory < LAYERS_LIMIT && all < DESCRIPTORS_LIMIT { Contents::Changes } else { Contents::Whole }
}

/// The snapshot `base` and all that it derives from, the base first. Nothing when it is gone, or when another
/// has its tag by now.
pub(crate) fn chain_of(store: &Store, base: &Base) -> Result<Option<Vec<Snapshot>>, StoreError> {
    match store.chain(&base.tag) {
        Ok(chain) if chain.last().is_some_and(|newest| newest.digest == base.digest) => Ok(Some(chain)),
        Ok(_) | Err(StoreError::NotFound { .. } | StoreError::ParentMissing { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the layers of `chain` begin with all those of `over`, so that what is left of them lies over it.
pub(crate) fn lies_over(chain: &[Snapshot], over: &[Snapshot]) -> bool {
    fn digests(chain: &[Snapshot]) -> impl Iterator<Item = Digest> + '_ {
        chain.iter().flat_map(|snapshot| &snapshot.meta.memory_layers).map(|layer| layer.digest)
    }
    let mut below = digests(chain);
    digests(over).all(|layer| below.next() == Some(layer))
}

/// Makes every layer of `chain` that is not one of `over`, with which it begins, a file of the staged snapshot too,
/// below its own.
pub(crate) fn adopt_layers(
    staged: &mut StagedSnapshot,
    meta: &mut SnapshotMeta,
    chain: &[Snapshot],
    over: &[Snapshot],
) -> Result<(), StoreError> {
    let mut below = Vec::new();
    let layers = chain.iter().flat_map(|s| s.meta.memory_layers.iter().map(move |layer| (s, layer)));
    for (snapshot, layer) in layers.skip(layer_count(over)) {
        let file = format!("memory-{}.layer", below.len());
        staged.link(&snapshot.dir.join(&layer.file), &file)?;
        below.push(MemoryLayer { file, ..layer.clone() });
    }
    meta.memory_layers.splice(..0, below);
    for (index, disk) in meta.disks.iter_mut().enumerate() {
        let layers_of = |snapshot: &'_ Snapshot| -> Vec<(PathBuf, DiskLayer)> {
            let layers = snapshot.meta.disks.get(index).map(|disk| disk.layers.clone()).unwrap_or_default();
            layers.into_iter().map(|layer| (snapshot.dir.join(&layer.file), layer)).collect()
        };
        let skipped: usize = over.iter().map(|snapshot| layers_of(snapshot).len()).sum();
        let mut below = Vec::new();
        for (path, layer) in chain.iter().flat_map(layers_of).skip(skipped) {
            let file = format!("disk-{index}-{}.layer", below.len());
            staged.link(&path, &file)?;
            below.push(DiskLayer { file, ..layer });
        }
        disk.layers.splice(..0, below);
    }
    Ok(())
}
