//! Pages that leave the guest, through the queues.
#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress};

use super::{Balloon, BalloonTarget, PageRelease};
use crate::DeviceState;
use crate::test_driver::{ALL_FEATURES, BUFFERS_AT, Driver, MEMORY_SIZE};

type Released = Arc<Mutex<Vec<(u64, u64)>>>;

struct Recorder(Released);

impl PageRelease for Recorder {
    fn release(&self, guest_addr: u64, len: u64) {
        self.0.lock().unwrap().push((guest_addr, len));
    }
}

fn start() -> (Driver, Released, BalloonTarget) {
    let released = Released::default();
    let balloon = Balloon::new(Box::new(Recorder(Arc::clone(&released))));
    let target = balloon.target();
    (Driver::start(Box::new(balloon), ALL_FEATURES), released, target)
}

fn take(released: &Released) -> Vec<(u64, u64)> {
    std::mem::take(&mut *released.lock().unwrap())
}

#[test]
fn inflated_pages_are_released_if_they_are_memory() {
    let (mut driver, released, _) = start();
    let past_end = (MEMORY_SIZE / 4096) as u32;
    let pages = [300_u32, 301, 302, 400, past_end - 1, past_end, u32::MAX];
    let list: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    driver.memory.write_slice(&list, GuestAddress(BUFFERS_AT)).unwrap();
    driver.add(0, &[(BUFFERS_AT, list.len() as u32, false)]);
    driver.kick(0);
    assert_eq!(driver.take_used(0).len(), 1);
    assert_eq!(
        take(&released),
        [(300 << 12, 3 << 12), (400 << 12, 1 << 12), ((u64::from(past_end) - 1) << 12, 1 << 12)]
    );
    // Deflating needs nothing: the pages come back when they are touched.
    driver.add(1, &[(BUFFERS_AT, list.len() as u32, false)]);
    driver.kick(1);
    assert_eq!(driver.take_used(1).len(), 1);
    assert!(take(&released).is_empty());
}

#[test]
fn reported_blocks_are_released_and_their_edges_are_not() {
    let (mut driver, released, _) = start();
    driver.add(2, &[(0x20_0000, 0x20_0000, true), (0x40_0800, 0x2000, true), (0x50_0000, 0x800, true)]);
    driver.kick(2);
    assert_eq!(driver.take_used(2).len(), 1);
    assert_eq!(take(&released), [(0x20_0000, 0x20_0000), (0x40_1000, 0x1000)]);
    // Buffers outside memory, and ones the guest wants to keep, are passed over.
    driver.add(2, &[(MEMORY_SIZE, 0x1000, true), (MEMORY_SIZE - 0x1000, 0x2000, true)]);
    driver.add(2, &[(0x20_0000, 0x1000, false)]);
    driver.kick(2);
    assert_eq!(driver.take_used(2).len(), 2);
    assert_eq!(take(&released), [(MEMORY_SIZE - 0x1000, 0x1000)]);
}

#[test]
fn a_range_over_two_regions_is_released_region_by_region() {
    let (mut driver, released, _) = start();
    // The border lies in the middle of a page, which stays.
    let border = BUFFERS_AT + 0x1_0800;
    driver.add(2, &[(border - 0x2800, 0x5000, true)]);
    driver.kick(2);
    assert_eq!(take(&released), [(border - 0x2800, 0x2000), (border + 0x800, 0x2000)]);
}

#[test]
fn the_target_is_seen_by_the_driver_and_kept_by_copies() {
    let (driver, _, target) = start();
    let interrupts = driver.line.count();
    let generation = driver.read(0xfc);
    target.set(77);
    assert_eq!(driver.read(0x100), 77);
    assert_eq!(driver.line.count(), interrupts + 1);
    assert_ne!(driver.read(0xfc), generation);
    driver.write(0x100, 5);
    driver.write(0x104, 33);
    assert_eq!((driver.read(0x100), target.actual_pages()), (77, 33));
    let copy = driver
        .copy(|state| {
            let DeviceState::Balloon(state) = state else { panic!("a balloon saved {state:?}") };
            Box::new(Balloon::restore(state, Box::new(Recorder(Released::default()))))
        })
        .unwrap();
    assert_eq!((copy.read(0x100), copy.read(0x104), copy.read(0xfc)), (77, 33, driver.read(0xfc)));
}
