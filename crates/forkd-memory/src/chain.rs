//! The layers that a guest's memory was made from, and which of them holds each page.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use forkd_types::{PageCount, PageRun};

use crate::layer::Layer;
use crate::ram::RamError;

/// Layers of one size, base first; none for memory that began as zeros. Clones share them, and forks
/// share their files.
#[derive(Clone, Debug)]
pub(crate) struct LayerChain(Arc<[Layer]>);

/// Pages whose contents are in one layer, the topmost that says anything about them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Held {
    pub(crate) run: PageRun,
    /// Position of the layer, base first.
    pub(crate) layer: usize,
}

impl LayerChain {
    /// The chain of `layers`, which all have to describe `pages` pages.
    ///
    /// # Errors
    /// [`RamError::Layer`] for the first of another size.
    pub(crate) fn new(layers: Arc<[Layer]>, pages: PageCount) -> Result<Self, RamError> {
        for (index, layer) in layers.iter().enumerate() {
            layer.expect_pages(pages).map_err(|source| RamError::Layer { index, source })?;
        }
        Ok(Self(layers))
    }

    /// The chain of memory that was not made from layers: all zeros.
    pub(crate) fn none() -> Self {
        Self(Arc::new([]))
    }

    pub(crate) fn layers(&self) -> &[Layer] {
        &self.0
    }

    /// The descriptors of the layers' files, to keep open across a fork.
    pub(crate) fn raw_fds(&self) -> impl Iterator<Item = RawFd> + '_ {
        self.0.iter().map(|layer| layer.file().as_raw_fd())
    }

    /// Which layer holds what, ascending and disjoint; all other pages are zero.
    ///
    /// It is put together on demand: only writers need it, and a table kept in every process that may
    /// become one would be copied, page by page, by every fork.
    pub(crate) fn held(&self) -> Vec<Held> {
        self.0.iter().enumerate().fold(Vec::new(), |below, (layer, upper)| {
            let mut held = cut(&below, &union([upper.data(), upper.zero()]));
            held.extend(upper.data().iter().map(|&run| Held { run, layer }));
            held.sort_by_key(|piece| piece.run.first);
            held
        })
    }
}

/// What is left of ascending `below` outside the ascending, disjoint runs `hidden`.
fn cut(below: &[Held], hidden: &[PageRun]) -> Vec<Held> {
    let mut left = Vec::with_capacity(below.len());
    let mut hidden = hidden.iter().peekable();
    for &Held { run, layer } in below {
        let mut first = run.first;
        while first < run.end() {
            while hidden.next_if(|hidden| hidden.end() <= first).is_some() {}
            let (covered_from, covered_to) = hidden.peek().map_or((u64::MAX, u64::MAX), |run| (run.first, run.end()));
            let visible_to = covered_from.clamp(first, run.end());
            if first < visible_to {
                left.push(Held { run: PageRun { first, count: visible_to - first }, layer });
            }
            first = if visible_to < run.end() { covered_to } else { visible_to };
        }
    }
    left
}

/// The union of lists of ascending runs.
pub(crate) fn union<'a>(lists: impl IntoIterator<Item = &'a [PageRun]>) -> Vec<PageRun> {
    let mut all: Vec<PageRun> = lists.into_iter().flatten().copied().collect();
    all.sort();
    let mut union: Vec<PageRun> = Vec::with_capacity(all.len());
    for run in all {
        match union.last_mut() {
            Some(last) if last.end() >= run.first => last.count = last.end().max(run.end()) - last.first,
            _ => union.push(run),
        }
    }
    union
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::LayerWriter;
    use forkd_types::PAGE_SIZE;
    use proptest::prelude::*;

    const PAGES: u64 = 60;

    /// What one layer says of each of `pages` pages: stored, zero or nothing.
    pub(crate) fn layer(pages: u64) -> impl Strategy<Value = Vec<Option<bool>>> {
        let run = (prop_oneof![Just(None), Just(Some(true)), Just(Some(false))], 1_usize..8);
        prop::collection::vec(run, 1..60).prop_map(move |runs| {
            let says = runs.into_iter().flat_map(|(says, count)| std::iter::repeat_n(says, count));
            says.chain(std::iter::repeat(None)).take(pages as usize).collect()
        })
    }

    /// A layer that says it.
    pub(crate) fn written(says: &[Option<bool>]) -> Layer {
        let file = tempfile::tempfile().expect("scratch");
        let pages = PageCount(says.len() as u64);
        let mut writer = LayerWriter::new(file.try_clone().expect("dup"), pages).expect("begin");
        for (page, says) in (0..).zip(says) {
            match says {
                Some(true) => writer.store(page, &[1; PAGE_SIZE as usize]).expect("store"),
                Some(false) => writer.mark_zero(PageRun { first: page, count: 1 }),
                None => {}
            }
        }
        writer.finish().expect("finish");
        Layer::open(file).expect("open")
    }

    proptest! {
        #[test]
        fn each_page_is_held_by_the_topmost_layer_that_speaks_of_it(layers in prop::collection::vec(layer(PAGES), 0..6)) {
            let chain = LayerChain::new(layers.iter().map(|says| written(says)).collect(), PageCount(PAGES)).expect("one size");
            let held = chain.held();
            let runs: Vec<_> = held.iter().map(|piece| piece.run).collect();
            prop_assert_eq!(PageRun::check(&runs, PageCount(PAGES)), Ok(()));
            for page in 0..PAGES {
                let topmost = layers.iter().rposition(|says| says[page as usize].is_some());
                let expected = topmost.filter(|&layer| layers[layer][page as usize] == Some(true));
                let found = held.iter().find(|piece| (piece.run.first..piece.run.end()).contains(&page));
                prop_assert_eq!(found.map(|piece| piece.layer), expected, "page {}", page);
            }
        }
    }
}
