//! Page arithmetic: counts and runs of 4 KiB pages.

use serde::{Deserialize, Serialize};

/// The size of a base page on x86_64, and the granule of every memory and disk index.
pub const PAGE_SIZE: u64 = 4096;

/// A number of 4 KiB pages.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PageCount(pub u64);

impl PageCount {
    /// The pages that `bytes` fill, a partial last page counted whole.
    pub const fn covering(bytes: u64) -> Self {
        Self(bytes.div_ceil(PAGE_SIZE))
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0 * PAGE_SIZE
    }
}

/// `count` consecutive pages from page number `first`; never empty, never past 2⁵² pages.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct PageRun {
    /// Number of the first page (byte offset divided by [`PAGE_SIZE`]).
    pub first: u64,
    /// Length in pages, at least 1.
    pub count: u64,
}

/// What is wrong with a list of page runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PageRunError {
    /// A run of no pages.
    #[error("page run {index} is empty")]
    Empty {
        /// Position in the list.
        index: usize,
    },
    /// A run that starts before the previous one ended.
    #[error("page run {index} overlaps or precedes the one before it")]
    OutOfOrder {
        /// Position in the list.
        index: usize,
    },
    /// A run that ends after the last page.
    #[error("page run {index} ends at page {end}, past the last page {limit}")]
    PastEnd {
        /// Position in the list.
        index: usize,
        /// Where the run ends.
        end: u64,
        /// How many pages there are.
        limit: u64,
    },
}

impl PageRun {
    /// The page after the last.
    pub const fn end(self) -> u64 {
        self.first + self.count
    }

    /// Byte offset of the first page.
    pub const fn offset(self) -> u64 {
        self.first * PAGE_SIZE
    }

    /// Length in bytes.
    pub const fn bytes(self) -> u64 {
        self.count * PAGE_SIZE
    }

    /// Checks that `runs` are non-empty, ascending, disjoint and end within `limit` pages.
    pub fn check(runs: &[Self], limit: PageCount) -> Result<(), PageRunError> {
        let mut end = 0;
        for (index, run) in runs.iter().enumerate() {
            if run.count == 0 {
                return Err(PageRunError::Empty { index });
            }
            if run.first < end {
                return Err(PageRunError::OutOfOrder { index });
            }
            end = run.first.saturating_add(run.count);
            if end > limit.0 {
                return Err(PageRunError::PastEnd { index, end, limit: limit.0 });
            }
        }
        Ok(())
    }

    /// Appends page `page` to ascending `runs`, extending the last run where it is adjacent.
    pub fn push(runs: &mut Vec<Self>, page: u64) {
        match runs.last_mut() {
            Some(last) if last.end() == page => last.count += 1,
            _ => runs.push(Self { first: page, count: 1 }),
        }
    }

    /// Total pages in `runs`.
    pub fn total(runs: &[Self]) -> PageCount {
        PageCount(runs.iter().map(|run| run.count).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn pushing_pages_one_by_one_gives_sound_runs_of_the_same_pages(pages: BTreeSet<u16>) {
            let mut runs = Vec::new();
            for &page in &pages {
                PageRun::push(&mut runs, page.into());
            }
            prop_assert_eq!(PageRun::check(&runs, PageCount(1 << 16)), Ok(()));
            let back: BTreeSet<u16> =
                runs.iter().flat_map(|run| run.first..run.end()).map(|page| page as u16).collect();
            prop_assert_eq!(&back, &pages);
            prop_assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].first), "adjacent runs were not merged");
        }

        #[test]
        fn check_never_panics_and_accepts_only_what_fits(raw: Vec<(u64, u64)>, limit: u64) {
            let runs: Vec<_> = raw.into_iter().map(|(first, count)| PageRun { first, count }).collect();
            if PageRun::check(&runs, PageCount(limit)).is_ok() {
                prop_assert!(runs.iter().all(|run| run.count > 0 && run.end() <= limit));
            }
        }
    }
}
