//! Running a program in the machine, with its streams carried over.

use std::io::{Read, Write};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use forkd_proto::agent::{Exec, ExecControl, Exited, Request, Response};
use forkd_proto::frame::{Frame, FrameError, Kind};

use crate::agent::AgentConnection;
use crate::console;
use crate::error::MachineError;
use crate::health::{CauseOfDeath, Patient, Watchdog};

/// How long the agent may take to accept a connection on a busy machine.
const OPEN_LIMIT: Duration = Duration::from_secs(20);

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
pub(crate) fn run(patient: &Patient, mut request: Exec, streams: Streams<'_>) -> Result<Exited, MachineError> {
    request.stdin = streams.stdin.is_some();
    let mut connection = open(patient)?;
    let session = Session { patient };
    connection
        .send(&Frame::json(Kind::Request, &Request::Exec(request)).map_err(|error| session.broken(error))?)
        .and_then(|()| connection.wait_for_ever())
        .map_err(|error| session.explain(error, None))?;
    let watchdog = Watchdog::set(patient.clone(), connection.try_clone().map_err(|error| session.broken(error))?);
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
        Err(Ending::Broken(error)) => Err(session.explain(error, watchdog.cause())),
    }
}

/// Opens a connection, telling a dead machine from a refused greeting.
pub(crate) fn open(patient: &Patient) -> Result<AgentConnection, MachineError> {
    AgentConnection::open(patient.agent, &patient.token, OPEN_LIMIT)
        .map_err(|error| Session { patient }.explain(error, None))
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
                Response::Started { .. } => continue,
                Response::Exited(exited) => return Ok(exited),
                Response::Error(failure) => return Err(Ending::Refused(failure)),
                other => {
                    let text = format!("an unexpected answer to exec: {other:?}");
                    return Err(Ending::Broken(std::io::Error::other(text).into()));
                }
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

    /// A broken connection is a dead machine until the machine has shown that it lives.
    fn explain(&self, error: FrameError, known: Option<CauseOfDeath>) -> MachineError {
        match known.map_or_else(|| self.patient.post_mortem(), Err) {
            Ok(()) => self.broken(error),
            Err(cause) => MachineError::MachineDied { cause, console_tail: console::tail(&self.patient.console()) },
        }
    }
}
