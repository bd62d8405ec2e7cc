//! A guest that writes anything anywhere: random memory and register accesses, with a block device
//! behind the registers. The device must live, and what it saves must be refused or restored, never
//! panic.
//!
//! Input: a length-prefixed image of low guest memory, then register writes of six bytes each.
#![no_main]

use std::fs::File;
use std::sync::Arc;

use forkd_devices::block::{Block, BlockDisk, BlockState};
use forkd_devices::{DeviceState, GuestMemory, InterruptLine, MmioTransport};
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress};

const MEMORY: usize = 0x1_0000;
const DISK: u64 = 256 << 10;

struct NoInterrupts;

impl InterruptLine for NoInterrupts {
    fn trigger(&self) {}
}

fn file() -> File {
    File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a memfd"))
}

fn disk() -> BlockDisk {
    let base = file();
    base.set_len(DISK).expect("a memfd can be any size");
    BlockDisk::new(base, DISK, Vec::new(), file()).expect("the size is whole sectors")
}

/// The steps every driver takes, so that the fuzzer begins where it gets interesting: a queue of
/// eight entries at the start of memory.
fn set_up(transport: &MmioTransport) {
    let write = |register: u64, value: u32| transport.write(register, &value.to_le_bytes());
    for (register, value) in [
        (0x70, 0),
        (0x70, 1),
        (0x70, 3),
        (0x24, 0),
        (0x20, 0x3000_0000),
        (0x24, 1),
        (0x20, 1),
        (0x70, 11),
        (0x30, 0),
        (0x38, 8),
        (0x80, 0),
        (0x90, 0x100),
        (0xa0, 0x200),
        (0x44, 1),
        (0x70, 15),
    ] {
        write(register, value);
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((len, rest)) = input.split_first_chunk::<2>() else { return };
    let (image, accesses) = rest.split_at(rest.len().min(usize::from(u16::from_le_bytes(*len))));
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("64 KiB of memory");
    memory.write_slice(image, GuestAddress(0)).expect("the image is smaller than memory");
    let device = Block::new(disk(), "fuzz");
    let transport = MmioTransport::new(Box::new(device), memory.clone(), Arc::new(NoInterrupts));
    set_up(&transport);
    transport.process_queue(0);
    for access in accesses.chunks_exact(6) {
        let offset = u64::from(access[0]) * 4 % 0x200;
        let value = [access[2], access[3], access[4], access[5]];
        match access[1] % 8 {
            0 => transport.process_host_event(),
            1 => transport.process_queue(0),
            2 => {
                // The guest changes its memory under way.
                let place = u64::from(u16::from_le_bytes([access[4], access[5]]));
                let _ = memory.write_slice(&access[2..4], GuestAddress(place));
            }
            3 => transport.read(offset, &mut [0; 4]),
            _ => {
                if let Some(queue) = transport.write(offset, &value) {
                    transport.process_queue(queue);
                }
            }
        }
    }
    let state = transport.save();
    assert!(matches!(state.device, DeviceState::Block(BlockState { .. })));
    let device = Block::restore(&BlockState { serial: String::new() }, disk());
    if let Ok(copy) = MmioTransport::restore(Box::new(device), memory, Arc::new(NoInterrupts), &state) {
        copy.after_restore();
        copy.process_queue(0);
    }
});
