//! A guest that writes to its memory and its disks what it is told to, and a model of it.
//!
//! The guest drives the vsock and two block devices itself; between the two there is one that it does not touch. The
//! host tells it something by asking for a connection: the port is the message. [`ASK`] makes it print how many
//! steps it has done; any other number is the seed of a step: 8 to 23 writes, drawn from a generator that [`Model`]
//! has too. So the whole content of a guest follows from the seeds that it was given.

// The guest's program is assembled into this one, as data that is never run here.
#![allow(unsafe_code)]

use std::sync::Arc;

/// Guest memory.
pub(crate) const MEMORY: u64 = 128 << 20;
/// Where the part of memory is that steps write to.
pub(crate) const WINDOW: u64 = 0x20_0000;
/// How large it is.
pub(crate) const WINDOW_BYTES: usize = 1 << 20;
/// Size of each disk that it writes to; not a whole number of blocks, and less than steps try to reach.
pub(crate) const DISK_BYTES: usize = (8 << 20) - 1024;
/// Which disks those are.
pub(crate) const WRITTEN: [usize; 2] = [0, 2];
/// How many there are.
pub(crate) const DISKS: usize = 3;
/// The message that asks how many steps were done.
pub(crate) const ASK: u32 = 1;

const SECTOR: usize = 512;
const PAGE: usize = 4096;

/// Where the image is loaded; everything up to [`WINDOW`] is at fixed places behind it.
const IMAGE: u64 = 0x10_0000;
const IMAGE_BYTES: usize = 0x2_0000;
/// Stores that the guest does at boot: pairs of address and value, ended by address 0.
const STORES: u64 = 0x10_1000;
const INTERRUPT_TABLE: u64 = 0x10_2000;
/// Limit and address of the table, as `lidt` reads them.
const TABLE_POINTER: u64 = 0x10_2ff0;
const HANDLER: u64 = 0x10_0800;
/// The vector that the vsock device's line is routed to.
const VECTOR: u64 = 0x30;
/// Descriptors, available and used ring of a queue are this far apart.
const RING: u64 = 0x800;
/// The queues: vsock receive, transmit and event, block requests of the first disk and of the other.
const QUEUES: [Queue; 5] = [
    Queue { slot: 0, index: 0, size: 64, descriptors: 0x10_4000 },
    Queue { slot: 0, index: 1, size: 8, descriptors: 0x10_6000 },
    Queue { slot: 0, index: 2, size: 8, descriptors: 0x10_8000 },
    Queue { slot: 3, index: 0, size: 8, descriptors: 0x10_a000 },
    Queue { slot: 5, index: 0, size: 8, descriptors: 0x11_6000 },
];
const RECEIVE_BUFFERS: u64 = 0x11_0000;
const EVENT_BUFFERS: u64 = 0x10_e000;
/// Header, status and data of the one block request that is made at a time.
const REQUEST: [u64; 3] = [0x10_c000, 0x10_c100, 0x10_d000];

struct Queue {
    slot: u64,
    index: u32,
    size: u32,
    descriptors: u64,
}

// What is at which address is said above. Registers: %ebx is the generator, %ebp counts the writes of a step, %esi is
// 0 or 1 for the disk, %edx how far its queue is behind the first one's.
core::arch::global_asm!(
    r#"
    .pushsection .rodata.family_guest, "a"
    .code32
    .global family_guest_begin
    .global family_guest_end
family_guest_begin:
    movl $0x1f0000, %esp
    movb $0xff, %al             /* mask both 8259s */
    outb %al, $0x21
    outb %al, $0xa1
    lidt 0x102ff0
    movl $0x101000, %esi
1:  movl (%esi), %edi           /* the stores of the boot table */
    testl %edi, %edi
    jz 2f
    movl 4(%esi), %eax
    movl %eax, (%edi)
    addl $8, %esi
    jmp 1b
2:  movl $0x3f8, %edx
    movb $10, %al
    outb %al, %dx
idle:
    sti
    hlt
    jmp idle

    .org family_guest_begin + 0x800
    /* The interrupt of the vsock device. It never returns: KVM's emulator has no iret for this mode. */
    movl $0x1f0000, %esp
    movl $0, 0xfee000b0         /* end of interrupt */
    movl 0xd0000060, %eax       /* acknowledge to the device */
    movl %eax, 0xd0000064
scan:
    movw 0x109002, %ax          /* events used */
    cmpw 0x103008, %ax
    je receive
    movzwl 0x103008, %ecx       /* give the buffer back */
    andl $7, %ecx
    movl 0x109004(,%ecx,8), %edx
    movzwl 0x108802, %ebx
    movl %ebx, %ecx
    andl $7, %ecx
    movw %dx, 0x108804(,%ecx,2)
    incl %ebx
    movw %bx, 0x108802
    incw 0x103008
    movl $2, 0xd0000050
    jmp scan
receive:
    movw 0x105002, %ax          /* packets used */
    cmpw 0x103004, %ax
    je idle
    movzwl 0x103004, %ecx
    andl $63, %ecx
    movl 0x105004(,%ecx,8), %edx
    movl %edx, %esi
    shll $8, %esi
    addl $0x110000, %esi
    movzwl 30(%esi), %ebp       /* operation */
    movl 20(%esi), %edi         /* port */
    movzwl 0x104802, %ebx       /* give the buffer back */
    movl %ebx, %ecx
    andl $63, %ecx
    movw %dx, 0x104804(,%ecx,2)
    incl %ebx
    movw %bx, 0x104802
    incw 0x103004
    movl $0, 0xd0000050
    cmpl $1, %ebp               /* only requests for connections matter */
    jne scan
    call command
    jmp scan

command:
    cmpl $1, %edi
    je answer
    movl %edi, %ebx
    call next
    andl $15, %eax
    addl $8, %eax
    movl %eax, %ebp
write:
    call next
    andl $15, %eax
    cmpl $10, %eax
    jb word
    je zero_page
    cmpl $11, %eax
    je fill_page
    cmpl $15, %eax
    jb sector
    jmp zeroes
written:
    decl %ebp
    jnz write
    incl 0x103000
    ret

next:                           /* xorshift32 */
    movl %ebx, %eax
    shll $13, %eax
    xorl %eax, %ebx
    movl %ebx, %eax
    shrl $17, %eax
    xorl %eax, %ebx
    movl %ebx, %eax
    shll $5, %eax
    xorl %eax, %ebx
    movl %ebx, %eax
    ret

word:
    call next
    andl $0xffffc, %eax
    leal 0x200000(%eax), %edi
    call next
    movl %eax, (%edi)
    jmp written
zero_page:
    call next
    andl $0xff000, %eax
    leal 0x200000(%eax), %edi
    xorl %eax, %eax
    jmp page
fill_page:
    call next
    andl $0xff000, %eax
    leal 0x200000(%eax), %edi
    call next
page:
    movl $1024, %ecx
    cld
    rep stosl
    jmp written
disk:                           /* which, from the lowest bit of %esi */
    andl $1, %esi
    leal (%esi,%esi,2), %edx
    shll $14, %edx
    ret
sector:
    call next
    movl %eax, %esi
    shrl $14, %esi
    andl $0x3fff, %eax
    call disk
    movl $1, 0x10c000           /* write */
    movl %eax, 0x10c008
    call next
    movl $0x10d000, %edi
    movl $128, %ecx
    cld
    rep stosl
    movl $512, 0x10a018(%edx)
    call submit
    jmp written
zeroes:
    call next
    movl %eax, %esi
    shrl $15, %esi
    call disk
    movl %eax, %ecx
    shrl $1, %ecx
    andl $0x3fff, %ecx
    testl $1, %eax
    jz discard
    call next
    andl $31, %eax
    incl %eax
    movl $13, 0x10c000          /* write zeroes */
    jmp segment
discard:
    andl $0x3ff8, %ecx
    call next
    andl $3, %eax
    incl %eax
    shll $3, %eax
    movl $11, 0x10c000          /* discard */
segment:
    movl $0, 0x10c008
    movl %ecx, 0x10d000
    movl $0, 0x10d004
    movl %eax, 0x10d008
    movl $0, 0x10d00c
    movl $16, 0x10a018(%edx)
    call submit
    jmp written
submit:
    movzwl 0x10a802(%edx), %ecx
    movl %ecx, %eax
    andl $7, %eax
    movw $0, 0x10a804(%edx,%eax,2)
    incl %ecx
    movw %cx, 0x10a802(%edx)
    shll $13, %esi
    movl $0, 0xd0003050(%esi)
1:  movw 0x10b002(%edx), %ax
    cmpw %cx, %ax
    jne 1b
    ret

answer:                         /* eight letters, the highest four bits first */
    movl 0x103000, %ebx
    movl $8, %ecx
    movl $0x3f8, %edx
1:  roll $4, %ebx
    movb %bl, %al
    andb $15, %al
    addb $97, %al
    outb %al, %dx
    decl %ecx
    jnz 1b
    movb $10, %al
    outb %al, %dx
    ret
family_guest_end:
    .code64
    .popsection
    "#,
    options(att_syntax)
);

/// The code that the assembler made.
fn code() -> &'static [u8] {
    unsafe extern "C" {
        static family_guest_begin: u8;
        static family_guest_end: u8;
    }
    // SAFETY: both are labels of one read-only section, the second behind the first.
    unsafe {
        let begin = &raw const family_guest_begin;
        std::slice::from_raw_parts(begin, (&raw const family_guest_end).offset_from_unsigned(begin))
    }
}

/// The guest as an ELF kernel with a PVH entry.
pub(crate) fn kernel() -> Vec<u8> {
    /// Offset of the image in the file.
    const OFFSET: usize = 0x1000;
    const NOTE: usize = 0x200;
    let mut elf = vec![0; OFFSET];
    let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    put(16, &[2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64
    put(24, &IMAGE.to_le_bytes());
    put(32, &64u64.to_le_bytes()); // program headers
    put(52, &[64, 0, 56, 0, 2, 0]);
    let headers = [(1u32, OFFSET, IMAGE, IMAGE_BYTES), (4, NOTE, 0, 20)];
    for (index, (kind, offset, address, bytes)) in headers.into_iter().enumerate() {
        let fields = [offset as u64, address, address, bytes as u64, bytes as u64, 4];
        put(64 + index * 56, &kind.to_le_bytes());
        put(68 + index * 56, &7u32.to_le_bytes());
        put(72 + index * 56, &fields.map(u64::to_le_bytes).concat());
    }
    // XEN_ELFNOTE_PHYS32_ENTRY
    put(NOTE, &[4u32, 4, 18].map(u32::to_le_bytes).concat());
    put(NOTE + 12, b"Xen\0");
    put(NOTE + 16, &(IMAGE as u32).to_le_bytes());
    elf.extend(image());
    elf
}

/// What is in memory when the guest begins: code, boot table, interrupt table, rings.
fn image() -> Vec<u8> {
    let mut image = vec![0; IMAGE_BYTES];
    let mut put = |at: u64, bytes: &[u8]| {
        let at = (at - IMAGE) as usize;
        image[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(IMAGE, code());
    let stores: Vec<u8> = stores().into_iter().flatten().flat_map(u32::to_le_bytes).collect();
    put(STORES, &stores);
    let gate = (HANDLER & 0xffff) | 0x10 << 16 | 0x8e00 << 32 | (HANDLER >> 16) << 48;
    put(INTERRUPT_TABLE + VECTOR * 8, &gate.to_le_bytes());
    put(TABLE_POINTER, &(VECTOR as u16 * 8 + 7).to_le_bytes());
    put(TABLE_POINTER + 2, &(INTERRUPT_TABLE as u32).to_le_bytes());
    let mut descriptor = |queue: &Queue, index: u64, address: u64, bytes: u32, flags: u16, next: u16| {
        let (address, bytes) = (address.to_le_bytes(), bytes.to_le_bytes());
        let whole = [&address[..], &bytes, &flags.to_le_bytes(), &next.to_le_bytes()].concat();
        put(queue.descriptors + index * 16, &whole);
    };
    // For the device to write.
    const WRITE: u16 = 2;
    const NEXT: u16 = 1;
    for index in 0..64 {
        descriptor(&QUEUES[0], index, RECEIVE_BUFFERS + index * 256, 256, WRITE, 0);
    }
    for index in 0..8 {
        descriptor(&QUEUES[2], index, EVENT_BUFFERS + index * 8, 8, WRITE, 0);
    }
    for queue in &QUEUES[3..] {
        descriptor(queue, 0, REQUEST[0], 16, NEXT, 1);
        descriptor(queue, 1, REQUEST[2], 512, NEXT, 2);
        descriptor(queue, 2, REQUEST[1], 1, WRITE, 0);
    }
    for queue in [&QUEUES[0], &QUEUES[2]] {
        let available = queue.descriptors + RING;
        put(available + 2, &(queue.size as u16).to_le_bytes());
        put(available + 4, &(0..queue.size as u16).flat_map(u16::to_le_bytes).collect::<Vec<_>>());
    }
    image
}

/// Interrupt routing, and the devices brought to DRIVER_OK (virtio 1.2, 3.1.1 and 4.2.2).
fn stores() -> Vec<[u32; 2]> {
    const LOCAL_APIC: u32 = 0xfee0_0000;
    const IO_APIC: u32 = 0xfec0_0000;
    /// The entry of the vsock device's line, which is number 5.
    const ENTRY: u32 = 0x10 + 2 * 5;
    let mut stores = vec![
        [LOCAL_APIC + 0xf0, 0x1ff],
        [IO_APIC, ENTRY + 1],
        [IO_APIC + 0x10, 0],
        [IO_APIC, ENTRY],
        [IO_APIC + 0x10, VECTOR as u32],
    ];
    // Discard and write zeroes, for the disks; version 1, for all.
    for (slot, low_features) in [(0, 0), (3, 1 << 13 | 1 << 14), (5, 1 << 13 | 1 << 14)] {
        let registers = 0xd000_0000 + slot * 0x1000;
        let mut set = |register: u32, value: u32| stores.push([registers + register, value]);
        set(0x70, 1);
        set(0x70, 3);
        set(0x24, 0);
        set(0x20, low_features);
        set(0x24, 1);
        set(0x20, 1);
        set(0x70, 0xb);
        for queue in QUEUES.iter().filter(|queue| queue.slot == u64::from(slot)) {
            set(0x30, queue.index);
            set(0x38, queue.size);
            for (register, ring) in [(0x80, 0), (0x90, RING), (0xa0, 2 * RING)] {
                set(register, (queue.descriptors + ring) as u32);
                set(register + 4, 0);
            }
            set(0x44, 1);
        }
        set(0x70, 0xf);
    }
    stores
}

/// What disk `number` holds before the first step.
pub(crate) fn disk_image(number: usize) -> Vec<u8> {
    let mut image = vec![0; 1 << 20];
    blake3::Hasher::new().update(format!("disk {number}").as_bytes()).finalize_xof().fill(&mut image);
    image
}

/// What memory and disks of a guest hold, as the seeds that it was given, newest last.
#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    seeds: Arc<Vec<u32>>,
}

/// The part of memory that steps write to, and the disks that they write to.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Content {
    pub(crate) window: Vec<u8>,
    pub(crate) disks: [Vec<u8>; 2],
}

impl Model {
    /// How many steps the guest has done.
    pub(crate) fn steps(&self) -> usize {
        self.seeds.len()
    }

    /// One more step.
    pub(crate) fn step(&mut self, seed: u32) {
        Arc::make_mut(&mut self.seeds).push(seed);
    }

    /// The guest as it was after `steps` steps.
    pub(crate) fn truncated(&self, steps: usize) -> Self {
        Self { seeds: self.seeds[..steps].to_vec().into() }
    }

    /// What the guest holds now.
    pub(crate) fn content(&self) -> Content {
        let disks = WRITTEN.map(|number| {
            let mut disk = disk_image(number);
            disk.resize(DISK_BYTES, 0);
            disk
        });
        let mut content = Content { window: vec![0; WINDOW_BYTES], disks };
        for &seed in self.seeds.iter() {
            content.step(seed);
        }
        content
    }
}

impl Content {
    fn step(&mut self, seed: u32) {
        let mut state = seed;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state
        };
        let writes = 8 + (next() & 15);
        for _ in 0..writes {
            match next() & 15 {
                0..10 => {
                    let at = (next() & 0xf_fffc) as usize;
                    self.window[at..at + 4].copy_from_slice(&next().to_le_bytes());
                }
                kind @ (10 | 11) => {
                    let at = (next() & 0xf_f000) as usize;
                    let word = if kind == 11 { next() } else { 0 };
                    fill(&mut self.window[at..at + PAGE], word);
                }
                12..15 => {
                    let random = next();
                    let at = (random & 0x3fff) as usize * SECTOR;
                    let word = next();
                    if let Some(sector) = self.disks[(random >> 14 & 1) as usize].get_mut(at..at + SECTOR) {
                        fill(sector, word);
                    }
                }
                _ => {
                    let random = next();
                    let first = (random >> 1 & 0x3fff) as usize;
                    let (first, count) = match random & 1 {
                        1 => (first, 1 + (next() & 31) as usize),
                        _ => (first & !7, 8 * (1 + (next() & 3) as usize)),
                    };
                    let disk = &mut self.disks[(random >> 15 & 1) as usize];
                    // A range that is not on the disk is refused as a whole.
                    if let Some(sectors) = disk.get_mut(first * SECTOR..(first + count) * SECTOR) {
                        sectors.fill(0);
                    }
                }
            }
        }
    }

    /// Where two contents differ, in words.
    pub(crate) fn difference(&self, expected: &Self) -> String {
        let [first, other] = &self.disks;
        let parts = [
            ("memory", WINDOW, &self.window, &expected.window),
            ("the first disk", 0, first, &expected.disks[0]),
            ("the other disk", 0, other, &expected.disks[1]),
        ];
        let differences = parts.into_iter().filter_map(|(what, start, found, expected)| {
            let differ = || (0..found.len()).filter(|&at| found[at] != expected[at]);
            let at = differ().next()?;
            let (here, there, count) = (found[at], expected[at], differ().count());
            let address = start + at as u64;
            Some(format!("{what} at {address:#x} holds {here:#x} instead of {there:#x}, {count} bytes differ in all"))
        });
        differences.collect::<Vec<_>>().join("; ")
    }
}

fn fill(bytes: &mut [u8], word: u32) {
    for chunk in bytes.chunks_exact_mut(4) {
        chunk.copy_from_slice(word.to_le_bytes().as_slice());
    }
}
