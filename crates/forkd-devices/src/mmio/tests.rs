//! The register window: discovery, the status machine, queues and interrupts, with the entropy device
//! behind it.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use proptest::prelude::*;
use virtio_bindings::virtio_mmio as offset;
use vm_memory::{Bytes, GuestAddress};

use super::{MmioTransport, RestoreError, TransportState};
use crate::rng::{Rng, RngState};
use crate::test_driver::{ALL_FEATURES, BUFFERS_AT, CountingLine, Driver, MEMORY_SIZE, NO_EVENT_IDX, new_memory};
use crate::{DeviceState, InterruptLine, QueueState};

fn probe() -> Driver {
    Driver::probe(Box::new(Rng::new()))
}

fn start(mask: u64) -> Driver {
    Driver::start(Box::new(Rng::new()), mask)
}

fn ask(driver: &mut Driver, len: u32) -> Vec<u8> {
    driver.add(0, &[(BUFFERS_AT, len, true)]);
    driver.kick(0);
    let used = driver.take_used(0);
    assert_eq!(used.len(), 1);
    let mut bytes = vec![0; used[0].1 as usize];
    driver.memory.read_slice(&mut bytes, GuestAddress(BUFFERS_AT)).unwrap();
    bytes
}

#[test]
fn a_driver_finds_the_device() {
    let driver = probe();
    assert_eq!(driver.read(offset::VIRTIO_MMIO_MAGIC_VALUE).to_le_bytes(), *b"virt");
    assert_eq!(driver.read(offset::VIRTIO_MMIO_VERSION), 2);
    assert_eq!(driver.read(offset::VIRTIO_MMIO_DEVICE_ID), 4);
    assert_eq!(driver.read(offset::VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    assert_eq!(driver.read(offset::VIRTIO_MMIO_QUEUE_NUM_MAX), 64);
    driver.write(offset::VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!(driver.read(offset::VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
}

#[test]
fn accesses_of_odd_sizes_and_places_do_nothing() {
    let driver = probe();
    let mut bytes = [0xee; 8];
    driver.transport.read(0, &mut bytes);
    assert_eq!(bytes, [0; 8]);
    let mut bytes = [0xee; 2];
    driver.transport.read(2, &mut bytes);
    assert_eq!(bytes, [0; 2]);
    let mut bytes = [0xee; 4];
    driver.transport.read(u64::MAX, &mut bytes);
    assert_eq!(bytes, [0; 4]);
    assert_eq!(driver.transport.write(u64::MAX - 3, &[1; 4]), None);
    assert_eq!(driver.transport.write(0x70, &[1]), None);
    assert_eq!(driver.read(offset::VIRTIO_MMIO_STATUS), 0);
}

#[test]
fn the_status_goes_up_one_step_at_a_time() {
    let driver = probe();
    let status = |value| {
        driver.write(offset::VIRTIO_MMIO_STATUS, value);
        driver.read(offset::VIRTIO_MMIO_STATUS)
    };
    assert_eq!(status(3), 0);
    assert_eq!(status(1), 1);
    assert_eq!(status(11), 1);
    assert_eq!(status(3), 3);
    assert_eq!(status(11), 3, "without VERSION_1");
    driver.write(offset::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    driver.write(offset::VIRTIO_MMIO_DRIVER_FEATURES, 3);
    assert_eq!(status(11), 3, "with a feature that was not offered");
    driver.write(offset::VIRTIO_MMIO_DRIVER_FEATURES, 1);
    assert_eq!(status(15), 3, "two steps");
    assert_eq!(status(11), 11);
    driver.write(offset::VIRTIO_MMIO_DRIVER_FEATURES, 0);
    assert_eq!(status(15), 15, "features are fixed by then");
    assert_eq!(status(1), 15, "bits stay");
    assert_eq!(status(15 | 128), 15 | 128);
    assert_eq!(status(0), 0);
    assert_eq!(status(128), 128);
    assert_eq!(status(129), 128, "nothing but a reset leads out of FAILED");
}

#[test]
fn queues_outside_memory_do_not_become_ready() {
    let driver = probe();
    for status in [1, 3] {
        driver.write(offset::VIRTIO_MMIO_STATUS, status);
    }
    driver.write(offset::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    driver.write(offset::VIRTIO_MMIO_DRIVER_FEATURES, 1);
    driver.write(offset::VIRTIO_MMIO_STATUS, 11);
    let try_queue = |size: u32, descriptors: u64, available: u64, used: u64| {
        driver.write(offset::VIRTIO_MMIO_QUEUE_NUM, size);
        for (register, address) in [
            (offset::VIRTIO_MMIO_QUEUE_DESC_LOW, descriptors),
            (offset::VIRTIO_MMIO_QUEUE_AVAIL_LOW, available),
            (offset::VIRTIO_MMIO_QUEUE_USED_LOW, used),
        ] {
            driver.write(register, address as u32);
            driver.write(register + 4, (address >> 32) as u32);
        }
        driver.write(offset::VIRTIO_MMIO_QUEUE_READY, 1);
        driver.read(offset::VIRTIO_MMIO_QUEUE_READY)
    };
    assert_eq!(try_queue(8, MEMORY_SIZE - 64, 0x2000, 0x3000), 0);
    assert_eq!(try_queue(8, 0x1000, 0x2001, 0x3000), 0);
    assert_eq!(try_queue(8, 0x1000, 0x2000, u64::MAX - 7), 0);
    assert_eq!(try_queue(8, 0x1000, 0, 0x3000), 0);
    assert_eq!(try_queue(7, 0x1000, 0x2000, 0x3000), 1, "an impossible size is ignored");
    assert_eq!(driver.read(offset::VIRTIO_MMIO_QUEUE_READY), 1);
    driver.write(offset::VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(driver.read(offset::VIRTIO_MMIO_QUEUE_READY), 0);
}

#[test]
fn a_notification_names_a_queue_of_a_running_device() {
    let mut driver = probe();
    let notify = |driver: &Driver, queue: u32| {
        driver.transport.write(offset::VIRTIO_MMIO_QUEUE_NOTIFY.into(), &queue.to_le_bytes())
    };
    assert_eq!(notify(&driver, 0), None);
    driver.set_up(ALL_FEATURES);
    assert_eq!(notify(&driver, 0), Some(0));
    assert_eq!(notify(&driver, 1), None);
    assert_eq!(notify(&driver, 0x1_0000), None);
    driver.write(offset::VIRTIO_MMIO_QUEUE_SEL, 0);
    driver.write(offset::VIRTIO_MMIO_QUEUE_READY, 0);
    driver.transport.process_queue(0);
    driver.transport.process_queue(u16::MAX);
}

#[test]
fn entropy_is_different_every_time() {
    let mut driver = start(ALL_FEATURES);
    let first = ask(&mut driver, 64);
    assert_eq!(first.len(), 64);
    assert_ne!(first, ask(&mut driver, 64));
    assert_eq!(ask(&mut driver, 100_000).len(), 4096, "the rest is asked for again");
    assert_eq!(ask(&mut driver, 0).len(), 0);
}

#[test]
fn interrupts_come_when_they_are_wanted() {
    let mut driver = start(ALL_FEATURES);
    driver.add(0, &[(BUFFERS_AT, 8, true)]);
    driver.kick(0);
    assert_eq!(driver.line.count(), 1);
    assert_eq!(driver.read(offset::VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    driver.write(offset::VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(driver.read(offset::VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    // The driver has not looked at the first entry, so it does not want another interrupt.
    driver.add(0, &[(BUFFERS_AT, 8, true)]);
    driver.kick(0);
    assert_eq!(driver.line.count(), 1);
    assert_eq!(driver.take_used(0).len(), 2);
    ask(&mut driver, 8);
    assert_eq!(driver.line.count(), 2);

    // Without event indices there is a flag.
    let mut driver = start(NO_EVENT_IDX);
    driver.memory.write_obj(1_u16, GuestAddress(0x1_1000)).unwrap();
    ask(&mut driver, 8);
    assert_eq!(driver.line.count(), 0);
    driver.memory.write_obj(0_u16, GuestAddress(0x1_1000)).unwrap();
    ask(&mut driver, 8);
    assert_eq!(driver.line.count(), 1);
}

#[test]
fn a_ring_that_overtakes_itself_stops_the_device() {
    let mut driver = start(ALL_FEATURES);
    driver.memory.write_obj(1000_u16, GuestAddress(0x1_1002)).unwrap();
    driver.transport.process_queue(0);
    assert_eq!(driver.read(offset::VIRTIO_MMIO_STATUS), 15 | 64);
    let notify = driver.transport.write(offset::VIRTIO_MMIO_QUEUE_NOTIFY.into(), &[0; 4]);
    assert_eq!(notify, None, "a stopped device is not notified");
    // Its copy is stopped, too.
    let copy = driver.copy(|_| Box::new(Rng::new())).unwrap();
    assert_eq!(copy.read(offset::VIRTIO_MMIO_STATUS), 15 | 64);
    copy.transport.process_queue(0);
    driver.set_up(ALL_FEATURES);
    assert_eq!(ask(&mut driver, 8).len(), 8);
}

#[test]
fn a_copy_goes_on_where_its_source_was() {
    for mask in [ALL_FEATURES, NO_EVENT_IDX] {
        let mut source = start(mask);
        ask(&mut source, 16);
        source.add(0, &[(BUFFERS_AT, 32, true)]);
        let mut copy = source.copy(|_| Box::new(Rng::restore(&RngState {}))).unwrap();
        assert_eq!(copy.transport.save(), source.transport.save());
        assert!(copy.line.count() >= 1, "the pending interrupt is raised again");
        for machine in [&mut source, &mut copy] {
            machine.kick(0);
            assert_eq!(machine.take_used(0)[0].1, 32);
            assert_eq!(ask(machine, 16).len(), 16);
        }
    }
}

#[test]
fn a_copy_taken_during_set_up_can_be_set_up() {
    let mut source = probe();
    source.write(offset::VIRTIO_MMIO_STATUS, 1);
    source.write(offset::VIRTIO_MMIO_STATUS, 3);
    let copy = source.copy(|_| Box::new(Rng::new())).unwrap();
    assert_eq!(copy.read(offset::VIRTIO_MMIO_STATUS), 3);
    source.set_up(ALL_FEATURES);
}

fn state() -> TransportState {
    let mut driver = start(ALL_FEATURES);
    ask(&mut driver, 8);
    driver.transport.save()
}

fn restore(state: &TransportState) -> Result<MmioTransport, RestoreError> {
    let line: Arc<dyn InterruptLine> = Arc::new(CountingLine::default());
    MmioTransport::restore(Box::new(Rng::new()), new_memory(), line, state)
}

#[test]
fn states_that_do_not_fit_are_refused() {
    let good = state();
    assert!(restore(&good).is_ok());
    let mut bad = good.clone();
    bad.queues.push(QueueState::default());
    assert!(matches!(restore(&bad), Err(RestoreError::QueueCount { saved: 2, own: 1, .. })));
    let mut bad = good.clone();
    bad.driver_features |= 1 << 60;
    assert!(matches!(restore(&bad), Err(RestoreError::Features { missing, .. }) if missing == 1 << 60));
    let mut bad = good.clone();
    bad.queues[0].used = MEMORY_SIZE;
    assert!(matches!(restore(&bad), Err(RestoreError::Queue { queue: 0, .. })));
    bad.queues[0].size = 3;
    assert!(matches!(restore(&bad), Err(RestoreError::Queue { queue: 0, .. })));
}

#[test]
fn states_survive_both_formats() {
    let state = state();
    let json = serde_json::to_string(&state).unwrap();
    assert_eq!(serde_json::from_str::<TransportState>(&json).unwrap(), state);
    let bytes = postcard::to_stdvec(&state).unwrap();
    assert_eq!(postcard::from_bytes::<TransportState>(&bytes).unwrap(), state);
    assert!(matches!(state.device, DeviceState::Rng(_)));
}

proptest! {
    /// Whatever a driver writes where, the device lives, and a reset makes it usable.
    #[test]
    fn no_register_write_breaks_the_device(writes in prop::collection::vec((0_u64..0x200, any::<u32>(), 0_u32..32, 1_usize..9), 0..200)) {
        let mut driver = probe();
        for (at, value, shift, len) in writes {
            let mut bytes = u64::from(value >> shift).to_le_bytes();
            if let Some(queue) = driver.transport.write(at & !3, &bytes[..4]) {
                driver.transport.process_queue(queue);
            }
            driver.transport.write(at, &bytes[..len]);
            driver.transport.read(at, &mut bytes[..len]);
            driver.transport.process_host_event();
        }
        let _ = restore(&driver.transport.save());
        driver.set_up(ALL_FEATURES);
        prop_assert_eq!(ask(&mut driver, 8).len(), 8);
    }
}
