//! The control connection to one monitor.
//!
//! Requests are answered in the order they were sent, and the launch that made the monitor counts
//! as the first of them, so one queue of waiters is all the matching there is:
//!
//! ```text
//! request() ──► outbox ──► writer task ──► socket ──► reader task ──► oldest waiter
//!                              └── appends a waiter ──────────────────────┘
//! Stopped and the end of the connection concern everybody and are kept beside the queue.
//! ```
//!
//! Sending happens in a task of its own: a caller that gives up half-way must not leave half a
//! message on the socket.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use forkd_proto::frame::{Frame, FrameError, HEADER_LEN, Header, Kind};
use forkd_proto::monitor::{Command, Event, MAX_FDS, StopReason, part};
use forkd_types::rest::EndCode;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use serde::Serialize;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};

use crate::lifecycle::End;

/// Why a monitor did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum MonitorError {
    /// It could not carry the request out; its machine is as it was.
    #[error("{error}")]
    Refused {
        /// What it said.
        error: String,
    },
    /// It ended, or closed its connection, before it answered.
    #[error("monitor {name} {how} before it answered")]
    Gone {
        /// Its name.
        name: String,
        /// How it ended.
        how: String,
    },
    /// It answered with another event than the request calls for.
    #[error("monitor {name} answered {got} where {wanted} was expected")]
    Unexpected {
        /// Its name.
        name: String,
        /// What the request calls for.
        wanted: &'static str,
        /// What came.
        got: String,
    },
    /// The request could not be sent.
    #[error("cannot send a request to monitor {name}: {error}")]
    Send {
        /// Its name.
        name: String,
        /// Why.
        error: String,
    },
}

/// How a connection ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Ending {
    /// The monitor's own word on why its machine stopped, if it gave one.
    pub(crate) stopped: Option<StopReason>,
    /// What was wrong with the connection, if it did not simply close.
    pub(crate) fault: Option<String>,
}

impl Ending {
    /// How it ended, for programs and people.
    pub(crate) fn end(&self) -> End {
        let code = match &self.stopped {
            Some(StopReason::PoweredOff) => EndCode::PoweredOff,
            Some(StopReason::Rebooted) => EndCode::Rebooted,
            Some(StopReason::Panicked) => EndCode::Panicked,
            Some(StopReason::Killed) => EndCode::Killed,
            Some(StopReason::Crashed { .. }) => EndCode::Crashed,
            None => EndCode::Lost,
        };
        End { code, reason: self.describe() }
    }

    /// How it ended, as the predicate of a sentence about the monitor or its sandbox.
    pub(crate) fn describe(&self) -> String {
        match (&self.stopped, &self.fault) {
            (Some(reason), _) => describe_stop(reason),
            (None, Some(fault)) => format!("broke its control connection ({fault})"),
            (None, None) => "ended without giving a reason".to_owned(),
        }
    }
}

/// Why a machine stopped, as the predicate of a sentence about it.
pub(crate) fn describe_stop(reason: &StopReason) -> String {
    match reason {
        StopReason::PoweredOff => "was powered off by its guest".to_owned(),
        StopReason::Rebooted => "ended because its guest asked for a reboot".to_owned(),
        StopReason::Panicked => "ended because its guest kernel panicked".to_owned(),
        StopReason::Killed => "was killed on request".to_owned(),
        StopReason::Crashed { detail } => format!("crashed: {detail}"),
    }
}

struct Outgoing {
    wire: Vec<u8>,
    fds: Vec<OwnedFd>,
    answer: oneshot::Sender<Result<Event, MonitorError>>,
}

#[derive(Default)]
struct Inbox {
    waiting: VecDeque<oneshot::Sender<Result<Event, MonitorError>>>,
    stopped: Option<StopReason>,
    peer: Option<i32>,
}

/// One monitor's control connection.
pub(crate) struct Control {
    name: String,
    stream: UnixStream,
    outbox: mpsc::UnboundedSender<Outgoing>,
    inbox: Mutex<Inbox>,
    ended: watch::Sender<Option<Ending>>,
}

/// An answer that is on its way.
pub(crate) struct Answer {
    name: String,
    receiver: oneshot::Receiver<Result<Event, MonitorError>>,
}

impl Answer {
    /// Waits for the event; [`Event::Failed`] is an error.
    pub(crate) async fn wait(self) -> Result<Event, MonitorError> {
        match self.receiver.await {
            Ok(Ok(Event::Failed { error })) => Err(MonitorError::Refused { error }),
            Ok(result) => result,
            Err(_) => Err(MonitorError::Gone { name: self.name, how: "was let go".to_owned() }),
        }
    }
}

impl Control {
    /// Takes over a connection to a process that was asked, elsewhere, to fork itself into being:
    /// the first event, [`Event::Running`] or the like, comes as the returned answer.
    pub(crate) fn expecting(name: &str, stream: UnixStream) -> (Arc<Self>, Answer) {
        let (answer, receiver) = oneshot::channel();
        let waiting = VecDeque::from([answer]);
        let control = Self::run(name, stream, Inbox { waiting, ..Inbox::default() });
        (control, Answer { name: name.to_owned(), receiver })
    }

    /// Takes over a connection to a monitor that is past its launch or waits for it; every event
    /// answers a request made here.
    pub(crate) fn connected(name: &str, stream: UnixStream) -> Arc<Self> {
        Self::run(name, stream, Inbox::default())
    }

    fn run(name: &str, stream: UnixStream, inbox: Inbox) -> Arc<Self> {
        let (outbox, outgoing) = mpsc::unbounded_channel();
        let control = Arc::new(Self {
            name: name.to_owned(),
            stream,
            outbox,
            inbox: Mutex::new(inbox),
            ended: watch::Sender::new(None),
        });
        tokio::spawn(Arc::clone(&control).write_requests(outgoing));
        tokio::spawn(Arc::clone(&control).read_events());
        control
    }

    /// The monitor's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Sends `command` with `fds`, which are closed here once sent.
    pub(crate) fn request(&self, command: &Command, fds: Vec<OwnedFd>) -> Answer {
        self.post(command, fds)
    }

    /// Sends any message that is answered by one event.
    pub(crate) fn post(&self, message: &impl Serialize, fds: Vec<OwnedFd>) -> Answer {
        let (answer, receiver) = oneshot::channel();
        let pending = Answer { name: self.name.clone(), receiver };
        match Frame::json(Kind::Request, message) {
            Ok(frame) => {
                let outgoing = Outgoing { wire: frame.encode(), fds, answer };
                if let Err(mpsc::error::SendError(outgoing)) = self.outbox.send(outgoing) {
                    let _ = outgoing.answer.send(Err(self.gone()));
                }
            }
            Err(error) => {
                let _ = answer.send(Err(self.unsendable(&error)));
            }
        }
        pending
    }

    /// The end of the connection, once it has ended.
    pub(crate) fn ending(&self) -> Option<Ending> {
        self.ended.borrow().clone()
    }

    /// Waits for the end of the connection.
    pub(crate) async fn closed(&self) -> Ending {
        let mut ended = self.ended.subscribe();
        match ended.wait_for(Option::is_some).await {
            Ok(ending) => ending.clone().expect("waited for until there is one"),
            Err(_) => Ending { stopped: None, fault: None },
        }
    }

    /// Runs `work`, which needs the machine, until it is done or the machine ends. When it fails
    /// because the machine stopped, the machine's own word is the reason.
    pub(crate) async fn while_running<T>(&self, work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
        /// A monitor that stops breaks its connections and says why at nearly the same time.
        const MOMENT: Duration = Duration::from_millis(500);
        let failure = tokio::select! {
            // First, because an answer that came before the end says more than the end.
            biased;
            result = work => match result {
                Ok(done) => return Ok(done),
                Err(failure) => failure,
            },
            ending = self.closed() => return Err(format!("the machine {}", ending.describe())),
        };
        match tokio::time::timeout(MOMENT, self.closed()).await {
            Ok(ending) if ending.stopped.is_some() => Err(format!("the machine {}", ending.describe())),
            _ => Err(failure),
        }
    }

    /// The process that the kernel says sent the newest message; known only on a connection whose
    /// socket asked for credentials.
    pub(crate) fn peer(&self) -> Option<i32> {
        self.lock().peer
    }

    fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn gone(&self) -> MonitorError {
        let how = match self.ending() {
            Some(ending) => ending.describe(),
            None => "closed its control connection".to_owned(),
        };
        MonitorError::Gone { name: self.name.clone(), how }
    }

    fn unsendable(&self, error: &dyn std::fmt::Display) -> MonitorError {
        MonitorError::Send { name: self.name.clone(), error: error.to_string() }
    }

    async fn write_requests(self: Arc<Self>, mut outgoing: mpsc::UnboundedReceiver<Outgoing>) {
        let mut ended = self.ended.subscribe();
        loop {
            let message = tokio::select! {
                message = outgoing.recv() => message,
                _ = ended.wait_for(Option::is_some) => None,
            };
            let Some(Outgoing { wire, fds, answer }) = message else { break };
            // The waiter is in place before the first byte leaves: the answer may be very fast.
            self.lock().waiting.push_back(answer);
            if let Err(error) = self.send(&wire, &fds).await {
                let answer = self.lock().waiting.pop_back();
                if let Some(answer) = answer {
                    let _ = answer.send(Err(self.unsendable(&error)));
                }
                // Part of a message may be on its way; nothing after it could be understood.
                let _ = rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Both);
                break;
            }
        }
        outgoing.close();
        while let Ok(unsent) = outgoing.try_recv() {
            let _ = unsent.answer.send(Err(self.gone()));
        }
        // A request may have slipped in between the end of the reader and the end of this task.
        if self.ending().is_some() {
            self.refuse_waiting();
        }
    }

    async fn send(&self, wire: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let (mut sent, mut left) = (0, &borrowed[..]);
        while sent < wire.len() {
            let (bytes, count) = part(wire.len() - sent, left.len());
            let (with, later) = left.split_at(count);
            sent += self
                .stream
                .async_io(Interest::WRITABLE, || {
                    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
                    let mut ancillary = SendAncillaryBuffer::new(&mut space);
                    if !with.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(with)) {
                        return Err(io::Error::new(
                            io::ErrorKind::InvalidInput,
                            format!("{} descriptors do not fit one message, {MAX_FDS} do", with.len()),
                        ));
                    }
                    let part = [IoSlice::new(&wire[sent..sent + bytes])];
                    Ok(rustix::net::sendmsg(&self.stream, &part, &mut ancillary, SendFlags::NOSIGNAL)?)
                })
                .await?;
            left = later;
        }
        Ok(())
    }

    async fn read_events(self: Arc<Self>) {
        let mut buffer = BytesMut::new();
        let fault = loop {
            match self.next_event(&mut buffer).await {
                Ok(Event::Stopped { reason }) => self.lock().stopped = Some(reason),
                Ok(event) => match self.lock().waiting.pop_front() {
                    // A waiter that gave up still takes its answer out of the queue.
                    Some(waiter) => drop(waiter.send(Ok(event))),
                    None => tracing::warn!(monitor = self.name, ?event, "event that nobody asked for"),
                },
                Err(FrameError::Closed) => break None,
                Err(FrameError::Io(error)) if error.kind() == io::ErrorKind::ConnectionReset => break None,
                Err(error) => break Some(error.to_string()),
            }
        };
        let stopped = self.lock().stopped.clone();
        self.ended.send_replace(Some(Ending { stopped, fault }));
        self.refuse_waiting();
    }

    fn refuse_waiting(&self) {
        let waiting = std::mem::take(&mut self.lock().waiting);
        for waiter in waiting {
            let _ = waiter.send(Err(self.gone()));
        }
    }

    async fn next_event(&self, buffer: &mut BytesMut) -> Result<Event, FrameError> {
        loop {
            if let Some(header) = buffer.first_chunk::<HEADER_LEN>() {
                let header = Header::decode(*header)?;
                if buffer.len() >= HEADER_LEN + header.len {
                    buffer.advance(HEADER_LEN);
                    let payload = buffer.split_to(header.len).to_vec();
                    return Frame { kind: header.kind, payload }.parse(Kind::Request);
                }
            }
            if self.receive(buffer).await? == 0 {
                return Err(match buffer.is_empty() {
                    true => FrameError::Closed,
                    false => io::Error::from(io::ErrorKind::UnexpectedEof).into(),
                });
            }
        }
    }

    async fn receive(&self, buffer: &mut BytesMut) -> io::Result<usize> {
        let mut piece = [0; 16 << 10];
        let received = self
            .stream
            .async_io(Interest::READABLE, || {
                // Room for credentials only: descriptors, which no event carries, are refused by
                // having no place.
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
                let mut ancillary = RecvAncillaryBuffer::new(&mut space);
                let mut slices = [IoSliceMut::new(&mut piece)];
                let got = rustix::net::recvmsg(&self.stream, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
                for message in ancillary.drain() {
                    if let RecvAncillaryMessage::ScmCredentials(sender) = message {
                        self.lock().peer = Some(sender.pid.as_raw_nonzero().get());
                    }
                }
                Ok(got.bytes)
            })
            .await?;
        buffer.extend_from_slice(&piece[..received]);
        Ok(received)
    }
}

/// Takes the expected kind of event apart, or says what came instead.
macro_rules! expect_event {
    ($name:expr, $event:expr, $wanted:ident { $($field:ident),* $(,)? }) => {
        match $event {
            forkd_proto::monitor::Event::$wanted { $($field,)* .. } => Ok(($($field),*)),
            other => Err($crate::control::MonitorError::Unexpected {
                name: $name.to_string(),
                wanted: stringify!($wanted),
                got: format!("{other:?}"),
            }),
        }
    };
}
pub(crate) use expect_event;

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_proto::monitor::Role;
    use forkd_types::StageTimings;
    use std::os::unix::net::UnixStream as BlockingStream;

    fn pair() -> (UnixStream, BlockingStream) {
        let (here, there) = BlockingStream::pair().expect("socketpair");
        here.set_nonblocking(true).expect("nonblocking");
        (UnixStream::from_std(here).expect("in a runtime"), there)
    }

    fn forked(pid: i32) -> Event {
        Event::Forked { pid, pause_us: 0, stages: StageTimings::default() }
    }

    fn tell(peer: &BlockingStream, event: &Event) {
        forkd_proto::monitor::send(peer, event, &[]).expect("send");
    }

    fn fork(name: &str) -> Command {
        Command::Fork { fds: vec![Role::Console], name: name.to_owned(), disk_bytes: None }
    }

    #[tokio::test]
    async fn pipelined_requests_get_their_answers_in_order_and_carry_their_descriptors() {
        let (here, peer) = pair();
        let control = Control::connected("z", here);
        let answers: Vec<_> = (0..300)
            .map(|i| {
                control.request(&fork(&i.to_string()), vec![std::fs::File::open("/dev/null").expect("null").into()])
            })
            .collect();
        let serving = std::thread::spawn(move || {
            for i in 0..300 {
                let (command, fds): (Command, _) = forkd_proto::monitor::receive(&peer).expect("receive");
                assert_eq!((command, fds.len()), (fork(&i.to_string()), 1));
                match i % 3 {
                    0 => tell(&peer, &Event::Failed { error: format!("no {i}") }),
                    _ => tell(&peer, &forked(i)),
                }
            }
        });
        for (i, answer) in answers.into_iter().enumerate() {
            match answer.wait().await {
                Ok(event) => assert_eq!(event, forked(i as i32)),
                Err(error) => assert_eq!((error.to_string(), i % 3), (format!("no {i}"), 0)),
            }
        }
        serving.join().expect("peer");
    }

    #[tokio::test]
    async fn a_caller_that_gives_up_does_not_shift_later_answers() {
        let (here, peer) = pair();
        let control = Control::connected("z", here);
        let abandoned = control.request(&fork("a"), Vec::new());
        let kept = control.request(&fork("b"), Vec::new());
        assert!(tokio::time::timeout(Duration::from_millis(10), abandoned.wait()).await.is_err());
        tell(&peer, &forked(1));
        tell(&peer, &forked(2));
        assert_eq!(kept.wait().await.expect("answered"), forked(2));
    }

    #[tokio::test]
    async fn the_end_reaches_every_waiter_with_the_reason_the_monitor_gave() {
        let (here, peer) = pair();
        let (control, running) = Control::expecting("sb-1", here);
        let asked = control.request(&Command::Pages, Vec::new());
        tell(&peer, &Event::Stopped { reason: StopReason::Panicked });
        drop(peer);
        for answer in [running, asked] {
            let error = answer.wait().await.expect_err("it ended").to_string();
            assert_eq!(error, "monitor sb-1 ended because its guest kernel panicked before it answered");
        }
        assert_eq!(control.closed().await.stopped, Some(StopReason::Panicked));
        assert!(matches!(control.request(&Command::Pages, Vec::new()).wait().await, Err(MonitorError::Gone { .. })));
    }

    #[tokio::test]
    async fn the_most_telling_reason_of_a_failure_is_given() {
        // The launch failed and said why, then the process ended.
        let (here, peer) = pair();
        let (control, running) = Control::expecting("sb-1", here);
        tell(&peer, &Event::Failed { error: "no memory slot".to_owned() });
        drop(peer);
        control.closed().await;
        let work = async { running.wait().await.map_err(|error| error.to_string()) };
        assert_eq!(control.while_running(work).await.expect_err("refused"), "no memory slot");
        // The work noticed a broken connection before the machine told that it stopped.
        let (here, peer) = pair();
        let control = Control::connected("sb-1", here);
        let work = async {
            tell(&peer, &Event::Stopped { reason: StopReason::PoweredOff });
            drop(peer);
            Err::<(), _>("broken pipe".to_owned())
        };
        let reason = control.while_running(work).await.expect_err("stopped");
        assert_eq!(reason, "the machine was powered off by its guest");
    }

    #[tokio::test]
    async fn torn_and_malformed_messages_end_the_connection_as_faults() {
        use std::io::Write;
        for bytes in [&[9, 0, 0, 0, 1, b'{'][..], &[2, 0, 0, 0, 1, b'{', b'}'], &[0xff, 0xff, 0xff, 0xff, 1]] {
            let (here, mut peer) = pair();
            let control = Control::connected("z", here);
            peer.write_all(bytes).expect("write");
            drop(peer);
            assert!(control.closed().await.fault.is_some(), "{bytes:?}");
        }
    }

    #[tokio::test]
    async fn an_event_may_arrive_in_any_pieces() {
        use std::io::Write;
        let (here, mut peer) = pair();
        let (control, running) = Control::expecting("sb-1", here);
        let event = Event::Running { stages: StageTimings::default() };
        let wire = Frame::json(Kind::Request, &event).expect("json").encode();
        for byte in wire.iter().chain(&Frame::json(Kind::Request, &forked(5)).expect("json").encode()) {
            peer.write_all(std::slice::from_ref(byte)).expect("write");
            tokio::task::yield_now().await;
        }
        assert_eq!(running.wait().await.expect("running"), event);
        assert!(control.ending().is_none());
    }

    #[tokio::test]
    async fn the_kernel_names_the_sender_when_asked_to() {
        let (here, peer) = pair();
        rustix::net::sockopt::set_socket_passcred(&here, true).expect("passcred");
        let control = Control::connected("z", here);
        let answer = control.request(&Command::Pages, Vec::new());
        tell(&peer, &Event::pages(&[], &[]));
        answer.wait().await.expect("answered");
        assert_eq!(control.peer(), Some(std::process::id() as i32));
    }
}
