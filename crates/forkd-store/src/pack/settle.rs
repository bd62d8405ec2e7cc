//! What of a pack is new to the store, and what stands in its way.

use forkd_types::{Digest, Tag};

use super::error::PackError;
use crate::StoreError;
use crate::store::Store;

/// What becomes of a snapshot of a pack.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Fate {
    /// It is new.
    Published,
    /// It was there already.
    Reused,
    /// It takes the place of another one of its tag.
    Replaced,
}

impl Store {
    /// What becomes of `snapshots`, a chain with the base first.
    ///
    /// # Errors
    /// [`PackError::Differs`] when another snapshot has one of the tags and `replace` is off;
    /// [`PackError::InUse`] when one that would be replaced has children that would not.
    pub(super) fn settle(&self, snapshots: &[(Tag, Digest)], replace: bool) -> Result<Vec<Fate>, PackError> {
        let mut fates = Vec::with_capacity(snapshots.len());
        for (index, (tag, packed)) in snapshots.iter().enumerate() {
            let there = match self.get(tag) {
                Err(StoreError::NotFound { .. }) => None,
                Ok(snapshot) => Some(snapshot.digest.to_string()),
                Err(StoreError::Damaged { .. }) => Some("unknown, as it is damaged".to_owned()),
                Err(error) => return Err(error.into()),
            };
            fates.push(match there {
                None => Fate::Published,
                Some(there) if there == packed.to_string() => Fate::Reused,
                Some(_) if replace => Fate::Replaced,
                Some(there) => {
                    let head = index + 1 == snapshots.len();
                    return Err(PackError::Differs { tag: tag.clone(), there, packed: *packed, head });
                }
            });
        }
        for (tag, _) in snapshots.iter().zip(&fates).filter(|(_, fate)| **fate == Fate::Replaced).map(|(of, _)| of) {
            let mut children = self.children(tag)?;
            // A child that goes in the same step is not orphaned.
            let goes = |child: &Tag| {
                let fate = snapshots.iter().zip(&fates).find(|((tag, _), _)| tag == child).map(|(_, fate)| *fate);
                fate == Some(Fate::Replaced)
            };
            children.retain(|child| !goes(child));
            if !children.is_empty() {
                return Err(PackError::InUse { tag: tag.clone(), children });
            }
        }
        Ok(fates)
    }
}
