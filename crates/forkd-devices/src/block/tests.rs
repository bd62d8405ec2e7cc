//! The disk against a plain array, and the device through its registers.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use forkd_types::{PAGE_SIZE, PageRun};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::disk::{BlockDisk, DiskError, DiskImage};
use super::layer::{LayerExtent, SealedLayer};
use super::{Block, SharedDisk};
use crate::DeviceState;
use crate::test_driver::{ALL_FEATURES, BUFFERS_AT, Driver, NO_EVENT_IDX, Piece};

const BLOCK: usize = PAGE_SIZE as usize;

fn file(content: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(content, 0).unwrap();
    file
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|index| (index as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3] ^ seed).collect()
}

fn content(disk: &BlockDisk) -> Vec<u8> {
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(0, &mut bytes).unwrap();
    bytes
}

#[derive(Clone, Debug)]
enum Step {
    Write { at: u64, len: u64, seed: u8 },
    Discard { at: u64, len: u64 },
    WriteZeroes { at: u64, len: u64 },
    Seal,
    Branch,
}

/// Ranges at odd places, favouring block borders; the test brings them onto its disk, and those that
/// reach past its end make ranges up to the end.
fn range() -> impl Strategy<Value = (u64, u64)> {
    let place = prop_oneof![0..200_000_u64, (0_u64..40).prop_map(|block| block * PAGE_SIZE)];
    let len = prop_oneof![0..3 * PAGE_SIZE, (0_u64..6).prop_map(|blocks| blocks * PAGE_SIZE), Just(u64::MAX)];
    (place, len)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (range(), any::<u8>()).prop_map(|((at, len), seed)| Step::Write { at, len, seed }),
        2 => range().prop_map(|(at, len)| Step::Discard { at, len }),
        2 => range().prop_map(|(at, len)| Step::WriteZeroes { at, len }),
        2 => Just(Step::Seal),
        1 => Just(Step::Branch),
    ]
}

/// What a discard of whole blocks leaves.
fn discard_model(model: &mut [u8], at: u64, len: u64) {
    let end = at + len;
    let first = at.next_multiple_of(PAGE_SIZE);
    let stop = if end == model.len() as u64 { end } else { end / PAGE_SIZE * PAGE_SIZE };
    if first < stop {
        model[first as usize..stop as usize].fill(0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// Several disks that branch off each other, each against its own array.
    #[test]
    fn disks_agree_with_plain_arrays(
        sectors in 1_u64..300,
        base_len in 0_usize..120_000,
        hole in any::<bool>(),
        steps in prop::collection::vec((step(), any::<prop::sample::Index>()), 1..40),
    ) {
        let size = sectors * 512;
        let onto = |at: u64, len: u64| (at % size, len.min(size - at % size));
        let mut base = pattern(base_len.min(size as usize), 7);
        let base_file = file(&base);
        if hole && size > 40_960 {
            base_file.set_len(0).unwrap();
            base_file.set_len(20_480).unwrap();
            base.fill(0);
        }
        base.resize(size as usize, 0);
        let disk = BlockDisk::new(base_file, size, vec![], tempfile::tempfile().unwrap()).unwrap();
        let mut pairs = vec![(disk, base.clone())];
        for (step, which) in steps {
            let which = which.index(pairs.len());
            let (disk, model) = &mut pairs[which];
            match step {
                Step::Write { at, len, seed } => {
                    let (at, len) = onto(at, len);
                    let bytes = pattern(len as usize, seed);
                    disk.write_at(at, &bytes).unwrap();
                    model[at as usize..(at + len) as usize].copy_from_slice(&bytes);
                }
                Step::Discard { at, len } => {
                    let (at, len) = onto(at, len);
                    disk.discard(at, len).unwrap();
                    discard_model(model, at, len);
                }
                Step::WriteZeroes { at, len } => {
                    let (at, len) = onto(at, len);
                    disk.write_zeroes(at, len).unwrap();
                    model[at as usize..(at + len) as usize].fill(0);
                }
                Step::Seal => {
                    let before = disk.layers().len();
                    let layer = disk.seal(tempfile::tempfile().unwrap());
                    let after = disk.layers().len();
                    prop_assert!(after == before || after == before + 1 && Arc::ptr_eq(&disk.layers()[before], &layer));
                }
                Step::Branch => {
                    disk.seal(tempfile::tempfile().unwrap());
                    let branch = disk.image().unwrap().with_overlay(tempfile::tempfile().unwrap());
                    let model = model.clone();
                    pairs.push((branch, model));
                }
            }
        }
        for (disk, model) in &mut pairs {
            prop_assert!(content(disk) == *model, "the disk differs from its model");
            // What is not listed as changed is as in the base.
            disk.seal(tempfile::tempfile().unwrap());
            let image = disk.image().unwrap();
            let runs = image.runs_over(&image.bare());
            for block in 0..size.div_ceil(PAGE_SIZE) {
                let listed = runs.iter().any(|run| run.first <= block && block < run.end());
                let start = (block * PAGE_SIZE) as usize;
                let end = (start + BLOCK).min(size as usize);
                prop_assert!(listed || model[start..end] == base[start..end]);
                let mut whole = [0xee; BLOCK];
                image.read_blocks(block, &mut whole).unwrap();
                prop_assert_eq!(&whole[..end - start], &model[start..end]);
                prop_assert!(whole[end - start..].iter().all(|&byte| byte == 0));
            }
            // A disk put together anew from the same layers is the same disk.
            let mut base_now = base.clone();
            base_now.truncate(size as usize);
            let again = BlockDisk::new(file(&base_now), size, disk.layers().to_vec(), tempfile::tempfile().unwrap()).unwrap();
            prop_assert!(content(&again) == *model, "the disk changes when its index is built again");
        }
    }

    #[test]
    fn a_disk_tells_what_changed_since_it_was_put_together(
        before in prop::collection::btree_map(0_u64..60, any::<Option<u8>>(), 0..40),
        steps in prop::collection::vec((range(), prop_oneof![Just(None), any::<u8>().prop_map(Some)], any::<bool>()), 0..20),
    ) {
        let size = 60 * PAGE_SIZE - 1024;
        let base = pattern(size as usize, 1);
        let mut parent = base.clone();
        parent.resize(60 * BLOCK, 0);
        // A layer file holds whole blocks; what lies past the end of the disk is zeros.
        let mut packed = Vec::new();
        let mut extents = Vec::new();
        for (&block, &fill) in &before {
            let content = fill.map_or(vec![0; BLOCK], |seed| pattern(BLOCK, seed));
            let place = (block * PAGE_SIZE) as usize;
            parent[place..place + BLOCK].copy_from_slice(&content);
            let offset = fill.map(|_| packed.len() as u64);
            if fill.is_some() {
                packed.extend(content);
            }
            extents.push(LayerExtent { run: PageRun { first: block, count: 1 }, offset });
        }
        parent[size as usize..].fill(0);
        let layer = Arc::new(SealedLayer::packed(file(&packed), extents).unwrap());
        let mut disk = BlockDisk::new(file(&base), size, vec![layer], tempfile::tempfile().unwrap()).unwrap();
        let mut touched = std::collections::BTreeSet::new();
        for ((at, len), what, seal) in steps {
            let (at, len) = (at % size, len.min(size - at % size));
            match what {
                Some(seed) => disk.write_at(at, &pattern(len as usize, seed)).unwrap(),
                None => disk.discard(at, len).unwrap(),
            }
            touched.extend(at / PAGE_SIZE..(at + len).div_ceil(PAGE_SIZE));
            if seal {
                disk.seal(tempfile::tempfile().unwrap());
            }
        }
        let now = content(&disk);
        disk.seal(tempfile::tempfile().unwrap());
        let image = disk.image().unwrap();
        let origin = image.origin();
        prop_assert_eq!(origin.layers().len(), 1);
        let (mut old, mut new) = (vec![0xee; 60 * BLOCK], vec![0xee; 60 * BLOCK]);
        origin.read_blocks(0, &mut old).unwrap();
        image.read_blocks(0, &mut new).unwrap();
        prop_assert!(old == parent, "the origin is not what the disk was put together from");
        prop_assert!(new[..size as usize] == now && new[size as usize..].iter().all(|byte| *byte == 0));
        let listed: std::collections::BTreeSet<u64> =
            image.runs_over(&origin).into_iter().flat_map(|run| run.first..run.end()).collect();
        prop_assert!(listed.is_subset(&touched), "blocks nobody touched are listed: {:?}", listed.difference(&touched));
        for block in (0..60).filter(|block| !listed.contains(block)) {
            let range = block as usize * BLOCK..(block as usize + 1) * BLOCK;
            prop_assert!(old[range.clone()] == new[range], "block {} changed and is not listed", block);
        }
        // A copy of the copy has the same origin.
        let again = image.with_overlay(tempfile::tempfile().unwrap()).image().unwrap();
        prop_assert_eq!(again.origin().layers().len(), 1);
    }

    #[test]
    fn packed_layers_hold_what_was_packed(blocks in prop::collection::btree_map(0_u64..200, any::<Option<u8>>(), 0..60)) {
        let size = 200 * PAGE_SIZE;
        let base = pattern(size as usize, 1);
        let mut model = base.clone();
        let mut packed = vec![0xdd; 100];
        let mut extents: Vec<LayerExtent> = Vec::new();
        for (&block, &fill) in &blocks {
            let offset = fill.map(|seed| {
                let offset = packed.len() as u64;
                packed.extend(pattern(BLOCK, seed));
                offset
            });
            let place = (block * PAGE_SIZE) as usize;
            model[place..place + BLOCK].copy_from_slice(&fill.map_or(vec![0; BLOCK], |seed| pattern(BLOCK, seed)));
            match extents.last_mut() {
                Some(last) if last.run.end() == block && last.offset.is_some() && offset.is_some() => last.run.count += 1,
                _ => extents.push(LayerExtent { run: PageRun { first: block, count: 1 }, offset }),
            }
        }
        let layer = Arc::new(SealedLayer::packed(file(&packed), extents).unwrap());
        let mut disk = BlockDisk::new(file(&base), size, vec![layer], tempfile::tempfile().unwrap()).unwrap();
        prop_assert!(content(&disk) == model);
        disk.write_at(1000, &[9; 5000]).unwrap();
        model[1000..6000].fill(9);
        prop_assert!(content(&disk) == model);
    }
}

#[test]
fn ranges_off_the_disk_are_refused() {
    let mut disk = BlockDisk::new(file(b""), 4096 * 3 + 512, vec![], tempfile::tempfile().unwrap()).unwrap();
    for (offset, len) in [(12_800, 1), (12_799, 2), (u64::MAX, 2), (u64::MAX - 1, 1)] {
        let mut bytes = vec![0; len];
        assert!(matches!(disk.read_at(offset, &mut bytes), Err(DiskError::OutOfBounds { .. })));
        assert!(matches!(disk.write_at(offset, &bytes), Err(DiskError::OutOfBounds { .. })));
        assert!(matches!(disk.discard(offset, len as u64), Err(DiskError::OutOfBounds { .. })));
        assert!(matches!(disk.write_zeroes(offset, len as u64), Err(DiskError::OutOfBounds { .. })));
    }
    let image = disk.image().unwrap();
    assert!(image.read_blocks(3, &mut [0; BLOCK]).is_ok());
    assert!(image.read_blocks(2, &mut [0; 2 * BLOCK]).is_ok());
    for (first, blocks) in [(3, 2), (4, 1), (u64::MAX, 1), (0, 5)] {
        assert!(image.read_blocks(first, &mut vec![0; blocks * BLOCK]).is_err(), "{blocks} blocks at {first}");
    }
    for size in [0, 100, 513] {
        assert!(matches!(DiskImage::new(file(b""), size, vec![]), Err(DiskError::Size { .. })));
    }
}

#[test]
fn layers_past_the_end_are_refused() {
    let extent = LayerExtent { run: PageRun { first: 2, count: 2 }, offset: Some(0) };
    let layer = Arc::new(SealedLayer::packed(file(b""), vec![extent]).unwrap());
    assert!(matches!(DiskImage::new(file(b""), 3 * PAGE_SIZE, vec![layer]), Err(DiskError::Layer { .. })));
    assert!(SealedLayer::packed(file(b""), vec![extent, extent]).is_err());
}

#[test]
fn a_layer_that_was_cut_short_is_an_error_and_not_zeros() {
    let extent = LayerExtent { run: PageRun { first: 0, count: 2 }, offset: Some(0) };
    let layer = Arc::new(SealedLayer::packed(file(&[1; BLOCK]), vec![extent]).unwrap());
    let disk = BlockDisk::new(file(b""), 2 * PAGE_SIZE, vec![layer], tempfile::tempfile().unwrap()).unwrap();
    assert!(disk.read_at(0, &mut [0; BLOCK]).is_ok());
    assert!(matches!(disk.read_at(PAGE_SIZE, &mut [0; BLOCK]), Err(DiskError::File { file: "layer", .. })));
}

#[test]
fn branching_an_idle_disk_adds_no_layers() {
    let mut disk = BlockDisk::new(file(b"base"), 1 << 20, vec![], tempfile::tempfile().unwrap()).unwrap();
    disk.write_at(0, b"once").unwrap();
    assert!(matches!(disk.image(), Err(DiskError::Unsealed)));
    for _ in 0..100 {
        disk.seal(tempfile::tempfile().unwrap());
    }
    assert_eq!(disk.layers().len(), 1);
    assert_eq!(disk.raw_fds().len(), 2);
}

#[test]
fn a_discard_gives_host_space_back() {
    use std::os::unix::fs::MetadataExt;
    let directory = tempfile::tempdir().unwrap();
    let overlay =
        File::options().create_new(true).read(true).write(true).open(directory.path().join("overlay")).unwrap();
    let look = overlay.try_clone().unwrap();
    let mut disk = BlockDisk::new(file(b""), 16 << 20, vec![], overlay).unwrap();
    disk.write_at(0, &vec![1; 8 << 20]).unwrap();
    let full = look.metadata().unwrap().blocks();
    disk.discard(0, 8 << 20).unwrap();
    assert!(
        look.metadata().unwrap().blocks() < full / 4,
        "{full} blocks before, {} after",
        look.metadata().unwrap().blocks()
    );
    // Trimming what a sparse base never held changes nothing.
    let changed = |disk: &mut BlockDisk| {
        disk.seal(tempfile::tempfile().unwrap());
        let image = disk.image().unwrap();
        image.runs_over(&image.bare())
    };
    assert_eq!(changed(&mut disk), [PageRun { first: 0, count: 2048 }]);
    disk.discard(8 << 20, 8 << 20).unwrap();
    assert_eq!(changed(&mut disk), [PageRun { first: 0, count: 2048 }]);
}

// ---- the device ----

const HEADER: u64 = BUFFERS_AT;
const STATUS: u64 = BUFFERS_AT + 0x20;
/// The data begins shortly before the border of the two memory regions.
const DATA: u64 = BUFFERS_AT + 0x1_0000;

fn start(size: u64, mask: u64) -> (Driver, SharedDisk, Arc<super::BlockCounters>) {
    let base = pattern(size as usize, 3);
    let disk = BlockDisk::new(file(&base), size, vec![], tempfile::tempfile().unwrap()).unwrap();
    let device = Block::new(disk, "forkd-disk-0");
    let (shared, counters) = (device.disk(), device.counters());
    (Driver::start(Box::new(device), mask), shared, counters)
}

fn add_request(driver: &mut Driver, kind: u32, sector: u64, data: &[Piece]) {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    driver.memory.write_slice(&header, GuestAddress(HEADER)).unwrap();
    driver.memory.write_obj(0xff_u8, GuestAddress(STATUS)).unwrap();
    let mut pieces = vec![(HEADER, 16, false)];
    pieces.extend(data);
    pieces.push((STATUS, 1, true));
    driver.add(0, &pieces);
}

/// Makes one request; its status and used length.
fn request(driver: &mut Driver, kind: u32, sector: u64, data: &[Piece]) -> (u8, u32) {
    add_request(driver, kind, sector, data);
    driver.kick(0);
    let used = driver.take_used(0);
    assert_eq!(used.len(), 1, "the request was not answered");
    (driver.memory.read_obj(GuestAddress(STATUS)).unwrap(), used[0].1)
}

#[test]
fn requests_move_data_between_guest_and_disk() {
    for mask in [ALL_FEATURES, NO_EVENT_IDX] {
        let (mut driver, disk, counters) = start(1 << 20, mask);
        let base = content(&disk.lock());
        let scattered = [(DATA, 512, true), (DATA + 0x400, 0x1000, true), (DATA + 0x2000, 512, true)];
        assert_eq!(request(&mut driver, 0, 8, &scattered), (0, 5121));
        let mut bytes = vec![0; 0x1000];
        driver.memory.read_slice(&mut bytes, GuestAddress(DATA + 0x400)).unwrap();
        assert_eq!(bytes, base[4096 + 512..4096 + 512 + 0x1000]);

        let data = pattern(0x1200, 99);
        driver.memory.write_slice(&data, GuestAddress(DATA)).unwrap();
        assert_eq!(request(&mut driver, 1, 3, &[(DATA, 0x1200, false)]), (0, 1));
        let mut expected = base.clone();
        expected[1536..1536 + 0x1200].copy_from_slice(&data);
        assert!(content(&disk.lock()) == expected);

        assert_eq!(request(&mut driver, 4, 0, &[]), (0, 1));
        assert_eq!(request(&mut driver, 8, 0, &[(DATA, 20, true)]), (0, 21));
        assert_eq!(driver.memory.read_obj::<[u8; 20]>(GuestAddress(DATA)).unwrap(), *b"forkd-disk-0\0\0\0\0\0\0\0\0");

        // Blocks 4 to 7, then sector 1 alone.
        let mut segment = [0_u8; 16];
        segment[0] = 32;
        segment[8] = 32;
        driver.memory.write_slice(&segment, GuestAddress(DATA)).unwrap();
        assert_eq!(request(&mut driver, 11, 0, &[(DATA, 16, false)]), (0, 1));
        expected[4 * BLOCK..8 * BLOCK].fill(0);
        segment[0] = 1;
        segment[8] = 1;
        driver.memory.write_slice(&segment, GuestAddress(DATA)).unwrap();
        assert_eq!(request(&mut driver, 13, 0, &[(DATA, 16, false)]), (0, 1));
        expected[512..1024].fill(0);
        assert!(content(&disk.lock()) == expected);
        assert_eq!(counters.refused.load(Ordering::Relaxed), 0);
        assert!(driver.line.count() >= 5);
    }
}

#[test]
fn a_driver_that_errs_gets_errors() {
    let (mut driver, disk, counters) = start(1 << 20, ALL_FEATURES);
    let before = content(&disk.lock());
    let past_end = (1 << 20) / 512;
    assert_eq!(request(&mut driver, 0, past_end, &[(DATA, 512, true)]), (1, 1));
    assert_eq!(request(&mut driver, 1, past_end - 1, &[(DATA, 1024, false)]), (1, 1));
    assert_eq!(request(&mut driver, 1, u64::MAX, &[(DATA, 512, false)]), (1, 1));
    assert_eq!(request(&mut driver, 0, 0, &[(DATA, 100, true)]), (1, 1));
    assert_eq!(request(&mut driver, 77, 0, &[]), (2, 1));
    // A list of two ranges of which the second is off the disk changes nothing.
    let mut segments = [0_u8; 32];
    segments[8] = 8;
    segments[16..24].copy_from_slice(&past_end.to_le_bytes());
    segments[24] = 8;
    driver.memory.write_slice(&segments, GuestAddress(DATA)).unwrap();
    assert_eq!(request(&mut driver, 11, 0, &[(DATA, 32, false)]), (1, 1));
    assert_eq!(request(&mut driver, 11, 0, &[(DATA, 17, false)]), (1, 1));
    assert!(content(&disk.lock()) == before);
    assert_eq!(counters.refused.load(Ordering::Relaxed), 7);
    // No room for a status: nothing can be said.
    driver.add(0, &[(HEADER, 16, false)]);
    driver.kick(0);
    assert_eq!(driver.take_used(0)[0].1, 0);
    assert_eq!(request(&mut driver, 4, 0, &[]), (0, 1), "the device goes on");
}

#[test]
fn a_buffer_outside_memory_stops_the_device() {
    let (mut driver, ..) = start(1 << 20, ALL_FEATURES);
    let interrupts = driver.line.count();
    add_request(&mut driver, 0, 0, &[(crate::test_driver::MEMORY_SIZE - 256, 512, true)]);
    driver.kick(0);
    assert_eq!(driver.read(0x70) & 64, 64, "the status says that a reset is needed");
    assert_eq!(driver.read(0x60) & 2, 2, "a configuration change is signalled");
    assert_eq!(driver.line.count(), interrupts + 1);
    driver.set_up(ALL_FEATURES);
    assert_eq!(request(&mut driver, 4, 0, &[]), (0, 1), "after a reset it works again");
}

#[test]
fn a_host_without_room_is_an_error_in_the_guest() {
    // The overlay cannot be written at all: it is open for reading only.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("overlay");
    std::fs::write(&path, b"").unwrap();
    let disk = BlockDisk::new(file(b""), 1 << 20, vec![], File::open(&path).unwrap()).unwrap();
    let device = Block::new(disk, "x");
    let counters = device.counters();
    let mut driver = Driver::start(Box::new(device), ALL_FEATURES);
    assert_eq!(request(&mut driver, 1, 0, &[(DATA, 512, false)]), (1, 1));
    assert_eq!(request(&mut driver, 0, 0, &[(DATA, 512, true)]), (0, 513));
    assert_eq!(counters.failed.load(Ordering::Relaxed), 1);
    let full = DiskError::File {
        action: "writing",
        file: "overlay",
        offset: 0,
        len: 1,
        source: std::io::Error::from_raw_os_error(libc::ENOSPC),
    };
    assert!(full.is_out_of_space());
}

#[test]
fn a_shared_disk_is_read_by_all_and_written_by_nobody() {
    let bytes = pattern(1 << 20, 3);
    let image = DiskImage::shared(file(&bytes), 1 << 20).unwrap();
    assert!(image.is_read_only() && image.bare().is_read_only() && image.origin().is_read_only());
    let mut disk = image.clone().without_overlay();
    assert!(disk.is_read_only() && disk.image().unwrap().is_read_only());
    assert!(matches!(disk.write_at(0, &[1]), Err(DiskError::ReadOnly { offset: 0, len: 1 })));
    assert!(matches!(disk.discard(0, PAGE_SIZE), Err(DiskError::ReadOnly { .. })));
    assert!(matches!(disk.write_zeroes(512, 512), Err(DiskError::ReadOnly { .. })));
    assert!(matches!(disk.write_at(1 << 20, &[1]), Err(DiskError::OutOfBounds { .. })));
    assert!(content(&disk) == bytes);
    assert_eq!(image.runs_over(&image.bare()), []);

    let device = Block::new(disk, "x");
    let counters = device.counters();
    let features = crate::VirtioDevice::features(&device);
    assert_eq!((features >> 5 & 1, features >> 13 & 3), (1, 0), "read-only, and nothing to discard with");
    let mut driver = Driver::start(Box::new(device), ALL_FEATURES);
    let mut segment = [0_u8; 16];
    segment[8] = 8;
    driver.memory.write_slice(&segment, GuestAddress(DATA)).unwrap();
    for kind in [1, 11, 13] {
        let len = if kind == 1 { 512 } else { 16 };
        assert_eq!(request(&mut driver, kind, 0, &[(DATA, len, false)]), (1, 1), "request {kind}");
    }
    assert_eq!(counters.refused.load(Ordering::Relaxed), 3);
    assert_eq!(request(&mut driver, 4, 0, &[]), (0, 1));
    assert_eq!(request(&mut driver, 0, 1, &[(DATA, 512, true)]), (0, 513));
    let mut read = vec![0; 512];
    driver.memory.read_slice(&mut read, GuestAddress(DATA)).unwrap();
    assert_eq!(read, bytes[512..1024]);
}

#[test]
fn a_full_queue_is_served_in_shares() {
    let (mut driver, ..) = start(1 << 20, ALL_FEATURES);
    for _ in 0..128 {
        add_request(&mut driver, 4, 0, &[]);
    }
    driver.kick(0);
    let mut done = driver.take_used(0).len();
    assert!(done < 128, "one call serves a share");
    while driver.poll() {
        done += driver.take_used(0).len();
    }
    assert_eq!(done, 128);
    add_request(&mut driver, 4, 0, &[]);
    assert!(driver.kick(0), "the emptied queue asks to be notified");
    assert_eq!(driver.take_used(0).len(), 1);
}

#[test]
fn both_sides_of_a_branch_go_on_in_the_middle_of_traffic() {
    let (mut driver, disk, _) = start(1 << 20, ALL_FEATURES);
    driver.memory.write_slice(&[5; 4096], GuestAddress(DATA)).unwrap();
    assert_eq!(request(&mut driver, 1, 0, &[(DATA, 4096, false)]), (0, 1));
    // A request is in the queue that the device has not seen.
    add_request(&mut driver, 0, 0, &[(DATA + 0x4000, 4096, true)]);
    disk.lock().seal(tempfile::tempfile().unwrap());
    let branch = disk.lock().image().unwrap().with_overlay(tempfile::tempfile().unwrap());
    let mut shared = None;
    let mut copy = driver
        .copy(|state| {
            let DeviceState::Block(state) = state else { panic!("a block device saved {state:?}") };
            let device = Block::restore(state, branch);
            shared = Some(device.disk());
            Box::new(device)
        })
        .unwrap();
    for machine in [&mut driver, &mut copy] {
        machine.kick(0);
        assert_eq!(machine.take_used(0).len(), 1);
        assert_eq!(machine.memory.read_obj::<[u8; 8]>(GuestAddress(DATA + 0x4000)).unwrap(), [5; 8]);
    }
    copy.memory.write_slice(&[6; 512], GuestAddress(DATA)).unwrap();
    assert_eq!(request(&mut copy, 1, 1, &[(DATA, 512, false)]), (0, 1));
    assert_eq!(request(&mut copy, 8, 0, &[(DATA, 20, true)]), (0, 21));
    assert_eq!(content(&disk.lock())[..4096], [5; 4096]);
    let copied = content(&shared.unwrap().lock());
    assert_eq!(copied[..512], [5; 512]);
    assert_eq!(copied[512..1024], [6; 512]);
    assert_eq!(copied[1024..4096], [5; 3072]);
}
