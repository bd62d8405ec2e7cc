//! How many branches may be under way at a time.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::{NodeError, NodeResult};

/// The node's places for branches. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct BranchSlots {
    cap: usize,
    free: Arc<Semaphore>,
}

/// One branch's place; free again when this is dropped.
#[derive(Debug)]
pub(crate) struct BranchSlot {
    _permit: OwnedSemaphorePermit,
}

impl BranchSlots {
    /// As many places as `cap`.
    pub(crate) fn new(cap: usize) -> Self {
        Self { cap, free: Arc::new(Semaphore::new(cap)) }
    }

    /// A place, if there is one now. Clients that come too early know better than a queue would when to come again.
    pub(crate) fn take(&self) -> NodeResult<BranchSlot> {
        match Arc::clone(&self.free).try_acquire_owned() {
            Ok(permit) => Ok(BranchSlot { _permit: permit }),
            Err(_) => Err(NodeError::BranchesFull { cap: self.cap }),
        }
    }

    /// The most branches that may be under way.
    pub(crate) fn cap(&self) -> usize {
        self.cap
    }

    /// How many are.
    pub(crate) fn taken(&self) -> usize {
        self.cap - self.free.available_permits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_given_up_to_the_cap_and_come_back() {
        let slots = BranchSlots::new(2);
        let (first, _second) = (slots.take().expect("free"), slots.clone().take().expect("free"));
        let refusal = slots.take().expect_err("full");
        assert!(matches!(refusal, NodeError::BranchesFull { cap: 2 }) && refusal.to_string().contains('2'));
        assert_eq!((slots.taken(), slots.cap()), (2, 2));
        drop(first);
        assert_eq!(slots.taken(), 1);
        slots.take().expect("free again");
    }
}
