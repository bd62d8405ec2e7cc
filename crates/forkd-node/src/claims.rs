//! Tags for which a snapshot is being made, so that no two are made for one tag at a time.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use forkd_types::Tag;

use crate::error::{NodeError, NodeResult};

/// The claimed tags. Clones share them.
#[derive(Clone, Default, Debug)]
pub(crate) struct Claims(Arc<Mutex<HashSet<Tag>>>);

/// A claimed tag; free again when this is dropped.
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
        if !self.lock().insert(tag.clone()) {
            return Err(NodeError::SnapshotInProgress { tag: tag.clone() });
        }
        Ok(Claim { claims: self.clone(), tag: tag.clone() })
    }

    /// Whether `tag` is claimed.
    pub(crate) fn has(&self, tag: &Tag) -> bool {
        self.lock().contains(tag)
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<Tag>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.claims.lock().remove(&self.tag);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_has_one_claim_at_a_time() {
        let (claims, tag) = (Claims::default(), "py".parse::<Tag>().expect("legal tag"));
        let claim = claims.claim(&tag).expect("free");
        assert!(matches!(claims.claim(&tag), Err(NodeError::SnapshotInProgress { .. })));
        assert!(claims.has(&tag));
        drop(claim);
        assert!(claims.claim(&tag).is_ok());
    }
}
