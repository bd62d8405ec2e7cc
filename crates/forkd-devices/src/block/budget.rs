//! Room on the host that the disks of one machine share.

use std::sync::atomic::{AtomicU64, Ordering};

use forkd_types::{ByteSize, PAGE_SIZE};

/// How many blocks a machine may hold beyond those that its disks began with.
///
/// A block counts from its first write until it is discarded, also when a copy was made of the machine in between: its
/// content is kept for the copy then, and what is written over it takes room of its own.
#[derive(Debug)]
pub struct Budget {
    blocks: u64,
    taken: AtomicU64,
}

impl Budget {
    /// Room for `size`, rounded down to whole blocks.
    pub fn of(size: ByteSize) -> Self {
        Self { blocks: size.bytes() / PAGE_SIZE, taken: AtomicU64::new(0) }
    }

    /// How much there is room for in all.
    pub fn size(&self) -> ByteSize {
        ByteSize(self.blocks * PAGE_SIZE)
    }

    /// Takes room for all of `blocks`, or for none when there is not enough.
    pub(super) fn take(&self, blocks: u64) -> bool {
        let more = |taken: u64| taken.checked_add(blocks).filter(|all| *all <= self.blocks);
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    /// Gives the room of `blocks` back; of those that were written before there was a budget, there is none.
    pub(super) fn give_back(&self, blocks: u64) {
        let less = |taken: u64| Some(taken.saturating_sub(blocks));
        let _ = self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::block::{BlockDisk, DiskError};

    const BLOCKS: u64 = 16;

    fn scratch() -> std::fs::File {
        tempfile::tempfile().expect("tempfile")
    }

    fn disk(budget: &Arc<Budget>) -> BlockDisk {
        let mut disk = BlockDisk::new(scratch(), BLOCKS * PAGE_SIZE, Vec::new(), scratch()).expect("a legal size");
        disk.limit_to(Arc::clone(budget));
        disk
    }

    #[test]
    fn disks_share_the_room_and_a_refused_write_changes_nothing() {
        let budget = Arc::new(Budget::of(ByteSize(3 * PAGE_SIZE + 1)));
        let (mut one, mut other) = (disk(&budget), disk(&budget));
        one.write_at(0, &[1; 2 * PAGE_SIZE as usize]).expect("two of three");
        let error = other.write_at(100, &[2; PAGE_SIZE as usize]).expect_err("it touches two blocks");
        assert!(matches!(error, DiskError::OverBudget { .. }) && error.is_out_of_space(), "{error}");
        assert!(error.to_string().contains("12 KiB"), "{error}");
        other.write_at(0, &[2; 10]).expect("the third");
        one.write_at(PAGE_SIZE, &[3; PAGE_SIZE as usize]).expect("a block that it holds");
        let mut bytes = [7; 4];
        other.read_at(PAGE_SIZE, &mut bytes).expect("on the disk");
        assert_eq!(bytes, [0; 4]);
        one.discard(0, PAGE_SIZE).expect("on the disk");
        other.write_at(PAGE_SIZE, &[4; 1]).expect("room again");
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write(u64, u64),
        Discard(u64, u64),
        Seal,
    }

    fn step() -> impl Strategy<Value = Step> {
        let range = (0..BLOCKS).prop_flat_map(|first| (Just(first), 1..=BLOCKS - first));
        prop_oneof![
            4 => range.clone().prop_map(|(first, count)| Step::Write(first, count)),
            2 => range.prop_map(|(first, count)| Step::Discard(first, count)),
            1 => Just(Step::Seal),
        ]
    }

    proptest! {
        #[test]
        fn room_is_what_was_written_less_what_was_discarded_before_a_copy(
            steps in prop::collection::vec(step(), 0..60), limit in 1..2 * BLOCKS,
        ) {
            let budget = Arc::new(Budget::of(ByteSize(limit * PAGE_SIZE)));
            let mut disk = disk(&budget);
            let (mut held, mut sealed) = (BTreeSet::new(), 0);
            for step in steps {
                match step {
                    Step::Write(first, count) => {
                        let mut after = held.clone();
                        after.extend(first..first + count);
                        let written = disk.write_at(first * PAGE_SIZE, &vec![1; (count * PAGE_SIZE) as usize]);
                        prop_assert_eq!(written.is_ok(), sealed + after.len() as u64 <= limit);
                        if written.is_ok() {
                            held = after;
                        }
                    }
                    Step::Discard(first, count) => {
                        disk.discard(first * PAGE_SIZE, count * PAGE_SIZE).expect("on the disk");
                        held.retain(|block| !(first..first + count).contains(block));
                    }
                    Step::Seal => {
                        disk.seal(scratch());
                        sealed += held.len() as u64;
                        held.clear();
                    }
                }
                prop_assert_eq!(budget.taken.load(Ordering::Relaxed), sealed + held.len() as u64);
            }
        }
    }
}
