//! Real unix sockets on one side, a small guest-side vsock over real queues on the other.
#![allow(clippy::unwrap_used)]

mod copies;
mod credit;
mod streams;

use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::{HEADER_LEN, Operation, PacketHeader, Vsock};
use crate::DeviceState;
use crate::test_driver::Driver;

const CID: u64 = 3;
const PORT: u32 = 1024;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;
const RECEIVE_AT: u64 = 0x20_0000;
const RECEIVE_LEN: u32 = 4096;
const TRANSMIT_AT: u64 = 0x40_0000;
const EVENTS_AT: u64 = 0x60_0000;

struct Guest {
    driver: Driver,
    directory: tempfile::TempDir,
    /// Receive buffers by the head of their chain.
    buffers: BTreeMap<u16, u64>,
    events: BTreeMap<u16, u64>,
    inbox: VecDeque<(PacketHeader, Vec<u8>)>,
    forwarded: BTreeMap<u32, u32>,
    buf_alloc: u32,
}

fn listener(directory: &tempfile::TempDir) -> UnixListener {
    UnixListener::bind(directory.path().join("vsock")).unwrap()
}

impl Guest {
    fn start(mask: u64) -> Self {
        let mut guest = Self::probe();
        guest.driver.set_up(mask);
        guest.post_buffers();
        guest
    }

    fn probe() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let device = Vsock::new(CID, listener(&directory).into()).unwrap();
        Self {
            driver: Driver::probe(Box::new(device)),
            directory,
            buffers: BTreeMap::new(),
            events: BTreeMap::new(),
            inbox: VecDeque::new(),
            forwarded: BTreeMap::new(),
            buf_alloc: 1 << 18,
        }
    }

    fn post_buffers(&mut self) {
        self.post_receive(64);
        for index in 0..8 {
            let address = EVENTS_AT + 8 * index;
            let head = self.driver.add(EVENT, &[(address, 4, true)]);
            self.events.insert(head, address);
        }
        self.driver.kick(EVENT);
    }

    fn post_receive(&mut self, count: u64) {
        for index in 0..count {
            let address = RECEIVE_AT + u64::from(RECEIVE_LEN) * index;
            let head = self.driver.add(RECEIVE, &[(address, RECEIVE_LEN, true)]);
            self.buffers.insert(head, address);
        }
        self.driver.kick(RECEIVE);
    }

    /// A machine that was forked from this one, with a socket of its own.
    fn copy(&self) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = listener(&directory);
        let driver = self
            .driver
            .copy(|state| {
                let DeviceState::Vsock(state) = state else { panic!("a vsock device saved {state:?}") };
                Box::new(Vsock::restore(state, CID, socket.into()).unwrap())
            })
            .unwrap();
        Self {
            driver,
            directory,
            buffers: self.buffers.clone(),
            events: self.events.clone(),
            inbox: self.inbox.clone(),
            forwarded: BTreeMap::new(),
            buf_alloc: self.buf_alloc,
        }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("vsock")
    }

    /// A client that asked for a port.
    fn client(&self, port: u32) -> UnixStream {
        let mut client = UnixStream::connect(self.path()).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        client.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        client
    }

    /// Runs the event loop until it has nothing to do, and takes what arrived for the guest.
    fn turn(&mut self) {
        loop {
            let busy = self.driver.poll();
            if !self.take_packets() && !busy {
                return;
            }
        }
    }

    /// Takes packets out of used receive buffers and posts the buffers again.
    fn take_packets(&mut self) -> bool {
        let used = self.driver.take_used(RECEIVE);
        // All are taken before the first is posted again: heads are used again, too.
        let filled: Vec<_> = used.iter().map(|(head, len)| (self.buffers.remove(head).unwrap(), *len)).collect();
        for (address, len) in filled {
            let mut bytes = vec![0; len as usize];
            self.driver.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
            let header = PacketHeader::decode(bytes[..HEADER_LEN].try_into().unwrap());
            assert_eq!((header.src_cid, header.dst_cid, header.socket_type), (2, CID, 1));
            assert_eq!(header.len as usize, bytes.len() - HEADER_LEN);
            self.inbox.push_back((header, bytes[HEADER_LEN..].to_vec()));
            let head = self.driver.add(RECEIVE, &[(address, RECEIVE_LEN, true)]);
            self.buffers.insert(head, address);
        }
        if !used.is_empty() {
            self.driver.kick(RECEIVE);
        }
        !used.is_empty()
    }

    fn next_packet(&mut self) -> (PacketHeader, Vec<u8>) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(packet) = self.inbox.pop_front() {
                return packet;
            }
            assert!(Instant::now() < deadline, "no packet arrived");
            self.turn();
        }
    }

    fn expect(&mut self, operation: Operation) -> PacketHeader {
        let (header, _) = self.next_packet();
        assert_eq!(header.operation, operation as u16, "{header:?}");
        header
    }

    fn assert_quiet(&mut self) {
        self.turn();
        assert!(self.inbox.is_empty(), "{:?}", self.inbox.front());
    }

    /// Queues a packet of `connection` (a header that came from the host) without kicking.
    fn queue(&mut self, to: &PacketHeader, operation: Operation, flags: u32, data: &[u8]) {
        let header = PacketHeader {
            src_cid: CID,
            dst_cid: 2,
            src_port: to.dst_port,
            dst_port: to.src_port,
            len: data.len() as u32,
            socket_type: 1,
            operation: operation as u16,
            flags,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.forwarded.get(&to.src_port).copied().unwrap_or(0),
        };
        self.queue_raw(&header.encode(), data);
    }

    fn queue_raw(&mut self, header: &[u8], data: &[u8]) {
        self.driver.memory.write_slice(header, GuestAddress(TRANSMIT_AT)).unwrap();
        self.driver.memory.write_slice(data, GuestAddress(TRANSMIT_AT + 0x100)).unwrap();
        let mut pieces = vec![(TRANSMIT_AT, header.len() as u32, false)];
        // As Linux does for data that is not in one piece.
        let half = data.len() / 2;
        for (from, to) in [(0, half), (half, data.len())] {
            if from < to {
                pieces.push((TRANSMIT_AT + 0x100 + from as u64, (to - from) as u32, false));
            }
        }
        self.driver.add(TRANSMIT, &pieces);
    }

    fn send(&mut self, to: &PacketHeader, operation: Operation, flags: u32, data: &[u8]) {
        self.queue(to, operation, flags, data);
        self.driver.kick(TRANSMIT);
        self.driver.take_used(TRANSMIT);
    }

    /// A connection that the guest accepted.
    fn connect(&mut self) -> (UnixStream, PacketHeader) {
        let mut client = self.client(PORT);
        let request = self.expect(Operation::Request);
        assert_eq!(request.dst_port, PORT);
        self.send(&request, Operation::Response, 0, b"");
        assert_eq!(read_line(&mut client), format!("OK {}\n", request.src_port));
        (client, request)
    }

    /// The reset events that were delivered; their buffers are given back only by `handle_event`.
    fn delivered_events(&mut self) -> Vec<u64> {
        let used = self.driver.take_used(EVENT);
        used.into_iter()
            .map(|(head, len)| {
                assert_eq!(len, 4);
                self.events.remove(&head).unwrap()
            })
            .collect()
    }

    /// Gives an event buffer back, as Linux does once it has handled the event.
    fn handle_event(&mut self, address: u64) {
        assert_eq!(self.driver.memory.read_obj::<u32>(GuestAddress(address)).unwrap(), 0, "not a reset event");
        let head = self.driver.add(EVENT, &[(address, 4, true)]);
        self.events.insert(head, address);
        self.driver.kick(EVENT);
    }
}

fn read_line(client: &mut UnixStream) -> String {
    let mut line = String::new();
    let mut byte = [0];
    while !line.ends_with('\n') && client.read(&mut byte).unwrap() == 1 {
        line.push(byte[0].into());
    }
    line
}

fn read_to_end(client: &mut UnixStream) -> Vec<u8> {
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    rest
}
