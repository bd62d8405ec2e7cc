//! Running a program in the machine, with its streams carried over.

use std::io::{Read, Write};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use forkd_proto::agent::{Exec, ExecControl, Exited, Request, Response};
use forkd_proto::frame::{Frame, FrameError, Kind};

use crate::agent::AgentConnection;
use crate::console;
use crate::error::MachineError;
use crate::health::{CauseOfDeath, Patient, Verdict, Watchdog};

/// Bytes of standard input per frame.
const STDIN_CHUNK: usize = 64 << 10;

/// What a program in the machine is connected to.
pub struct Streams<'a> {
    /// Source of its standard input; `/dev/null` when absent. Read by a thread that ends with the
    /// source, so an idle terminal does not hold the program up.
    pub stdin: Option<Box<dyn Read + Send>>,
    /// Where its standard output goes.
    pub stdout: &'a mut dyn Write,
    /// Where its standard error goes.
    pub stderr: &'a mut dyn Write,
    /// Signals and terminal sizes to pass on while it runs.
    pub control: Option<Receiver<ExecControl>>,
}

/// Runs `request` on the machine of `patient` until it exits.
///
/// A machine that is stuck does not hold its caller up: the agent must answer, the program must begin, and if it has a
/// time limit it must end, each in good time. How long it runs without one is its own business, as long as the machine
/// lives.
pub(crate) fn run(patient: &Patient, mut request: Exec, streams: Streams<'_>) -> Result<Exited, MachineError> {
    request.stdin = streams.stdin.is_some();
    let mut connection = open(patient)?;
    let program = request.args.first().cloned().unwrap_or_default();
    let limit = request.timeout_ms.map(Duration::from_millis);
    let session = Session { patient };
    begin(&mut connection, &request, &session, &program)?;
    let deadline = limit.and_then(|limit| Instant::now().checked_add(limit)?.checked_add(patient.patience.end));
    let watched = connection.try_clone().map_err(|error| session.broken(error))?;
    let watchdog = Watchdog::set(patient.clone(), watched, deadline);
    let sender = Arc::new(Mutex::new(connection.try_clone().map_err(|error| session.broken(error))?));
    if let Some(stdin) = streams.stdin {
        let sender = Arc::clone(&sender);
        std::thread::spawn(move || feed_stdin(stdin, &sender));
    }
    if let Some(control) = streams.control {
        std::thread::spawn(move || feed_control(&control, &sender));
    }
    let outcome = receive(&mut connection, streams.stdout, streams.stderr);
    // Ends the feeding threads, and the program itself if its output could not be passed on.
    connection.close();
    match outcome {
        Ok(exited) => Ok(exited),
        Err(Ending::Output(error)) => Err(MachineError::Output(error)),
        Err(Ending::Refused(failure)) => Err(MachineError::Agent(failure)),
        Err(Ending::Broken(error)) => Err(match (watchdog.verdict(), limit) {
            (Some(Verdict::Died(cause)), _) => session.died(cause),
            (Some(Verdict::Overdue), Some(limit)) => MachineError::NotEnded { program, limit },
            _ => session.explain(error),
        }),
    }
}

/// Opens a connection, telling a dead machine from a refused greeting.
pub(crate) fn open(patient: &Patient) -> Result<AgentConnection, MachineError> {
    AgentConnection::open(patient.agent, &patient.token, patient.patience.answer).map_err(|error| {
        let session = Session { patient };
        match patient.ended_meanwhile().and_then(|()| patient.examine_again()) {
            Ok(()) => session.broken(error),
            Err(cause) => session.died(cause),
        }
    })
}

/// Asks for the program and waits until it has begun.
fn begin(
    connection: &mut AgentConnection,
    request: &Exec,
    session: &Session<'_>,
    program: &str,
) -> Result<(), MachineError> {
    let asked = Frame::json(Kind::Request, &Request::Exec(request.clone())).map_err(|error| session.broken(error))?;
    let limit = session.patient.patience.begin;
    let answer = connection
        .wait_for(limit)
        .and_then(|()| connection.send(&asked))
        .and_then(|()| connection.receive()?.parse(Kind::Response));
    match answer {
        Ok(Response::Started { .. }) => connection.wait_for_ever().map_err(|error| session.broken(error)),
        Ok(Response::Error(failure)) => Err(MachineError::Agent(failure)),
        Ok(other) => Err(session.broken(unexpected(&other))),
        Err(error) if is_silence(&error) => Err(match session.patient.examine() {
            Ok(()) => MachineError::NotBegun { program: program.to_owned(), limit },
            Err(cause) => session.died(cause),
        }),
        Err(error) => Err(session.explain(error)),
    }
}

/// Whether an answer did not come in time.
fn is_silence(error: &FrameError) -> bool {
    use std::io::ErrorKind::{TimedOut, WouldBlock};
    matches!(error, FrameError::Io(error) if matches!(error.kind(), TimedOut | WouldBlock))
}

fn unexpected(answer: &Response) -> FrameError {
    std::io::Error::other(format!("an unexpected answer to exec: {answer:?}")).into()
}

/// Why receiving stopped before the program had exited.
enum Ending {
    Output(std::io::Error),
    Refused(forkd_proto::agent::Failure),
    Broken(FrameError),
}

fn receive(connection: &mut AgentConnection, stdout: &mut dyn Write, stderr: &mut dyn Write) -> Result<Exited, Ending> {
    loop {
        let frame = connection.receive().map_err(Ending::Broken)?;
        let stream: &mut dyn Write = match frame.kind {
            Kind::Stdout => &mut *stdout,
            Kind::Stderr => &mut *stderr,
            _ => match frame.parse(Kind::Response).map_err(Ending::Broken)? {
                Response::Exited(exited) => return Ok(exited),
                Response::Error(failure) => return Err(Ending::Refused(failure)),
                other => return Err(Ending::Broken(unexpected(&other))),
            },
        };
        stream.write_all(&frame.payload).and_then(|()| stream.flush()).map_err(Ending::Output)?;
    }
}

/// Sends what the source gives until it ends, then an empty frame. The connection's end ends it too.
fn feed_stdin(mut source: Box<dyn Read + Send>, sender: &Mutex<AgentConnection>) {
    let mut buffer = vec![0; STDIN_CHUNK];
    loop {
        let length = match source.read(&mut buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            // A source that fails has ended as far as the program is concerned.
            Err(_) => 0,
        };
        let sent = lock(sender).send(&Frame::bytes(Kind::Stdin, &buffer[..length]));
        if length == 0 || sent.is_err() {
            return;
        }
    }
}

fn feed_control(control: &Receiver<ExecControl>, sender: &Mutex<AgentConnection>) {
    while let Ok(message) = control.recv() {
        let frame = Frame::json(Kind::Request, &message).expect("a signal or a size is small");
        if lock(sender).send(&frame).is_err() {
            return;
        }
    }
}

fn lock(sender: &Mutex<AgentConnection>) -> std::sync::MutexGuard<'_, AgentConnection> {
    // A sender that panicked within a frame has broken the connection, which the next send notices.
    sender.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Session<'a> {
    patient: &'a Patient,
}

impl Session<'_> {
    fn broken(&self, source: FrameError) -> MachineError {
        MachineError::Connection { address: self.patient.agent, source }
    }

    fn died(&self, cause: CauseOfDeath) -> MachineError {
        MachineError::MachineDied { cause, console_tail: console::tail(&self.patient.console()) }
    }

    /// A broken connection is a dead machine until the machine has shown that it lives.
    fn explain(&self, error: FrameError) -> MachineError {
        match self.patient.post_mortem() {
            Ok(()) => self.broken(error),
            Err(cause) => self.died(cause),
        }
    }
}
