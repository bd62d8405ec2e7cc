//! Snapshots as clients see them.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use forkd_store::{Checked, Listed, Outcome, Snapshot, Store, StoreError, VMSTATE};
use forkd_types::Tag;
use forkd_types::rest::{SnapshotDetail, SnapshotInfo, SnapshotStatus, VerifyProgress};

use crate::error::{NodeResult, with_causes};
use crate::volumes;

/// What a removal does about snapshots that derive from the removed one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Removal {
    /// Refuse while there are any.
    Guarded,
    /// Remove them first, leaves before their parents.
    Cascade,
    /// Leave them; they cannot be used any more.
    Forced,
}

/// The line for a file that was checked, if it is bad.
pub(crate) fn bad(checked: &Checked) -> Option<VerifyProgress> {
    let reason = match &checked.outcome {
        Outcome::Good => return None,
        Outcome::Differs { expected, actual } => format!("its digest is {actual}, {expected} was written"),
        Outcome::Unreadable { reason } => reason.clone(),
    };
    Some(VerifyProgress::Bad { what: checked.what.clone(), path: checked.path.display().to_string(), reason })
}

/// One entry of the list.
pub(crate) fn info(store: &Store, listed: &Listed) -> SnapshotInfo {
    match listed {
        Listed::Ready { snapshot, stored_bytes } => {
            let info = ready_info(snapshot, Some(*stored_bytes));
            // A layer is only as good as what it lies on.
            match snapshot.meta.parent.as_ref().map(|_| store.chain(&snapshot.meta.tag)) {
                Some(Err(error)) => {
                    let warning = Some(with_causes(&error));
                    SnapshotInfo { status: SnapshotStatus::Failed, bootable: false, warning, ..info }
                }
                _ => info,
            }
        }
        Listed::Writing { tag } => {
            SnapshotInfo { status: SnapshotStatus::Writing, ..unusable(tag, &directory(store, tag), None) }
        }
        Listed::Failed { tag, dir, reason, stored_bytes } => {
            SnapshotInfo { stored_bytes: Some(*stored_bytes), ..unusable(tag, dir, Some(reason.clone())) }
        }
    }
}

/// A whole snapshot as clients see it.
pub(crate) fn ready_info(snapshot: &Snapshot, stored_bytes: Option<u64>) -> SnapshotInfo {
    let meta = &snapshot.meta;
    SnapshotInfo {
        tag: meta.tag.clone(),
        dir: snapshot.dir.display().to_string(),
        created_at_unix: meta.created_at_unix,
        branched_from: meta.branched_from.clone(),
        pause_ms: meta.pause_us.map(|us| us / 1000),
        diff_ms: meta.diff.map(|diff| diff.us / 1000),
        diff_physical_bytes: meta.diff.map(|diff| diff.bytes),
        diff_logical_bytes: meta.diff.map(|_| meta.memory_bytes),
        stages: None,
        parent_tag: meta.parent.as_ref().map(|parent| parent.tag.clone()),
        warning: None,
        status: SnapshotStatus::Ready,
        bootable: true,
        memory_bytes: Some(meta.memory_bytes),
        stored_bytes,
        volumes: volumes::infos(snapshot),
    }
}

/// Where the snapshot `tag` is, or will be.
pub(crate) fn directory(store: &Store, tag: &Tag) -> PathBuf {
    store.root().join("snapshots").join(tag)
}

/// What the files of a directory occupy on disk.
pub(crate) fn stored_bytes(dir: &Path) -> u64 {
    let entries = dir.read_dir().into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.blocks() * 512).sum()
}

/// Whether an entry is a checkpoint of a sandbox, and no snapshot that a user made.
pub(crate) fn is_checkpoint(listed: &Listed) -> bool {
    match listed {
        Listed::Ready { snapshot, .. } => snapshot.meta.checkpoint_of.is_some(),
        Listed::Writing { tag } | Listed::Failed { tag, .. } => tag.as_str().starts_with(CHECKPOINT_PREFIX),
    }
}

/// How the tags of checkpoints on disk begin.
pub(crate) const CHECKPOINT_PREFIX: &str = "checkpoint-";

/// What a snapshot's files occupy on disk that are no other snapshot's too.
pub(crate) fn own_bytes(snapshot: &Snapshot) -> u64 {
    let entries = snapshot.dir.read_dir().into_iter().flatten().flatten();
    let files = entries.filter_map(|entry| entry.metadata().ok()).filter(|metadata| metadata.nlink() == 1);
    files.map(|metadata| metadata.blocks() * 512).sum()
}

/// A snapshot that cannot be used, as clients see it.
pub(crate) fn unusable(tag: &Tag, dir: &Path, warning: Option<String>) -> SnapshotInfo {
    let modified = dir.metadata().and_then(|metadata| metadata.modified()).ok();
    SnapshotInfo {
        tag: tag.clone(),
        dir: dir.display().to_string(),
        created_at_unix: modified.and_then(|at| at.duration_since(UNIX_EPOCH).ok()).map_or(0, |age| age.as_secs()),
        branched_from: None,
        pause_ms: None,
        diff_ms: None,
        diff_physical_bytes: None,
        diff_logical_bytes: None,
        stages: None,
        parent_tag: None,
        warning,
        status: SnapshotStatus::Failed,
        bootable: false,
        memory_bytes: None,
        stored_bytes: None,
        volumes: Vec::new(),
    }
}

/// Everything about the snapshot `tag`.
pub(crate) fn detail(store: &Store, tag: &Tag) -> NodeResult<SnapshotDetail> {
    let chain = store.chain(tag)?;
    let (snapshot, ancestors) = chain.split_last().expect("a chain ends in its snapshot");
    let dependents = store
        .list()?
        .into_iter()
        .filter_map(|listed| match listed {
            Listed::Ready { snapshot, .. } => Some(snapshot.meta),
            Listed::Writing { .. } | Listed::Failed { .. } => None,
        })
        .filter(|meta| meta.parent.as_ref().is_some_and(|parent| parent.tag == *tag))
        .map(|meta| meta.tag)
        .collect();
    let meta = &snapshot.meta;
    let on_disk = |path: &Path| path.metadata().map_or(0, |metadata| metadata.blocks() * 512);
    Ok(SnapshotDetail {
        tag: meta.tag.clone(),
        dir: snapshot.dir.display().to_string(),
        created_at_unix: meta.created_at_unix,
        memory_logical_bytes: meta.memory_bytes,
        memory_physical_bytes: snapshot.memory_layers().map(|path| on_disk(&path)).sum(),
        vmstate_bytes: snapshot.dir.join(VMSTATE).metadata().map_or(0, |metadata| metadata.len()),
        parent_tag: meta.parent.as_ref().map(|parent| parent.tag.clone()),
        parent_content_hash: meta.parent.as_ref().map(|parent| parent.digest.to_string()),
        chain_depth: ancestors.len(),
        dependents,
        ancestors: ancestors.iter().map(|ancestor| ancestor.meta.tag.clone()).collect(),
        vcpus: meta.vcpus,
        kernel_release: meta.boot.kernel_release.clone(),
        agent_version: meta.boot.agent_version.clone(),
        warm: meta.warm.clone(),
    })
}

/// Removes `tag` and what `removal` says of its descendants, telling `gone` of each that is.
pub(crate) fn remove(store: &Store, tag: Tag, removal: Removal, mut gone: impl FnMut(Tag)) -> Result<(), StoreError> {
    let first = match removal {
        Removal::Guarded | Removal::Forced => Vec::new(),
        Removal::Cascade => store.descendants(&tag)?,
    };
    for tag in first.into_iter().chain([tag]) {
        match removal {
            Removal::Forced => store.remove_forced(&tag).map(drop)?,
            Removal::Guarded | Removal::Cascade => store.remove(&tag)?,
        }
        gone(tag);
    }
    Ok(())
}
