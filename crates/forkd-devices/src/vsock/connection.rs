//! One connection between a client on the unix socket and a port of the guest.
//!
//! ```text
//!   Greeting ──CONNECT line──► Requested ──guest RESPONSE──► Open ──► ends
//!      │ client goes away          │ guest RST, client goes away    │ see `Ending`
//!      ▼                           ▼                                ▼
//!   forgotten                  RST to the guest if it knew      SHUTDOWN or RST, then forgotten
//! ```
//!
//! The socket is watched edge-triggered, once; `readable` and `writable` remember the edges. Bytes to
//! the client go from guest memory straight into the socket; what the socket does not take waits in
//! `unsent`, which the credit given to the guest bounds. Bytes to the guest are read straight into
//! its buffers, never more than it has room for.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;

use rustix::event::epoll::EventFlags;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::parse::{GREETING_LIMIT, Operation, PacketHeader, ShutdownFlags, parse_connect};
use crate::guest_buffers::GuestBuffers;

/// Bytes that the guest may send ahead of what the client has taken.
pub(super) const BUFFER_SIZE: u32 = 256 << 10;

/// How far a connection has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// The client has not written its line yet.
    Greeting,
    /// The guest is to be asked, or has been.
    Requested { sent: bool },
    /// Bytes flow.
    Open,
}

/// What the owner of a connection does after a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub(super) enum Verdict {
    /// Goes on.
    Keep,
    /// The guest does not know it (any more): forget it.
    Forget,
    /// The guest must hear that it is over: forget it and send RST.
    Reset,
}

/// What a connection put into a receive buffer of the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Filled {
    /// A packet with this header and `header.len` bytes of data.
    Packet(Operation, PacketFields),
    /// Nothing, the buffer is still free.
    Nothing,
}

/// The header fields that only the connection knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct PacketFields {
    pub(super) len: u32,
    pub(super) flags: u32,
    pub(super) fwd_cnt: u32,
}

#[derive(Debug)]
pub(super) struct Connection {
    socket: OwnedFd,
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
    phase: Phase,

    readable: bool,
    writable: bool,
    /// The end of the client's stream was reported; no further edge announces it.
    end_reported: bool,
    /// The client closed its end, wholly.
    hung_up: bool,
    /// Nothing more comes from the client.
    client_ended: bool,
    /// The client takes no more: what the guest still sends is dropped.
    client_deaf: bool,

    /// From the guest, not yet taken by the socket.
    unsent: VecDeque<u8>,
    /// Bytes received from the guest, and bytes passed on, modulo 2³².
    received: u32,
    forwarded: u32,
    /// `forwarded` as the guest last heard it.
    forwarded_told: u32,

    /// The guest's receive buffer, as it told, and bytes sent to it, modulo 2³².
    guest_buffer: u32,
    guest_forwarded: u32,
    sent: u32,

    /// What the guest's SHUTDOWN packets have ended.
    guest_ended: ShutdownFlags,
    /// Of that, what the client has been shown.
    passed_on: ShutdownFlags,
    /// What our SHUTDOWN packets have ended.
    told_ended: ShutdownFlags,
    credit_wanted: bool,
    credit_asked: bool,
    /// Whether this connection is in its owner's list of those with something for the guest.
    pub(super) queued: bool,
}

impl Connection {
    pub(super) fn new(socket: OwnedFd, host_port: u32) -> Self {
        Self {
            socket,
            host_port,
            guest_port: 0,
            phase: Phase::Greeting,
            readable: false,
            writable: false,
            end_reported: false,
            hung_up: false,
            client_ended: false,
            client_deaf: false,
            unsent: VecDeque::new(),
            received: 0,
            forwarded: 0,
            forwarded_told: 0,
            guest_buffer: 0,
            guest_forwarded: 0,
            sent: 0,
            guest_ended: ShutdownFlags::default(),
            passed_on: ShutdownFlags::default(),
            told_ended: ShutdownFlags::default(),
            credit_wanted: false,
            credit_asked: false,
            queued: false,
        }
    }

    pub(super) fn is_greeting(&self) -> bool {
        self.phase == Phase::Greeting
    }

    /// Notes what epoll reported and does what needs no guest: reads the greeting, sends what waits.
    pub(super) fn host_event(&mut self, events: EventFlags) -> Verdict {
        self.readable |= events.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
        self.writable |= events.contains(EventFlags::OUT);
        self.hung_up |= events.intersects(EventFlags::HUP | EventFlags::ERR);
        self.end_reported |= self.hung_up || events.contains(EventFlags::RDHUP);
        // A guest that receives no more leaves nobody to notice the client's end by reading.
        self.client_ended |= self.hung_up && self.guest_ended.receive;
        match self.phase {
            Phase::Greeting => self.read_greeting(),
            Phase::Requested { sent } if self.hung_up => {
                if sent {
                    Verdict::Reset
                } else {
                    Verdict::Forget
                }
            }
            Phase::Requested { .. } => Verdict::Keep,
            Phase::Open => self.flush(),
        }
    }

    fn read_greeting(&mut self) -> Verdict {
        let mut line = [0; GREETING_LIMIT];
        let peeked = recv(&self.socket, &mut line, RecvFlags::PEEK | RecvFlags::DONTWAIT);
        let count = match peeked {
            Ok((_, count)) if count > 0 => count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.readable = false;
                return if self.hung_up { Verdict::Forget } else { Verdict::Keep };
            }
            _ => return Verdict::Forget,
        };
        let Some(newline) = line[..count].iter().position(|&byte| byte == b'\n') else {
            return if count == GREETING_LIMIT || self.hung_up { Verdict::Forget } else { Verdict::Keep };
        };
        let Some(port) = parse_connect(&line[..newline]) else { return Verdict::Forget };
        // What follows the line is data and stays in the socket.
        match recv(&self.socket, &mut line[..=newline], RecvFlags::DONTWAIT) {
            Ok((_, count)) if count == newline + 1 => {
                self.guest_port = port;
                self.phase = Phase::Requested { sent: false };
                Verdict::Keep
            }
            _ => Verdict::Forget,
        }
    }

    /// A packet of this connection from the guest, with its data.
    pub(super) fn guest_packet(
        &mut self,
        operation: Operation,
        header: &PacketHeader,
        data: GuestBuffers<'_>,
    ) -> Verdict {
        self.guest_buffer = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        if self.credit() > 0 {
            self.credit_asked = false;
        }
        match (operation, self.phase) {
            (Operation::Reset, _) => {
                // What the guest sent before it gave up is still the client's.
                let _ = self.flush();
                Verdict::Forget
            }
            (Operation::Response, Phase::Requested { sent: true }) => self.open(),
            (Operation::Data, Phase::Open) => self.take_data(data),
            (Operation::Shutdown, Phase::Open) => {
                let flags = ShutdownFlags::from_bits(header.flags);
                self.guest_ended.receive |= flags.receive;
                self.guest_ended.send |= flags.send;
                self.apply_guest_shutdown()
            }
            (Operation::CreditUpdate, Phase::Open) => Verdict::Keep,
            (Operation::CreditRequest, Phase::Open) => {
                self.credit_wanted = true;
                Verdict::Keep
            }
            _ => Verdict::Reset,
        }
    }

    fn open(&mut self) -> Verdict {
        let answer = format!("OK {}\n", self.host_port);
        match send(&self.socket, answer.as_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(count) if count == answer.len() => {
                self.phase = Phase::Open;
                Verdict::Keep
            }
            _ => Verdict::Reset,
        }
    }

    fn take_data(&mut self, mut data: GuestBuffers<'_>) -> Verdict {
        let len = data.len() as u32;
        let in_flight = self.received.wrapping_sub(self.forwarded);
        if self.guest_ended.send || len > BUFFER_SIZE - in_flight {
            return Verdict::Reset;
        }
        self.received = self.received.wrapping_add(len);
        if self.client_deaf {
            self.forwarded = self.received;
            return Verdict::Keep;
        }
        if self.unsent.is_empty() {
            match data.send(&self.socket) {
                Ok(count) => {
                    self.forwarded = self.forwarded.wrapping_add(count as u32);
                    let _ = data.split_front(count);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => self.drop_output(),
            }
        }
        if !data.is_empty() && !self.client_deaf {
            self.writable = false;
            let mut rest = Vec::new();
            data.append_to(&mut rest);
            self.unsent.extend(rest);
        }
        Verdict::Keep
    }

    /// Sends what waits, then ends what the guest has ended.
    fn flush(&mut self) -> Verdict {
        while self.writable && !self.unsent.is_empty() {
            let (front, _) = self.unsent.as_slices();
            match send(&self.socket, front, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => {
                    self.unsent.drain(..count);
                    self.forwarded = self.forwarded.wrapping_add(count as u32);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(_) => self.drop_output(),
            }
        }
        if self.unsent.is_empty() && self.unsent.capacity() > 4096 {
            self.unsent = VecDeque::new();
        }
        self.apply_guest_shutdown()
    }

    /// The client reads no more. It may have written something last, so reading goes on.
    fn drop_output(&mut self) {
        self.unsent = VecDeque::new();
        self.forwarded = self.received;
        self.client_deaf = true;
        self.hung_up = true;
        self.end_reported = true;
        self.readable = true;
    }

    fn apply_guest_shutdown(&mut self) -> Verdict {
        if self.phase != Phase::Open || !self.unsent.is_empty() {
            return Verdict::Keep;
        }
        if self.guest_ended.is_both() {
            // The guest closed and waits for the answer that Linux gives too.
            return Verdict::Reset;
        }
        // Once each: every call makes an edge, which leads here again. A peer that is gone is no error.
        if self.guest_ended.send && !self.passed_on.send {
            let _ = shutdown(&self.socket, Shutdown::Write);
        }
        if self.guest_ended.receive && !self.passed_on.receive {
            let _ = shutdown(&self.socket, Shutdown::Read);
        }
        self.passed_on = self.guest_ended;
        Verdict::Keep
    }

    /// Whether there is something to tell or send to the guest.
    pub(super) fn wants_buffer(&self) -> bool {
        match self.phase {
            Phase::Greeting => false,
            Phase::Requested { sent } => !sent,
            Phase::Open => {
                self.credit_wanted
                    || self.credit_update_due()
                    || self.shutdown_due().is_some()
                    || self.readable && !self.client_ended && !self.guest_ended.receive && self.may_send_or_ask()
            }
        }
    }

    /// Puts the next packet's data into `data` and says what its header must be.
    pub(super) fn fill(&mut self, data: &mut GuestBuffers<'_>) -> Filled {
        match self.phase {
            Phase::Greeting => Filled::Nothing,
            Phase::Requested { sent: true } => Filled::Nothing,
            Phase::Requested { sent: false } => {
                self.phase = Phase::Requested { sent: true };
                self.packet(Operation::Request, 0, 0)
            }
            Phase::Open => self.fill_open(data),
        }
    }

    fn fill_open(&mut self, data: &mut GuestBuffers<'_>) -> Filled {
        if self.credit_wanted {
            return self.packet(Operation::CreditUpdate, 0, 0);
        }
        if self.readable && !self.client_ended && !self.guest_ended.receive {
            let credit = self.credit() as usize;
            if credit == 0 {
                if !self.credit_asked {
                    self.credit_asked = true;
                    return self.packet(Operation::CreditRequest, 0, 0);
                }
            } else if let Some(len) = self.read_client(data.split_front(credit)) {
                self.sent = self.sent.wrapping_add(len);
                return self.packet(Operation::Data, len, 0);
            }
        }
        if let Some(flags) = self.shutdown_due() {
            self.told_ended = flags;
            return self.packet(Operation::Shutdown, 0, flags.bits());
        }
        if self.credit_update_due() {
            return self.packet(Operation::CreditUpdate, 0, 0);
        }
        Filled::Nothing
    }

    /// Reads from the client into `room`; `None` when nothing is there.
    fn read_client(&mut self, room: GuestBuffers<'_>) -> Option<u32> {
        match room.receive(&self.socket) {
            Ok(0) => {
                self.client_ended = true;
                self.readable = false;
                None
            }
            Ok(count) => {
                // Less than asked for means empty, and the next byte makes a new edge; but the end of
                // the stream has no second one.
                self.readable = count == room.len() || self.end_reported;
                Some(count as u32)
            }
            Err(error) if is_transient(&error) => {
                self.readable = false;
                None
            }
            Err(_) => {
                self.client_ended = true;
                self.hung_up = true;
                self.readable = false;
                None
            }
        }
    }

    /// The SHUTDOWN that the guest has not heard yet.
    fn shutdown_due(&self) -> Option<ShutdownFlags> {
        let flags = ShutdownFlags { send: self.client_ended, receive: self.client_ended && self.hung_up };
        (flags != self.told_ended).then_some(flags)
    }

    /// Whether the guest has been told that both directions are over; it needs no more of us.
    pub(super) fn is_over(&self) -> bool {
        self.told_ended.is_both()
    }

    /// How many bytes the guest has room for.
    fn credit(&self) -> u32 {
        self.guest_buffer.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    fn may_send_or_ask(&self) -> bool {
        self.credit() > 0 || !self.credit_asked
    }

    /// The guest believes that more than half of the buffer is full, and is wrong.
    fn credit_update_due(&self) -> bool {
        let believed_full = self.received.wrapping_sub(self.forwarded_told);
        self.forwarded != self.forwarded_told && believed_full > BUFFER_SIZE / 2
    }

    fn packet(&mut self, operation: Operation, len: u32, flags: u32) -> Filled {
        self.credit_wanted = false;
        self.forwarded_told = self.forwarded;
        Filled::Packet(operation, PacketFields { len, flags, fwd_cnt: self.forwarded })
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
