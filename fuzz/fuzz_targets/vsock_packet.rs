//! Packets from a guest, in every order: a running vsock device, two clients on its socket, and a
//! guest that follows no protocol. The device must live and hold no more than it promises.
//!
//! Input: steps of one byte each with operands behind.
#![no_main]

use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use forkd_devices::vsock::{HEADER_LEN, PacketHeader, Vsock, parse_connect};
use forkd_devices::{GuestMemory, InterruptLine, MmioTransport};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

const MEMORY: usize = 0x4_0000;
const CID: u64 = 3;
const QUEUE_SIZE: u16 = 16;
const FIRST_HOST_PORT: u32 = 1 << 30;
const TRANSMIT_AT: u64 = 0x2_0000;
const RECEIVE_AT: u64 = 0x1_0000;

struct NoInterrupts;

impl InterruptLine for NoInterrupts {
    fn trigger(&self) {}
}

/// The guest's side: three queues at 0, 0x1000 and 0x2000.
struct Guest {
    memory: GuestMemory,
    transport: MmioTransport,
    available: [u16; 3],
}

impl Guest {
    fn start(listener: UnixListener) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("256 KiB of memory");
        let device = Vsock::new(CID, listener.into()).expect("descriptors");
        let transport = MmioTransport::new(Box::new(device), memory.clone(), Arc::new(NoInterrupts));
        let write = |register: u64, value: u32| transport.write(register, &value.to_le_bytes());
        for (register, value) in [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11)] {
            write(register, value);
        }
        for queue in 0..3 {
            let base = queue * 0x1000 + 0x1000;
            for (register, value) in [
                (0x30, queue),
                (0x38, QUEUE_SIZE.into()),
                (0x80, base),
                (0x90, base + 0x400),
                (0xa0, base + 0x800),
                (0x44, 1),
            ] {
                write(register, value);
            }
        }
        write(0x70, 15);
        Self { memory, transport, available: [0; 3] }
    }

    /// Offers one buffer and lets the device look.
    fn offer(&mut self, queue: u16, address: u64, len: u32, writable: bool) {
        let index = usize::from(queue);
        let base = u64::from(queue) * 0x1000 + 0x1000;
        let slot = self.available[index] % QUEUE_SIZE;
        let descriptor = GuestAddress(base + 16 * u64::from(slot));
        let flags = u16::from(writable) << 1;
        self.memory.write_obj(address, descriptor).expect("in memory");
        self.memory.write_obj(len, GuestAddress(descriptor.0 + 8)).expect("in memory");
        self.memory.write_obj(flags, GuestAddress(descriptor.0 + 12)).expect("in memory");
        self.memory.write_obj(slot, GuestAddress(base + 0x404 + 2 * u64::from(slot))).expect("in memory");
        self.available[index] = self.available[index].wrapping_add(1);
        self.memory.write_obj(self.available[index], GuestAddress(base + 0x402)).expect("in memory");
        self.transport.process_queue(queue);
    }

    fn send(&mut self, header: &PacketHeader, data_len: u32) {
        self.memory.write_slice(&header.encode(), GuestAddress(TRANSMIT_AT)).expect("in memory");
        self.offer(1, TRANSMIT_AT, HEADER_LEN as u32 + data_len, false);
    }
}

fuzz_target!(|input: &[u8]| {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let _ = parse_connect(input);
    let name = format!("forkd-fuzz-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let address = SocketAddr::from_abstract_name(name).expect("a short name");
    let listener = UnixListener::bind_addr(&address).expect("the name is free");
    let mut guest = Guest::start(listener);
    let mut clients: Vec<UnixStream> = Vec::new();
    let mut steps = input.iter().copied();
    while let Some(step) = steps.next() {
        let mut operand = || steps.next().unwrap_or(0);
        match step % 8 {
            0 if clients.len() < 4 => {
                let mut client = UnixStream::connect_addr(&address).expect("the device listens");
                client.set_nonblocking(true).expect("a socket");
                let _ = client.write_all(format!("CONNECT {}\n", operand()).as_bytes());
                clients.push(client);
            }
            0 => drop(clients.remove(usize::from(operand()) % clients.len())),
            1 => guest.transport.process_host_event(),
            2 => guest.offer(0, RECEIVE_AT, u32::from(operand()) * 16, true),
            3 => {
                if let Some(client) = clients.first_mut() {
                    let _ = client.write_all(&vec![7; usize::from(operand()) * 64]);
                }
            }
            4 => {
                for client in &mut clients {
                    let _ = client.read(&mut [0; 70_000]);
                }
            }
            5 => {
                if let Some(client) = clients.last() {
                    let _ = client.shutdown(if operand() % 2 == 0 {
                        std::net::Shutdown::Write
                    } else {
                        std::net::Shutdown::Both
                    });
                }
            }
            _ => {
                let data_len = u32::from(operand()) * 300;
                let header = PacketHeader {
                    src_cid: CID,
                    dst_cid: 2,
                    src_port: operand().into(),
                    dst_port: FIRST_HOST_PORT + u32::from(operand() % 8),
                    len: if operand() % 16 == 0 { u32::MAX } else { data_len },
                    socket_type: u16::from(operand() % 16 != 0),
                    operation: (operand() % 9).into(),
                    flags: (operand() % 4).into(),
                    buf_alloc: u32::from(operand()) << 8,
                    fwd_cnt: u32::from(operand()) << (operand() % 32),
                };
                guest.send(&header, data_len);
            }
        }
    }
    let _ = guest.transport.save();
    guest.transport.write(0x70, &[0; 4]);
    guest.transport.process_host_event();
});
