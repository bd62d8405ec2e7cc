//! What of a guest's memory goes into a layer: all of it, or what its parent does not have.
//!
//! Both writers run in a process in which nothing else does, the one that was forked to write, and
//! describe the memory exactly as that process reads it: laid over the layers it was made from, a
//! layer of changes gives back every byte. So what is written is a function of the memory and of the
//! parent alone; how the pages came to be private, copied or mapped makes no difference.
//!
//! That includes pages that the guest reported as free and [`GuestRam::release`] gave back. Such a
//! page reads as what lies underneath it in this process: the parent's contents where files are mapped,
//! zero in anonymous memory. It is then compared like any other, and costs nothing unless the parent says
//! something else about it. It can do so only where the parent's page had been copied in ([`GuestRam`]'s
//! `copied`); those pages are looked at whether or not they are private.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::unix::fs::FileExt;

use forkd_types::{PAGE_SIZE, PageRun};

use crate::chain::{Held, union};
use crate::layer::{DATA_OFFSET, LayerSummary, LayerWriter};
use crate::ram::{GuestRam, RamError};

/// Pages that are compared at a time: 1 MiB, read from the layer in one call.
const BATCH: u64 = 256;

impl GuestRam {
    /// Writes all memory that is not zero as a base layer to `file`.
    ///
    /// To be called in a process in which no vCPU and no device runs. The pages read are those in the
    /// layers and those that are private; all others have never been touched.
    pub fn write_base(&self, file: File) -> Result<LayerSummary, RamError> {
        let held: Vec<PageRun> = self.chain().held().iter().map(|piece| piece.run).collect();
        let private = self.page_map()?.private;
        let candidates = union([held.as_slice(), self.copied(), &private]);
        self.write(file, &candidates, &[])
    }

    /// Writes what differs from the layers that this memory was made from, as a layer over them.
    ///
    /// To be called in a process in which no vCPU and no device runs. A page that is not private is the
    /// mapped file's and so the parent's; one that is private is compared, because it may have been
    /// copied in and never written, or written back to what it was. For memory that was not made from
    /// layers this is [`write_base`](Self::write_base).
    pub fn write_changes(&self, file: File) -> Result<LayerSummary, RamError> {
        let private = self.page_map()?.private;
        self.write(file, &union([self.copied(), &private]), &self.chain().held())
    }

    /// Writes those pages of `candidates` that are not what `below` says.
    fn write(&self, file: File, candidates: &[PageRun], below: &[Held]) -> Result<LayerSummary, RamError> {
        let failed = |source| RamError::Write { source };
        let mut writer = LayerWriter::new(file, self.layout().pages()).map_err(failed)?;
        let mut buffer = vec![0; (BATCH * PAGE_SIZE) as usize];
        for piece in pieces(candidates, below) {
            let mut first = piece.run.first;
            while first < piece.run.end() {
                let batch = PageRun { first, count: BATCH.min(piece.run.end() - first) };
                let below = match piece.layer {
                    Some(layer) => {
                        let bytes = &mut buffer[..batch.bytes() as usize];
                        self.read_layer(layer, batch, bytes)?;
                        Some(&*bytes)
                    }
                    None => None,
                };
                writer.store_changes(first, self.frozen(batch), below).map_err(failed)?;
                first = batch.end();
            }
        }
        writer.finish().map_err(failed)
    }

    fn read_layer(&self, layer: usize, run: PageRun, bytes: &mut [u8]) -> Result<(), RamError> {
        let file = self.chain().layers()[layer].file();
        file.read_exact_at(bytes, DATA_OFFSET + run.offset())
            .map_err(|source| RamError::Io { attempt: "read a memory layer to compare with it", source })
    }

    /// The bytes of `run`, in a process in which nothing writes to them.
    fn frozen(&self, run: PageRun) -> &[u8] {
        assert!(run.end() <= self.layout().pages().0, "runs come from the page map and from layers of the same size");
        // SAFETY: the run lies within the mapping, which is never unmapped; no vCPU and no other thread
        // of this process writes to it while the slice lives (the promise of both writers' callers).
        unsafe { std::slice::from_raw_parts(self.base().add(run.offset() as usize), run.bytes() as usize) }
    }
}

/// Candidates of which one layer, or none, holds the parent's contents.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Piece {
    run: PageRun,
    layer: Option<usize>,
}

/// Cuts ascending `candidates` where the layer that holds them changes.
fn pieces<'a>(candidates: &'a [PageRun], held: &'a [Held]) -> impl Iterator<Item = Piece> + 'a {
    let mut held = held.iter().peekable();
    let mut candidates = candidates.iter();
    let mut rest: Option<PageRun> = None;
    std::iter::from_fn(move || {
        let run = rest.take().or_else(|| candidates.next().copied())?;
        while held.next_if(|piece| piece.run.end() <= run.first).is_some() {}
        let (end, layer) = match held.peek() {
            Some(piece) if piece.run.first <= run.first => (piece.run.end().min(run.end()), Some(piece.layer)),
            Some(piece) => (piece.run.first.min(run.end()), None),
            None => (run.end(), None),
        };
        rest = (end < run.end()).then(|| PageRun { first: end, count: run.end() - end });
        Some(Piece { run: PageRun { first: run.first, count: end - run.first }, layer })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Backing, Layer, MemoryLayout};
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    /// Pages that the tests touch, of [`layout`]'s 32,768.
    const PAGES: u64 = 1024;
    const PAGE: usize = PAGE_SIZE as usize;

    fn layout() -> MemoryLayout {
        MemoryLayout::new(128 << 20).expect("legal")
    }

    fn from_layers(files: &[File], backing: Backing) -> GuestRam {
        let open = |file: &File| Layer::open(file.try_clone().expect("dup")).expect("open");
        GuestRam::from_layers(layout(), files.iter().map(open).collect::<Vec<_>>(), backing).expect("map")
    }

    /// The first [`PAGES`] pages.
    fn read(ram: &GuestRam) -> Vec<u8> {
        let mut bytes = vec![0; PAGES as usize * PAGE];
        ram.memory().read_slice(&mut bytes, GuestAddress(0)).expect("inside RAM");
        bytes
    }

    fn write(ram: &GuestRam, run: PageRun, fill: u8) {
        let bytes: Vec<u8> = (0..run.bytes()).map(|at| if fill == 0 { 0 } else { fill ^ (at % 7) as u8 }).collect();
        ram.memory().write_slice(&bytes, GuestAddress(run.offset())).expect("inside RAM");
    }

    fn changes(ram: &GuestRam) -> (File, Layer, LayerSummary) {
        let file = tempfile::tempfile().expect("scratch");
        let summary = ram.write_changes(file.try_clone().expect("dup")).expect("write");
        let layer = Layer::open(file.try_clone().expect("dup")).expect("open");
        layer.verify(|_| ()).expect("verify");
        (file, layer, summary)
    }

    fn pages_of(runs: &[PageRun]) -> Vec<u64> {
        runs.iter().flat_map(|run| run.first..run.end()).collect()
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write(PageRun, u8),
        /// Writes what the parent has there.
        WriteBack(PageRun),
        Release(PageRun),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let count = prop_oneof![4 => 1_u64..6, 1 => 60_u64..200];
        let run = (0..PAGES, count).prop_map(|(first, count)| PageRun { first, count: count.min(PAGES - first) });
        let step =
            (run, 0_u8..8, prop_oneof![Just(8), Just(0), any::<u8>()]).prop_map(|(run, kind, fill)| match kind {
                0 => Step::WriteBack(run),
                1 => Step::Release(run),
                _ => Step::Write(run, fill),
            });
        prop::collection::vec(step, 0..12)
    }

    fn backing() -> impl Strategy<Value = Backing> {
        prop_oneof![3 => Just(Backing::File), 1 => Just(Backing::TransparentHugePages)]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

        #[test]
        fn a_layer_holds_exactly_what_changed_at_any_depth(
            generations in prop::collection::vec((steps(), backing()), 1..9)
        ) {
            let booted = GuestRam::anonymous(layout()).expect("map");
            write(&booted, PageRun { first: 100, count: 300 }, 1);
            let base = tempfile::tempfile().expect("scratch");
            booted.write_base(base.try_clone().expect("dup")).expect("write");
            let mut parent = read(&booted);
            let mut files = vec![base];
            for (steps, backing) in generations {
                let ram = from_layers(&files, backing);
                prop_assert!(read(&ram) == parent, "the layers do not give the parent's memory");
                for step in steps {
                    match step {
                        Step::Write(run, fill) => write(&ram, run, fill),
                        Step::WriteBack(run) => {
                            let old = &parent[run.offset() as usize..(run.offset() + run.bytes()) as usize];
                            ram.memory().write_slice(old, GuestAddress(run.offset())).expect("inside RAM");
                        }
                        Step::Release(run) => ram.release(run.offset(), run.bytes()),
                    }
                }
                let (file, layer, summary) = changes(&ram);
                let now = read(&ram);
                let (mut stored, mut zeroed) = (Vec::new(), Vec::new());
                for (page, (new, old)) in (0..).zip(now.chunks_exact(PAGE).zip(parent.chunks_exact(PAGE))) {
                    match new.iter().all(|byte| *byte == 0) {
                        _ if new == old => {}
                        true => zeroed.push(page),
                        false => stored.push(page),
                    }
                }
                prop_assert_eq!(pages_of(layer.data()), stored);
                prop_assert_eq!(pages_of(layer.zero()), zeroed);
                prop_assert_eq!(summary.pages, PageRun::total(layer.data()));
                prop_assert_eq!(summary.zero_pages, PageRun::total(layer.zero()));
                // The same memory as one base.
                let whole = tempfile::tempfile().expect("scratch");
                ram.write_base(whole.try_clone().expect("dup")).expect("write");
                prop_assert!(read(&from_layers(&[whole], Backing::File)) == now, "base and layers disagree");
                files.push(file);
                parent = now;
            }
        }

        #[test]
        fn candidates_are_cut_at_every_border_of_what_is_held_and_nowhere_else(
            candidates in prop::collection::btree_set(0_u64..80, 0..60),
            held in prop::collection::btree_map(0_u64..80, 0_usize..3, 0..60),
        ) {
            let mut runs = Vec::new();
            candidates.iter().for_each(|&page| PageRun::push(&mut runs, page));
            let mut pieces_held: Vec<Held> = Vec::new();
            for (&page, &layer) in &held {
                match pieces_held.last_mut() {
                    Some(last) if last.layer == layer && last.run.end() == page => last.run.count += 1,
                    _ => pieces_held.push(Held { run: PageRun { first: page, count: 1 }, layer }),
                }
            }
            let cut: Vec<Piece> = pieces(&runs, &pieces_held).collect();
            let found: Vec<_> = cut
                .iter()
                .flat_map(|piece| (piece.run.first..piece.run.end()).map(|page| (page, piece.layer)))
                .collect();
            let expected: Vec<_> = candidates.iter().map(|page| (*page, held.get(page).copied())).collect();
            prop_assert_eq!(found, expected);
            for pair in cut.windows(2) {
                prop_assert!(pair[0].run.end() < pair[1].run.first || pair[0].layer != pair[1].layer, "{:?}", pair);
            }
        }
    }

    #[test]
    fn a_machine_that_changed_nothing_makes_an_empty_layer_however_its_pages_came_in() {
        let booted = GuestRam::anonymous(layout()).expect("map");
        write(&booted, PageRun { first: 0, count: 400 }, 9);
        let (base, ..) = changes(&booted);
        let ram = from_layers(std::slice::from_ref(&base), Backing::File);
        write(&ram, PageRun { first: 3, count: 1 }, 5);
        write(&ram, PageRun { first: 50, count: 2 }, 0);
        let (layer, ..) = changes(&ram);
        let files = [base, layer];
        for backing in [Backing::File, Backing::TransparentHugePages] {
            let ram = from_layers(&files, backing);
            let (_, layer, _) = changes(&ram);
            assert_eq!((layer.data(), layer.zero()), (&[][..], &[][..]), "{backing:?}");
        }
    }

    #[test]
    fn base_and_layer_hold_the_memory_above_the_device_hole_too() {
        let layout = MemoryLayout::new((3 << 30) + (128 << 20)).expect("legal");
        let places = [0x5000, (3 << 30) - PAGE_SIZE, 4 << 30, (4 << 30) + (127 << 20)].map(GuestAddress);
        let fill = |ram: &GuestRam, number: u64| {
            places.iter().for_each(|place| ram.memory().write_obj(place.0 ^ number, *place).expect("inside RAM"));
        };
        let booted = GuestRam::anonymous(layout).expect("map");
        fill(&booted, 1);
        let base = tempfile::tempfile().expect("scratch");
        booted.write_base(base.try_clone().expect("dup")).expect("write");
        let open = |file: &File| Layer::open(file.try_clone().expect("dup")).expect("open");
        let ram = GuestRam::from_layers(layout, [open(&base)], Backing::File).expect("map");
        for place in places {
            assert_eq!(ram.memory().read_obj::<u64>(place).expect("inside RAM"), place.0 ^ 1);
        }
        fill(&ram, 2);
        let (layer, ..) = changes(&ram);
        let ram = GuestRam::from_layers(layout, [open(&base), open(&layer)], Backing::File).expect("map");
        for place in places {
            assert_eq!(ram.memory().read_obj::<u64>(place).expect("inside RAM"), place.0 ^ 2);
        }
    }

    #[test]
    fn long_zero_runs_take_no_memory() {
        let booted = GuestRam::anonymous(layout()).expect("map");
        write(&booted, PageRun { first: 0, count: 1000 }, 9);
        let (base, ..) = changes(&booted);
        let ram = from_layers(std::slice::from_ref(&base), Backing::File);
        write(&ram, PageRun { first: 10, count: 900 }, 0);
        let (file, layer, summary) = changes(&ram);
        assert_eq!(layer.zero(), [PageRun { first: 10, count: 900 }]);
        assert_eq!((summary.pages.0, summary.zero_pages.0), (0, 900));
        let again = from_layers(&[base, file], Backing::File);
        assert_eq!(again.page_map().expect("pagemap").private, []);
        assert_eq!(read(&again), read(&ram));
    }
}
