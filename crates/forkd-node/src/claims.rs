//! The life of a snapshot, and the part of it that is not in the store: being made, and having failed.
//!
//! ```text
//!             claimed            published                removed
//! (nothing) ──────────► making ────────────► ready ──────────────────────► (nothing)
//!   ▲  ▲                │    │                │ ▲
//!   │  └─ failed, or ───┘    │ failed after   │ │ published in its place, or failed and as before
//!   │     given up           │ its request    ▼ │
//!   │                        ▼ was answered   ready, another making of the same tag
//!   └───── removed ─────── failed ──────────► making
//!                                   claimed
//! ```
//!
//! *Ready* is a directory in the store, which appears and is replaced in one step. *Making* is a [`Claim`]: there is
//! one of a tag at a time, it ends by being dropped, and only [`Claim::fail`], which consumes it, leads to *failed*.
//! Neither outlives the process; of a snapshot that was being made when it died nothing is left.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use forkd_types::Tag;
use forkd_types::rest::SnapshotInfo;

use crate::error::{NodeError, NodeResult};

/// The snapshots that are being made or failed. Clones share them.
#[derive(Clone, Default, Debug)]
pub(crate) struct Claims(Arc<Mutex<Known>>);

#[derive(Default, Debug)]
struct Known {
    making: HashSet<Tag>,
    /// Those that failed after their request had been answered; shown until the tag is used again.
    failed: BTreeMap<Tag, SnapshotInfo>,
}

/// A snapshot that is being made; its tag is free again when this is dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    claims: Claims,
    tag: Tag,
}

impl Claims {
    /// Claims `tag`.
    ///
    /// # Errors
    /// [`NodeError::SnapshotInProgress`].
    pub(crate) fn claim(&self, tag: &Tag) -> NodeResult<Claim> {
        if !self.lock().making.insert(tag.clone()) {
            return Err(NodeError::SnapshotInProgress { tag: tag.clone() });
        }
        Ok(Claim { claims: self.clone(), tag: tag.clone() })
    }

    /// Whether `tag` is claimed.
    pub(crate) fn has(&self, tag: &Tag) -> bool {
        self.lock().making.contains(tag)
    }

    /// All that failed, in the order of their tags.
    pub(crate) fn all_failed(&self) -> Vec<SnapshotInfo> {
        self.lock().failed.values().cloned().collect()
    }

    /// Why `tag` failed.
    pub(crate) fn failure(&self, tag: &Tag) -> Option<String> {
        self.lock().failed.get(tag).and_then(|info| info.warning.clone())
    }

    /// Forgets that `tag` failed; false when it had not.
    pub(crate) fn forget_failure(&self, tag: &Tag) -> bool {
        self.lock().failed.remove(tag).is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claim {
    /// Leaves it to be seen that it failed, as `info` says.
    pub(crate) fn fail(self, info: SnapshotInfo) {
        self.claims.lock().failed.insert(self.tag.clone(), info);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.claims.lock().making.remove(&self.tag);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshots::unusable;

    #[test]
    fn a_tag_has_one_claim_at_a_time() {
        let (claims, tag) = (Claims::default(), "py".parse::<Tag>().expect("legal tag"));
        let claim = claims.claim(&tag).expect("free");
        assert!(matches!(claims.claim(&tag), Err(NodeError::SnapshotInProgress { .. })));
        assert!(claims.has(&tag));
        drop(claim);
        assert!(claims.claim(&tag).is_ok());
    }

    #[test]
    fn a_failure_is_seen_until_it_is_forgotten_and_does_not_keep_the_tag() {
        let (claims, tag) = (Claims::default(), "py".parse::<Tag>().expect("legal tag"));
        let info = unusable(&tag, "/s/py".as_ref(), Some("the disk is full".to_owned()));
        claims.claim(&tag).expect("free").fail(info.clone());
        assert_eq!((claims.failure(&tag).as_deref(), claims.all_failed()), (Some("the disk is full"), vec![info]));
        assert!(claims.claim(&tag).is_ok());
        assert!(claims.forget_failure(&tag) && !claims.forget_failure(&tag));
        assert!(claims.all_failed().is_empty());
    }
}
