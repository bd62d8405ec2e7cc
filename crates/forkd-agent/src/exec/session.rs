//! Carries the streams of one running program between it and its client.
//!
//! One thread, one poll loop, all descriptors non-blocking, so that a slow client, a program that
//! does not read, and time limits never wait for each other:
//!
//! ```text
//!            Stdin frames, ExecControl            ┌─ pending_input (≤ INPUT_LIMIT) ─► program's input
//! client ───────────────────────────► frames ─────┤
//!        ◄── pending_output (≤ one chunk each) ───┴──────────────────────── stdout, stderr or terminal
//!
//! Running ──process ends──► Draining(until) ──streams end, or grace over and pipes empty──► Exited sent
//!    │ └──time limit: SIGKILL to the group──► Running
//!    └────client gone: SIGKILL to the group, or (detach, copy) streams to the discarder──► over
//! ```
//!
//! A copy of a machine wakes up with its connections reset while its programs are in the middle of
//! something. They go on: a connection that was reset rather than closed is no sign of a client that
//! went away if the machine takes on another identity just then.
//!
//! Backpressure is the absence of reading: output is read only when the client has taken what was
//! read before; input is received only while little of it waits for the program.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use forkd_proto::agent::{Exec, ExecControl, Exited, Response};
use forkd_proto::frame::{Frame, FrameError, HEADER_LEN, Header, Kind};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::Signal;

use super::discard;
use super::frame_buffer::FrameBuffer;
use crate::agent::Agent;
use crate::connection::Connection;
use crate::identity;
use crate::reaper::ExitWatch;
use crate::spawn::{self, Ends};

/// How long output may stay open after the program itself has ended.
const GRACE: Duration = Duration::from_millis(250);
/// Bytes read from the program at once.
const CHUNK: usize = 128 << 10;
/// Input that may wait for the program before no more is received.
const INPUT_LIMIT: usize = 1 << 20;
/// What a terminal takes as end of input.
const END_OF_TRANSMISSION: u8 = 4;

pub(super) struct Session<'a> {
    connection: Connection,
    watch: ExitWatch,
    agent: &'a Agent,
    /// Identities taken on before the program started.
    identities: u64,
    detach: bool,
    deadline: Option<Instant>,
    timed_out: bool,
    /// Set when the program has ended: output is awaited until then.
    draining_until: Option<Instant>,

    received: FrameBuffer,
    client_gone: bool,
    /// It did not close its connection; the connection broke.
    client_reset: bool,
    pending_output: VecDeque<u8>,

    input: Option<OwnedFd>,
    pending_input: VecDeque<u8>,
    end_input: bool,
    terminal: Option<OwnedFd>,
    outputs: [Option<(Kind, OwnedFd)>; 2],
    chunk: Box<[u8]>,
}

impl<'a> Session<'a> {
    pub(super) fn new(connection: Connection, watch: ExitWatch, ends: Ends, request: &Exec, agent: &'a Agent) -> Self {
        let deadline = request.timeout_ms.and_then(|limit| Instant::now().checked_add(Duration::from_millis(limit)));
        for end in [&ends.input, &ends.output, &ends.errors].into_iter().flatten() {
            // Pipes and terminals both know the request.
            let _ = rustix::io::ioctl_fionbio(end, true);
        }
        for pipe in [&ends.output, &ends.errors].into_iter().flatten() {
            // Fewer switches between writer and reader; refused for terminals, and then of no matter.
            let _ = rustix::pipe::fcntl_setpipe_size(pipe, 256 << 10);
        }
        // Input to a terminal whose client sends none is only closed with the terminal.
        Self {
            deadline,
            connection,
            watch,
            agent,
            identities: agent.identity.count(),
            detach: request.detach,
            timed_out: false,
            draining_until: None,
            received: FrameBuffer::default(),
            client_gone: false,
            client_reset: false,
            pending_output: VecDeque::new(),
            input: ends.input,
            pending_input: VecDeque::new(),
            end_input: false,
            terminal: ends.terminal,
            outputs: [ends.output.map(|fd| (Kind::Stdout, fd)), ends.errors.map(|fd| (Kind::Stderr, fd))],
            chunk: vec![0; CHUNK].into_boxed_slice(),
        }
    }

    /// Runs until the program has ended and the client was told, or the client is gone.
    pub(super) fn run(mut self) -> Result<(), FrameError> {
        self.connection.set_nonblocking(true)?;
        self.queue_response(&Response::Started { pid: self.watch.pid().as_raw_pid() as u32 })?;
        loop {
            // Looked at once per turn: what is decided on it and what is waited for must agree.
            let code = self.watch.code();
            self.enforce_deadline(code.is_some());
            if let Some(code) = code
                && self.output_is_over()
            {
                // A detached program's background processes may go on writing.
                self.discard_outputs();
                self.queue_response(&Response::Exited(Exited { code: code.0, timed_out: self.timed_out }))?;
                return self.finish();
            }
            self.turn(code.is_some())?;
            if self.client_gone {
                self.abandon();
                return Ok(());
            }
        }
    }

    fn enforce_deadline(&mut self, ended: bool) {
        let now = Instant::now();
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            self.deadline = None;
            self.timed_out = self.watch.signal_group(Signal::KILL);
        }
        if self.draining_until.is_none() && ended {
            self.draining_until = Some(now + GRACE);
        }
    }

    /// Whether all that the program wrote has been delivered.
    fn output_is_over(&mut self) -> bool {
        if self.pending_output.is_empty() && self.outputs.iter().all(Option::is_none) {
            return true;
        }
        // After the grace, what the pipes hold at that moment is still the program's; one read each,
        // and they hold at most two chunks.
        let over = self.draining_until.is_some_and(|until| until <= Instant::now()) && self.pending_output.is_empty();
        if over {
            for _ in 0..2 {
                for index in 0..self.outputs.len() {
                    self.read_output(index);
                }
            }
        }
        over
    }

    /// Waits until something can be done, and does it.
    fn turn(&mut self, ended: bool) -> Result<(), FrameError> {
        let want_input = self.pending_input.len() < INPUT_LIMIT;
        let want_output = self.pending_output.is_empty();
        let mut fds = Vec::with_capacity(5);
        let mut client = PollFlags::RDHUP;
        client.set(PollFlags::IN, want_input);
        client.set(PollFlags::OUT, !want_output);
        fds.push(PollFd::new(&self.connection, client));
        if !ended {
            fds.push(PollFd::new(&self.watch, PollFlags::IN));
        }
        let mut output_at = [None; 2];
        for (index, output) in self.outputs.iter().enumerate().filter(|_| want_output) {
            if let Some((_, fd)) = output {
                fds.push(PollFd::new(fd, PollFlags::IN));
                output_at[index] = Some(fds.len() - 1);
            }
        }
        let input_at = self.input.as_ref().filter(|_| !self.pending_input.is_empty()).map(|fd| {
            fds.push(PollFd::new(fd, PollFlags::OUT));
            fds.len() - 1
        });
        let until = [self.deadline, self.draining_until.filter(|_| want_output)].into_iter().flatten().min();
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        match poll(&mut fds, left.and_then(|left| left.try_into().ok()).as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(()),
            Err(error) => return Err(io::Error::from(error).into()),
        }
        let ready: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        drop(fds);

        let client = ready[0];
        if client.intersects(PollFlags::IN) {
            self.receive()?;
        } else if client.intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR) {
            self.client_gone = true;
            self.client_reset = client.intersects(PollFlags::ERR);
        }
        if input_at.is_some_and(|at| !ready[at].is_empty()) || self.end_input {
            self.write_input();
        }
        for (index, at) in output_at.into_iter().enumerate() {
            if at.is_some_and(|at| !ready[at].is_empty()) {
                self.read_output(index);
            }
        }
        self.flush();
        Ok(())
    }

    /// Takes what the client sent.
    fn receive(&mut self) -> Result<(), FrameError> {
        match (&self.connection).read(&mut self.chunk) {
            Ok(0) => self.client_gone = true,
            Ok(got) => self.received.push(&self.chunk[..got]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => {
                self.client_gone = true;
                self.client_reset = true;
            }
        }
        loop {
            match self.received.next() {
                Ok(Some(frame)) => self.obey(frame),
                Ok(None) => return Ok(()),
                Err(_) => {
                    // Not a client that speaks the protocol: as good as gone.
                    self.client_gone = true;
                    return Ok(());
                }
            }
        }
    }

    fn obey(&mut self, frame: Frame) {
        match frame.kind {
            Kind::Stdin if self.input.is_none() || self.end_input => {}
            Kind::Stdin if !frame.payload.is_empty() => self.pending_input.extend(frame.payload),
            Kind::Stdin if self.terminal.is_some() => self.pending_input.push_back(END_OF_TRANSMISSION),
            Kind::Stdin => self.end_input = true,
            Kind::Request => match frame.parse(Kind::Request) {
                Ok(ExecControl::Signal { signal }) => {
                    if let Some(signal) = Signal::from_named_raw(signal) {
                        self.watch.signal_group(signal);
                    }
                }
                Ok(ExecControl::Resize(size)) => {
                    if let Some(terminal) = &self.terminal {
                        let _ = spawn::resize_terminal(terminal, size);
                    }
                }
                // A message of a later protocol: the program runs on without it.
                Err(_) => {}
            },
            _ => {}
        }
        self.write_input();
    }

    /// Gives the program what it takes of the waiting input.
    fn write_input(&mut self) {
        let Some(input) = &self.input else { return };
        while !self.pending_input.is_empty() {
            match rustix::io::write(input, self.pending_input.as_slices().0) {
                Ok(written) => drop(self.pending_input.drain(..written)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    // The program does not read any more; what is sent to it is dropped.
                    self.pending_input.clear();
                    self.input = None;
                    return;
                }
            }
        }
        if self.end_input {
            self.input = None;
        }
    }

    /// Reads one chunk of output and queues it for the client.
    fn read_output(&mut self, index: usize) {
        let Some((kind, fd)) = &self.outputs[index] else { return };
        let read = rustix::io::read(fd, &mut self.chunk[..]);
        match read {
            Ok(got @ 1..) => {
                self.pending_output.extend(Header { len: got, kind: *kind }.encode());
                self.pending_output.extend(&self.chunk[..got]);
            }
            other if discard::ended(other) => self.outputs[index] = None,
            _ => {}
        }
    }

    fn queue_response(&mut self, response: &Response) -> Result<(), FrameError> {
        self.pending_output.extend(Frame::json(Kind::Response, response)?.encode());
        Ok(())
    }

    /// Sends what the client takes now.
    fn flush(&mut self) {
        while !self.pending_output.is_empty() && !self.client_gone {
            match (&self.connection).write(self.pending_output.as_slices().0) {
                Ok(sent) => drop(self.pending_output.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.client_gone = true;
                    self.client_reset = true;
                }
            }
        }
    }

    /// The client went before the program ended.
    fn abandon(&mut self) {
        let copied = || self.agent.identity.changes(self.identities, identity::RESET_PATIENCE);
        let goes_on = self.detach || (self.client_reset && copied());
        if !goes_on {
            self.watch.signal_group(Signal::KILL);
            return;
        }
        self.discard_outputs();
        self.connection.cut();
        if self.deadline.is_some() && self.watch.wait(self.deadline).is_none() {
            self.watch.signal_group(Signal::KILL);
        }
    }

    fn discard_outputs(&mut self) {
        for (_, fd) in self.outputs.iter_mut().filter_map(Option::take) {
            self.agent.discarder.take(fd);
        }
    }

    /// Delivers the last messages.
    fn finish(mut self) -> Result<(), FrameError> {
        self.connection.set_nonblocking(false)?;
        let (front, back) = self.pending_output.as_slices();
        (&self.connection).write_all(front)?;
        (&self.connection).write_all(back)?;
        self.pending_output.clear();
        self.connection.close_gently();
        Ok(())
    }
}

const _: () = assert!(CHUNK + HEADER_LEN <= forkd_proto::frame::MAX_PAYLOAD);
