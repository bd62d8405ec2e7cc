//! The tiny guest and the machine it runs in.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use forkd_devices::block::BlockDisk;
use forkd_kvm::{Kvm, kvm_regs};
use forkd_memory::{Backing, GuestRam, Layer, LayerWriter, MemoryLayout};
use forkd_types::PAGE_SIZE;
use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::drivers;
use crate::machine::{Machine, Resources};
use crate::seed::Seed;
use crate::state::MachineConfig;

/// Where the code is.
const CODE: u64 = 0x1000;
/// What the code counts in, on a page that the snapshot stores.
const COUNTER: u64 = 0x3000;
/// Runs once when the machine boots, and once more in each copy: increment the byte at [`COUNTER`] (a
/// write fault on a shared page), print a newline on COM1, halt with interrupts off.
const PROGRAM: [u8; 21] = [
    0xb0, 0x0a, //       mov  al, '\n'
    0xba, 0xf8, 0x03, // mov  dx, 0x3f8
    0xee, //             out  dx, al
    0xf4, //             hlt
    0xa0, 0x00, 0x30, // mov  al, [0x3000]
    0xfe, 0xc0, //       inc  al
    0xa2, 0x00, 0x30, // mov  [0x3000], al
    0xb0, 0x0a, //       mov  al, '\n'
    0xee, //             out  dx, al
    0xf4, //             hlt
    0xeb, 0xf2, //       jmp  back to the load
];
/// Offset of the instruction behind the first halt.
const BEHIND_HALT: u64 = 7;
/// Size of the disk, all of it a hole.
const DISK_BYTES: u64 = 1 << 30;

/// Any failure, in words.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What one machine needs that no other may have, besides its console.
#[derive(Debug)]
pub(super) struct Private {
    pub(super) vsock: OwnedFd,
    pub(super) overlay: File,
}

impl Private {
    /// A listening socket with a name of the kernel's choice, and an unnamed scratch file in
    /// `scratch`.
    pub(super) fn new(scratch: &std::path::Path) -> io::Result<Self> {
        let vsock = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        rustix::net::bind(&vsock, &SocketAddrUnix::new_unnamed())?;
        rustix::net::listen(&vsock, 16)?;
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let overlay = rustix::fs::open(scratch, flags, Mode::from_raw_mode(0o600))?.into();
        Ok(Self { vsock, overlay })
    }
}

/// A memory layer of `memory_bytes` in which `touched_bytes` are not zero, in an unnamed file in
/// `scratch`.
pub(super) fn memory_layer(scratch: &std::path::Path, memory_bytes: u64, touched_bytes: u64) -> Result<File, Failure> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file: File = rustix::fs::open(scratch, flags, Mode::from_raw_mode(0o600))?.into();
    let mut writer = LayerWriter::new(file.try_clone()?, MemoryLayout::new(memory_bytes)?.pages())?;
    let mut page = vec![0; PAGE_SIZE as usize];
    page[..PROGRAM.len()].copy_from_slice(&PROGRAM);
    writer.store(CODE / PAGE_SIZE, &page)?;
    page.fill(1);
    writer.store(COUNTER / PAGE_SIZE, &page)?;
    for number in (1 << 20) / PAGE_SIZE..touched_bytes.min(memory_bytes) / PAGE_SIZE {
        page.fill(number as u8 | 1);
        writer.store(number, &page)?;
    }
    writer.finish()?;
    Ok(file)
}

/// The image under the guest's disk.
pub(super) fn disk_base() -> io::Result<File> {
    let base: File = rustix::fs::memfd_create(c"raw-disk", MemfdFlags::CLOEXEC)?.into();
    base.set_len(DISK_BYTES)?;
    Ok(base)
}

/// A machine over `ram`, with every device a sandbox has, that is driven to the state in which Linux
/// leaves it. Its vCPU is as after reset.
pub(super) fn machine(kvm: Arc<Kvm>, ram: GuestRam, private: Private, console: File) -> Result<Machine, Failure> {
    let resources = Resources {
        disks: vec![BlockDisk::new(disk_base()?, DISK_BYTES, Vec::new(), private.overlay)?],
        vsock: private.vsock,
        console,
        tap: None,
    };
    let memory_bytes = ram.layout().bytes();
    let config = MachineConfig { vcpus: 1, memory_bytes, disks: vec![DISK_BYTES], mac: None, guest_cid: 3 };
    let machine = Machine::build(kvm, config, resources, ram)?;
    for transport in machine.bus.slots.iter().flatten() {
        drivers::drive(transport)?;
    }
    Ok(machine)
}

/// Boots the guest over the layer in `memory`, waits until it has halted, and stops it there: the
/// seed from which copies go on behind the first halt.
pub(super) fn boot(memory: File, memory_bytes: u64, private: Private) -> Result<Seed, Failure> {
    let kvm = Arc::new(Kvm::open()?);
    let layout = MemoryLayout::new(memory_bytes)?;
    let ram = GuestRam::from_layers(layout, [Layer::open(memory)?], Backing::File)?;
    let (mut console, console_end) = io::pipe()?;
    let mut machine = machine(kvm.clone(), ram.clone(), private, OwnedFd::from(console_end).into())?;
    let vcpu = machine.first_vcpu().expect("it was not started yet");
    let mut sregs = vcpu.sregs()?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..Default::default() })?;
    machine.start()?;
    console.read_exact(&mut [0])?;
    let (paused, mut state) = loop {
        let (paused, state) = machine.pause()?;
        if state.vcpus[0].regs.rip == CODE + BEHIND_HALT {
            break (paused, state);
        }
        // It has printed but not halted yet.
        drop(paused);
        std::thread::sleep(Duration::from_millis(1));
    };
    // No interrupt can wake the guest from its halt: copies are woken by hand.
    state.vcpus[0].mp_state.mp_state = kvm_bindings::KVM_MP_STATE_RUNNABLE;
    let disks = machine.disks.iter().map(|disk| disk.lock().image()).collect::<Result<_, _>>()?;
    // The seed is all that is used of this machine from here on; its vCPU stays where it is.
    std::mem::forget(paused);
    Ok(Seed { kvm, ram, state, disks })
}
