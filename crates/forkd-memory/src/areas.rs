//! From which file each part of a guest's memory is mapped, so that forking the mapping stays cheap.
//!
//! What `fork(2)` costs depends on the areas of a mapping, about 1 µs each, and on pages that the process has
//! written: the page tables of an area without any are not copied at all, those of an area with a single one
//! are, for every page that is present. So nothing is ever written into a zygote's memory. Long runs of a layer
//! are mapped from its file. Short ones, of which a chain has thousands, are *gathered* with what lies between
//! them in one scratch file, which is mapped instead; it is in memory, and all copies share it.
//!
//! ```text
//! base     ████████████████████████████████████████████
//! layer 1       ▒▒▒▒▒▒▒▒▒        ▒  ▒ ▒
//! layer 2                          ▒  ▒▒           ▒
//! mapped   └base┘└layer 1┘└─base─┘└gathered┘└──base──┘└ gathered, a page
//! ```

use forkd_types::{PageCount, PageRun};

use crate::chain::{Held, LayerChain, union};

/// The most areas of a mapping, unless there are more runs that are too long to be gathered.
pub(crate) const MOST_AREAS: usize = 32;

/// The longest run that is gathered, 16 MiB: an area that maps one costs a fork less than a thousandth of what
/// copying it would cost the zygote.
const GATHER_BELOW: u64 = 4096;

/// Where the contents of an area are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Source {
    /// In the file of this layer, base first. The base's file also has the pages that no layer speaks of.
    Layer(usize),
    /// Nowhere: the pages are zero, and lie over others that are not.
    Zero,
    /// In several layers; they are to be gathered.
    Gathered,
}

/// A part of memory that is mapped as a whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Area {
    pub(crate) run: PageRun,
    pub(crate) source: Source,
}

/// Divides `pages` pages, of which the layers of `chain` hold `held`, into at most `limit` areas, if gathering runs below
/// [`GATHER_BELOW`] allows that: as few pages as possible are gathered, the shortest runs first.
pub(crate) fn divide(chain: &LayerChain, held: &[Held], pages: PageCount, limit: usize) -> Vec<Area> {
    let runs = runs(chain, held, pages);
    let mut shortest = 1;
    loop {
        let areas = gather(&runs, shortest);
        if areas.len() <= limit || shortest >= GATHER_BELOW {
            return areas;
        }
        shortest *= 2;
    }
}

/// All pages, cut wherever their contents are in another file.
fn runs(chain: &LayerChain, held: &[Held], pages: PageCount) -> Vec<Area> {
    let upper = chain.layers().get(1..).unwrap_or_default();
    let covered = union(upper.iter().flat_map(|layer| [layer.data(), layer.zero()]));
    let mut held = held.iter().filter(|held| held.layer > 0).peekable();
    let mut runs = Vec::new();
    let mut push = |first: u64, end: u64, source| {
        if first < end {
            runs.push(Area { run: PageRun { first, count: end - first }, source });
        }
    };
    let mut page = 0;
    for covered in covered {
        push(page, covered.first, Source::Layer(0));
        page = covered.first;
        while let Some(&Held { run, layer }) = held.next_if(|held| held.run.first < covered.end()) {
            push(page, run.first, Source::Zero);
            push(run.first, run.end(), Source::Layer(layer));
            page = run.end();
        }
        push(page, covered.end(), Source::Zero);
        page = covered.end();
    }
    push(page, pages.0, Source::Layer(0));
    runs
}

/// Makes one area of neighbours of which all are shorter than `shortest`, and of those with the same source.
fn gather(runs: &[Area], shortest: u64) -> Vec<Area> {
    let mut areas: Vec<Area> = Vec::new();
    for &Area { run, source } in runs {
        let source = if run.count < shortest { Source::Gathered } else { source };
        match areas.last_mut() {
            Some(last) if last.source == source => last.run.count += run.count,
            _ => areas.push(Area { run, source }),
        }
    }
    areas
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Layer;
    use crate::chain::tests::{layer, written};
    use proptest::prelude::*;

    const PAGES: u64 = 200;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn every_page_is_in_one_area_whose_file_has_it(says in prop::collection::vec(layer(PAGES), 1..6), limit in 1_usize..40) {
            let layers: Vec<Layer> = says.iter().map(|says| written(says)).collect();
            let chain = LayerChain::new(layers.into(), PageCount(PAGES)).expect("one size");
            let areas = divide(&chain, &chain.held(), PageCount(PAGES), limit);
            let mut page = 0;
            for area in &areas {
                prop_assert_eq!(area.run.first, page);
                for page in area.run.first..area.run.end() {
                    let top = (1..says.len()).rev().find_map(|layer| says[layer][page as usize].map(|stored| (layer, stored)));
                    let expected = match top {
                        Some((layer, true)) => Source::Layer(layer),
                        Some((_, false)) => Source::Zero,
                        None => Source::Layer(0),
                    };
                    prop_assert!(area.source == expected || area.source == Source::Gathered, "page {page}: {area:?}");
                }
                page = area.run.end();
            }
            prop_assert_eq!(page, PAGES);
            // All of this memory is shorter than what may be gathered.
            prop_assert!(areas.len() <= limit, "{areas:?}");
            for pair in areas.windows(2) {
                prop_assert!(pair[0].source != pair[1].source, "{pair:?} should be one");
            }
        }
    }

    #[test]
    fn nothing_is_gathered_where_there_are_few_runs_and_the_shortest_go_first() {
        let mut upper = [None; PAGES as usize];
        upper[10..20].fill(Some(true));
        upper[50] = Some(true);
        upper[52..60].fill(Some(false));
        let chain = LayerChain::new(vec![written(&[None; PAGES as usize]), written(&upper)].into(), PageCount(PAGES));
        let chain = chain.expect("one size");
        let sources = |limit| {
            divide(&chain, &chain.held(), PageCount(PAGES), limit).iter().map(|area| area.source).collect::<Vec<_>>()
        };
        let (base, upper) = (Source::Layer(0), Source::Layer(1));
        assert_eq!(sources(7), [base, upper, base, upper, base, Source::Zero, base]);
        assert_eq!(sources(6), [base, upper, base, Source::Gathered, Source::Zero, base]);
    }

    #[test]
    fn a_base_alone_is_one_area() {
        let chain = LayerChain::new(vec![written(&[Some(true); PAGES as usize])].into(), PageCount(PAGES));
        let chain = chain.expect("one size");
        let areas = divide(&chain, &chain.held(), PageCount(PAGES), 1);
        assert_eq!(areas, [Area { run: PageRun { first: 0, count: PAGES }, source: Source::Layer(0) }]);
    }
}
