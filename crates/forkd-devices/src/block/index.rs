//! Which source holds each 4 KiB block of a disk.
//!
//! A flat table, so that a lookup costs the same at any depth of layers, in chunks that exist only
//! where something differs from the base. Clones share chunks and copy one when they change it; the
//! same holds, page by page, for the copy that fork(2) makes.

use std::sync::Arc;

use forkd_types::PageRun;

/// Blocks per chunk: a chunk is one page and covers 4 MiB of disk.
const CHUNK_BLOCKS: u64 = 1024;

type Chunk = [Source; CHUNK_BLOCKS as usize];

/// Where a block's content is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Source(u32);

impl Source {
    /// In the base file.
    pub(super) const BASE: Self = Self(0);
    /// Nowhere: it reads as zeros.
    pub(super) const ZERO: Self = Self(1);

    /// In the `number`-th layer, counted from the oldest; the overlay counts as the last.
    pub(super) fn layer(number: usize) -> Self {
        Self(u32::try_from(number + 2).expect("each layer holds an open file, so there are fewer than 2^31"))
    }

    /// The layer number, unless it is the base or zero.
    pub(super) fn layer_number(self) -> Option<usize> {
        self.0.checked_sub(2).map(|number| number as usize)
    }
}

/// The table of one disk.
#[derive(Clone, Debug)]
pub(super) struct BlockIndex {
    chunks: Arc<Vec<Option<Arc<Chunk>>>>,
    blocks: u64,
}

impl BlockIndex {
    /// A table in which every block is in the base.
    pub(super) fn new(blocks: u64) -> Self {
        let chunks = blocks.div_ceil(CHUNK_BLOCKS) as usize;
        Self { chunks: Arc::new(vec![None; chunks]), blocks }
    }

    /// Where `block` is; the base for blocks past the end.
    pub(super) fn get(&self, block: u64) -> Source {
        match self.chunks.get((block / CHUNK_BLOCKS) as usize) {
            Some(Some(chunk)) => chunk[(block % CHUNK_BLOCKS) as usize],
            _ => Source::BASE,
        }
    }

    /// The source of `first`, and how many of the `limit` blocks from there share it.
    pub(super) fn run_at(&self, first: u64, limit: u64) -> (Source, u64) {
        let source = self.get(first);
        let mut count = 1;
        while count < limit {
            let block = first + count;
            // A chunk that does not exist is all base.
            if block.is_multiple_of(CHUNK_BLOCKS)
                && !matches!(self.chunks.get((block / CHUNK_BLOCKS) as usize), Some(Some(_)))
            {
                if source != Source::BASE {
                    break;
                }
                count += CHUNK_BLOCKS;
            } else if self.get(block) == source {
                count += 1;
            } else {
                break;
            }
        }
        (source, count.min(limit))
    }

    /// Records that `run` is now in `source`. Blocks past the end are ignored.
    pub(super) fn set(&mut self, run: PageRun, source: Source) {
        let end = run.end().min(self.blocks);
        let chunks = Arc::make_mut(&mut self.chunks);
        let mut block = run.first;
        while block < end {
            let chunk_end = (block / CHUNK_BLOCKS + 1) * CHUNK_BLOCKS;
            let stop = chunk_end.min(end);
            let slot = &mut chunks[(block / CHUNK_BLOCKS) as usize];
            let chunk = Arc::make_mut(slot.get_or_insert_with(|| Arc::new([Source::BASE; CHUNK_BLOCKS as usize])));
            let inside = (block % CHUNK_BLOCKS) as usize;
            chunk[inside..inside + (stop - block) as usize].fill(source);
            block = stop;
        }
    }

    /// The blocks whose source is not the one that `other`, a table of as many blocks, has for them. Chunks
    /// that both share are not looked at.
    pub(super) fn differing(&self, other: &Self) -> Vec<PageRun> {
        const ALL_BASE: Chunk = [Source::BASE; CHUNK_BLOCKS as usize];
        debug_assert_eq!(self.blocks, other.blocks, "both are of one disk");
        let mut runs = Vec::new();
        for (number, (own, others)) in self.chunks.iter().zip(other.chunks.iter()).enumerate() {
            let same = match (own, others) {
                (Some(own), Some(others)) => Arc::ptr_eq(own, others),
                (None, None) => true,
                _ => false,
            };
            if same {
                continue;
            }
            let own = own.as_deref().unwrap_or(&ALL_BASE);
            let others = others.as_deref().unwrap_or(&ALL_BASE);
            let first = number as u64 * CHUNK_BLOCKS;
            for (block, (source, other)) in (first..self.blocks).zip(own.iter().zip(others)) {
                if source != other {
                    PageRun::push(&mut runs, block);
                }
            }
        }
        runs
    }

    /// The blocks whose source fulfils `wanted`, which the base must not.
    pub(super) fn runs(&self, wanted: impl Fn(Source) -> bool) -> Vec<PageRun> {
        debug_assert!(!wanted(Source::BASE), "chunks that hold only base blocks do not exist");
        let mut runs = Vec::new();
        for (number, chunk) in self.chunks.iter().enumerate() {
            let Some(chunk) = chunk else { continue };
            let first = number as u64 * CHUNK_BLOCKS;
            for (block, &source) in (first..self.blocks).zip(chunk.iter()) {
                if wanted(source) {
                    PageRun::push(&mut runs, block);
                }
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCKS: u64 = 5000;

    proptest! {
        #[test]
        fn the_table_agrees_with_a_plain_array(changes in prop::collection::vec((0..BLOCKS + 100, 1_u64..3000, 0_u32..5), 0..12)) {
            let mut index = BlockIndex::new(BLOCKS);
            let mut model = vec![Source::BASE; BLOCKS as usize];
            let mut kept = Vec::new();
            for (first, count, source) in changes {
                kept.push((index.clone(), model.clone()));
                index.set(PageRun { first, count }, Source(source));
                for block in first..(first + count).min(BLOCKS) {
                    model[block as usize] = Source(source);
                }
            }
            kept.push((index, model));
            for (index, model) in &kept {
                let mut block = 0;
                while block < BLOCKS {
                    let (source, count) = index.run_at(block, BLOCKS - block);
                    prop_assert!(count >= 1 && block + count <= BLOCKS);
                    prop_assert!(model[block as usize..(block + count) as usize].iter().all(|&own| own == source));
                    prop_assert!(model.get((block + count) as usize).is_none_or(|&next| next != source));
                    block += count;
                }
                let changed: Vec<u64> = index.runs(|source| source != Source::BASE).into_iter().flat_map(|run| run.first..run.end()).collect();
                let expected: Vec<u64> = (0..BLOCKS).filter(|&block| model[block as usize] != Source::BASE).collect();
                prop_assert_eq!(changed, expected);
            }
            for (index, model) in &kept {
                for (other, other_model) in &kept {
                    let differing: Vec<u64> = index.differing(other).into_iter().flat_map(|run| run.first..run.end()).collect();
                    let expected: Vec<u64> = (0..BLOCKS).filter(|&block| model[block as usize] != other_model[block as usize]).collect();
                    prop_assert_eq!(differing, expected);
                }
            }
        }
    }

    #[test]
    fn a_clean_disk_of_a_hundred_gigabytes_costs_a_few_hundred_kilobytes() {
        let index = BlockIndex::new((100 << 30) / forkd_types::PAGE_SIZE);
        assert!(index.chunks.len() * size_of::<Option<Arc<Chunk>>>() <= 256 << 10);
        assert_eq!(index.run_at(0, index.blocks), (Source::BASE, index.blocks));
    }
}
