//! All connections of one device, and the descriptors they are watched by.
//!
//! Everything that waits to be told to the guest is either a connection in `ready` (at most once) or
//! a refusal in `resets` (bounded: packets from the guest are not taken while it is full). So what a
//! guest can make this process hold is bounded by the number of connections, which clients decide.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::net::{SocketFlags, accept_with};

use super::connection::{BUFFER_SIZE, Connection, Filled, PacketFields, Verdict};
use super::parse::{HEADER_LEN, HOST_CID, Operation, PacketHeader, TYPE_STREAM};
use crate::guest_buffers::GuestBuffers;
use crate::queue::Chain;
use crate::requeue::{DescriptorError, Requeue};

/// More clients wait in the listener's backlog.
const MOST_CONNECTIONS: usize = 1024;
/// Refusals that may wait for a buffer of the guest.
const MOST_RESETS: usize = 256;
/// Events taken per call; the rest makes the descriptor readable again.
const EVENTS_PER_CALL: usize = 64;
/// Host ports are taken from here upwards, in a circle; guests use low ones for services.
pub(super) const FIRST_HOST_PORT: u32 = 1 << 30;
const LAST_HOST_PORT: u32 = (1 << 31) - 1;

/// epoll tokens that are not host ports.
const LISTENER: u64 = u64::MAX;
const REQUEUE: u64 = u64::MAX - 1;

/// The owner of the connections.
pub(super) struct Muxer {
    guest_cid: u64,
    epoll: OwnedFd,
    listener: OwnedFd,
    /// Whether the listener is watched; not while there is no room for a connection.
    listening: bool,
    requeue: Requeue,
    connections: BTreeMap<u32, Connection>,
    ready: VecDeque<u32>,
    resets: VecDeque<Reset>,
    pub(super) next_host_port: u32,
}

/// A refusal to send.
struct Reset {
    host_port: u32,
    guest_port: u32,
}

impl Muxer {
    pub(super) fn new(guest_cid: u64, listener: OwnedFd, next_host_port: u32) -> Result<Self, DescriptorError> {
        let failed = |action| move |error: io::Error| DescriptorError { device: "vsock", action, source: error };
        rustix::io::ioctl_fionbio(&listener, true)
            .map_err(|error| failed("making the listening socket non-blocking")(error.into()))?;
        let epoll =
            epoll::create(CreateFlags::CLOEXEC).map_err(|error| failed("creating the event queue")(error.into()))?;
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), EventFlags::IN)
            .map_err(|error| failed("watching the listening socket")(error.into()))?;
        let requeue = Requeue::new();
        if let Some(fd) = requeue.fd() {
            epoll::add(&epoll, fd, EventData::new_u64(REQUEUE), EventFlags::IN)
                .map_err(|error| failed("watching for left-over work")(error.into()))?;
        }
        Ok(Self {
            guest_cid,
            epoll,
            listener,
            listening: true,
            requeue,
            connections: BTreeMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_host_port: next_host_port.clamp(FIRST_HOST_PORT, LAST_HOST_PORT),
        })
    }

    pub(super) fn raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Closes every connection that the guest may know of, on the host's side only.
    pub(super) fn clear(&mut self) {
        self.connections.retain(|_, connection| connection.is_greeting());
        self.ready.clear();
        self.resets.clear();
        self.resume_listening();
    }

    /// Whether a packet from the guest can be taken without holding more than the bound.
    pub(super) fn takes_packets(&self) -> bool {
        self.resets.len() < MOST_RESETS
    }

    /// Asks to be called again; false if the work must be done now.
    #[must_use]
    pub(super) fn request_call(&mut self) -> bool {
        self.requeue.request()
    }

    /// Takes host events, among them the request to go on with left-over work. Clients whose greeting
    /// is complete are turned away unless `driver_runs`.
    pub(super) fn host_events(&mut self, driver_runs: bool) {
        const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
        let empty = epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) };
        let mut events = [empty; EVENTS_PER_CALL];
        // An error here (only EINTR is possible) leaves the descriptor readable.
        let count = epoll::wait(&self.epoll, &mut events[..], Some(&NOW)).unwrap_or(0);
        for event in &events[..count] {
            match event.data.u64() {
                LISTENER => self.accept(),
                REQUEUE => {
                    self.requeue.take();
                }
                token => self.connection_event(token as u32, event.flags, driver_runs),
            }
        }
    }

    fn accept(&mut self) {
        while self.connections.len() < MOST_CONNECTIONS {
            let socket = match accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => socket,
                Err(rustix::io::Errno::AGAIN) => return,
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => continue,
                // Out of descriptors or memory: wait until a connection ends.
                Err(_) => break,
            };
            let host_port = self.free_host_port();
            let interest = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
            if epoll::add(&self.epoll, &socket, EventData::new_u64(host_port.into()), interest).is_ok() {
                self.connections.insert(host_port, Connection::new(socket, host_port));
            }
        }
        self.listening =
            epoll::modify(&self.epoll, &self.listener, EventData::new_u64(LISTENER), EventFlags::empty()).is_err();
    }

    fn resume_listening(&mut self) {
        if !self.listening {
            let interest = epoll::modify(&self.epoll, &self.listener, EventData::new_u64(LISTENER), EventFlags::IN);
            self.listening = interest.is_ok();
        }
    }

    fn free_host_port(&mut self) -> u32 {
        loop {
            let port = self.next_host_port;
            self.next_host_port = if port == LAST_HOST_PORT { FIRST_HOST_PORT } else { port + 1 };
            if !self.connections.contains_key(&port) {
                return port;
            }
        }
    }

    fn connection_event(&mut self, host_port: u32, events: EventFlags, driver_runs: bool) {
        let Some(connection) = self.connections.get_mut(&host_port) else { return };
        let verdict = match connection.host_event(events) {
            Verdict::Keep if !driver_runs && !connection.is_greeting() => Verdict::Forget,
            verdict => verdict,
        };
        self.settle(host_port, verdict);
    }

    fn settle(&mut self, host_port: u32, verdict: Verdict) {
        match verdict {
            Verdict::Keep => self.note_ready(host_port),
            Verdict::Forget => {
                self.forget(host_port);
            }
            Verdict::Reset => {
                if let Some(guest_port) = self.forget(host_port) {
                    self.resets.push_back(Reset { host_port, guest_port });
                }
            }
        }
    }

    fn note_ready(&mut self, host_port: u32) {
        if let Some(connection) = self.connections.get_mut(&host_port)
            && !connection.queued
            && connection.wants_buffer()
        {
            connection.queued = true;
            self.ready.push_back(host_port);
        }
    }

    /// Closes the client's socket, which also ends its watch.
    fn forget(&mut self, host_port: u32) -> Option<u32> {
        let connection = self.connections.remove(&host_port)?;
        self.resume_listening();
        Some(connection.guest_port)
    }

    /// One packet from the guest.
    pub(super) fn guest_packet(&mut self, mut chain: Chain<'_>) {
        let mut bytes = [0; HEADER_LEN];
        if chain.readable.split_front(HEADER_LEN).copy_to(&mut bytes) != HEADER_LEN {
            return;
        }
        let header = PacketHeader::decode(&bytes);
        // A packet to another host, or under another name, has no one to answer to.
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return;
        }
        let (host_port, guest_port) = (header.dst_port, header.src_port);
        let operation = Operation::from_number(header.operation).filter(|_| header.socket_type == TYPE_STREAM);
        let data = chain.readable.split_front(header.len as usize);
        let whole = data.len() == header.len as usize;
        let connection = self.connections.get_mut(&host_port).filter(|connection| connection.guest_port == guest_port);
        let verdict = match (connection, operation) {
            (Some(connection), Some(operation)) if whole => connection.guest_packet(operation, &header, data),
            (Some(_), _) => Verdict::Reset,
            (None, Some(Operation::Reset)) => return,
            (None, _) => {
                self.resets.push_back(Reset { host_port, guest_port });
                return;
            }
        };
        self.settle(host_port, verdict);
    }

    /// Whether something waits for a buffer of the guest.
    pub(super) fn has_output(&self, requests_held: bool) -> bool {
        !self.resets.is_empty() || !requests_held && !self.ready.is_empty()
    }

    /// Fills a receive buffer; the number of bytes written, or `None` if nothing was to be said after
    /// all.
    pub(super) fn fill(&mut self, chain: &Chain<'_>, requests_held: bool) -> Option<u32> {
        let mut data = chain.writable.clone();
        let space = data.split_front(HEADER_LEN);
        if let Some(reset) = self.resets.pop_front() {
            self.write_header(&space, reset.host_port, reset.guest_port, Operation::Reset, PacketFields::default());
            return Some(HEADER_LEN as u32);
        }
        while !requests_held && let Some(host_port) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&host_port) else { continue };
            connection.queued = false;
            let filled = connection.fill(&mut data);
            let guest_port = connection.guest_port;
            let over = connection.is_over();
            if let Filled::Packet(operation, fields) = filled {
                self.write_header(&space, host_port, guest_port, operation, fields);
                self.settle(host_port, if over { Verdict::Forget } else { Verdict::Keep });
                return Some(HEADER_LEN as u32 + fields.len);
            }
        }
        None
    }

    fn write_header(
        &self,
        space: &GuestBuffers<'_>,
        host_port: u32,
        guest_port: u32,
        operation: Operation,
        fields: PacketFields,
    ) {
        let header = PacketHeader {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: host_port,
            dst_port: guest_port,
            len: fields.len,
            socket_type: TYPE_STREAM,
            operation: operation as u16,
            flags: fields.flags,
            buf_alloc: BUFFER_SIZE,
            fwd_cnt: fields.fwd_cnt,
        };
        space.copy_from(&header.encode());
    }
}
