//! What can go wrong in the store.

use std::io;
use std::path::{Path, PathBuf};

use forkd_types::{Digest, Tag};

/// A result of the store.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// Why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file system call failed; the cause is the source.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was attempted, as a verb phrase.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another process has the store open.
    #[error(
        "the store {} is in use by {}; stop that process or use another directory",
        root.display(),
        holder.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
    )]
    Locked {
        /// The store's directory.
        root: PathBuf,
        /// Process id of the holder, when it could be read.
        holder: Option<u32>,
    },
    /// There is no snapshot of this tag.
    #[error("there is no snapshot {tag}")]
    NotFound {
        /// The tag asked for.
        tag: Tag,
    },
    /// A snapshot of this tag exists and replacing it was not asked for.
    #[error("a snapshot {tag} exists already; remove it, replace it or choose another tag")]
    AlreadyExists {
        /// The tag.
        tag: Tag,
    },
    /// Other snapshots are stored as differences from this one.
    #[error("snapshot {tag} is the parent of {}; remove those first", names(children))]
    HasChildren {
        /// The snapshot that was to go.
        tag: Tag,
        /// The snapshots that need it.
        children: Vec<Tag>,
    },
    /// The parent that a snapshot names is not there, or is another one of the same tag.
    #[error("snapshot {tag} needs its parent {parent} with digest {expected}, but {}", found(actual))]
    ParentMissing {
        /// The child.
        tag: Tag,
        /// The tag of its parent.
        parent: Tag,
        /// The digest the child recorded.
        expected: Digest,
        /// The digest of the snapshot that has the parent's tag now.
        actual: Option<Digest>,
    },
    /// A snapshot derives from too many others.
    #[error(
        "snapshot {tag} would lie over more than {limit} others; make a snapshot with all of its contents instead, \
         which lies over none"
    )]
    TooDeep {
        /// The snapshot at the end of the chain.
        tag: Tag,
        /// The most ancestors that a snapshot has.
        limit: usize,
    },
    /// A snapshot's directory is there but cannot be used.
    #[error("snapshot {tag} in {} is unusable: {reason}", dir.display())]
    Damaged {
        /// Its tag.
        tag: Tag,
        /// Its directory.
        dir: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A description does not agree with the files that were staged, or with itself.
    #[error("cannot publish snapshot {tag}: {reason}")]
    Inconsistent {
        /// Its tag.
        tag: Tag,
        /// What disagrees, with both values.
        reason: String,
    },
    /// The bytes written are not the bytes that were announced.
    #[error("the bytes written have digest {actual}, but {expected} was expected")]
    DigestMismatch {
        /// What was announced.
        expected: Digest,
        /// What came.
        actual: Digest,
    },
    /// There is no blob of this digest.
    #[error("there is no blob {digest}")]
    BlobNotFound {
        /// The digest asked for.
        digest: Digest,
    },
    /// Snapshots need this blob.
    #[error("blob {digest} is used by {}; remove those snapshots first", names(users))]
    BlobInUse {
        /// The blob.
        digest: Digest,
        /// The snapshots that name it.
        users: Vec<Tag>,
    },
    /// Garbage cannot be told from what is needed while a snapshot is unreadable.
    #[error(
        "cannot tell which blobs are unused while these snapshots are unreadable: {}; remove or repair them first",
        names(tags)
    )]
    UnknownReferences {
        /// The unreadable snapshots.
        tags: Vec<Tag>,
    },
}

fn names(tags: &[Tag]) -> String {
    tags.iter().map(Tag::as_str).collect::<Vec<_>>().join(", ")
}

fn found(actual: &Option<Digest>) -> String {
    match actual {
        Some(digest) => format!("the snapshot of that tag now has digest {digest}"),
        None => "there is no snapshot of that tag".to_owned(),
    }
}

impl StoreError {
    /// A stable machine-readable code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Io { source, .. }
                if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) =>
            {
                "no_space"
            }
            Self::Io { .. } => "store_io",
            Self::Locked { .. } => "store_locked",
            Self::NotFound { .. } => "snapshot_not_found",
            Self::AlreadyExists { .. } => "snapshot_exists",
            Self::HasChildren { .. } => "snapshot_has_children",
            Self::ParentMissing { .. } => "snapshot_parent_missing",
            Self::TooDeep { .. } => "snapshot_too_deep",
            Self::Damaged { .. } => "snapshot_damaged",
            Self::Inconsistent { .. } => "snapshot_inconsistent",
            Self::DigestMismatch { .. } => "digest_mismatch",
            Self::BlobNotFound { .. } => "blob_not_found",
            Self::BlobInUse { .. } => "blob_in_use",
            Self::UnknownReferences { .. } => "references_unknown",
        }
    }

    /// For `map_err`: the failure of `action` on `path`.
    pub(crate) fn io<E: Into<io::Error>>(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(E) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { action, path, source: source.into() }
    }
}
