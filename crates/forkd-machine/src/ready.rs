//! Waiting for a machine that was just started.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use forkd_proto::agent::{FailureCode, Request, Response};
use forkd_proto::frame::Kind;

use crate::agent::AgentConnection;
use crate::boot::{OUTCOME_PATH, OUTCOME_READY};
use crate::console;
use crate::error::MachineError;
use crate::health::Patient;
use crate::record::RunningRecord;

/// Between one attempt and the next.
const PAUSE: Duration = Duration::from_millis(100);

/// For one attempt; until something listens inside, QEMU resets a connection within milliseconds.
const ATTEMPT: Duration = Duration::from_secs(5);

/// The longest boot verdict that is read; a script's one line.
const MAX_VERDICT: usize = 64 << 10;

/// What a machine must show before it counts as ready, besides an agent that answers.
pub(crate) struct Expectation {
    /// The daemon's API, if it is to run.
    api: Option<SocketAddr>,
}

impl Expectation {
    pub(crate) fn of(running: &RunningRecord) -> Self {
        let api = (std::net::Ipv4Addr::LOCALHOST, running.api_port).into();
        Self { api: running.options.controller.then_some(api) }
    }
}

/// Waits until the agent answers, the boot script has said "ready" and the API answers.
pub(crate) fn wait(patient: &Patient, expected: &Expectation, limit: Duration) -> Result<(), MachineError> {
    let deadline = Instant::now() + limit;
    let verdict = poll(patient, deadline, limit, || boot_verdict(patient))?;
    if verdict != OUTCOME_READY {
        return Err(MachineError::Boot { reason: verdict, console_tail: console::tail(&patient.console()) });
    }
    match expected.api {
        None => Ok(()),
        Some(api) => poll(patient, deadline, limit, || answers_http(api).then_some(())),
    }
}

/// Repeats `attempt` until it gives something, the machine dies or the time is over.
fn poll<T>(
    patient: &Patient,
    deadline: Instant,
    limit: Duration,
    mut attempt: impl FnMut() -> Option<T>,
) -> Result<T, MachineError> {
    loop {
        if let Some(value) = attempt() {
            return Ok(value);
        }
        let console_tail = || console::tail(&patient.console());
        if let Err(cause) = patient.check_qemu() {
            return Err(MachineError::MachineDied { cause, console_tail: console_tail() });
        }
        if Instant::now() >= deadline {
            return Err(MachineError::StartTimeout { limit, console_tail: console_tail() });
        }
        std::thread::sleep(PAUSE);
    }
}

/// What the boot script said; `None` while the agent does not answer. The agent listens only after the
/// script has ended, so a missing verdict is a verdict too.
fn boot_verdict(patient: &Patient) -> Option<String> {
    let mut connection = AgentConnection::open(patient.agent, &patient.token, ATTEMPT).ok()?;
    match connection.ask(&Request::ReadFile { path: OUTCOME_PATH.into() }).ok()? {
        Response::File(_) => {}
        Response::Error(failure) if failure.code == FailureCode::NotFound => {
            return Some("its boot script ended early".to_owned());
        }
        _ => return None,
    }
    let mut verdict = Vec::new();
    while verdict.len() < MAX_VERDICT {
        let frame = connection.receive().ok()?;
        if frame.kind != Kind::Data {
            return None;
        }
        if frame.payload.is_empty() {
            break;
        }
        verdict.extend_from_slice(&frame.payload);
    }
    Some(String::from_utf8_lossy(&verdict).trim().to_owned())
}

/// Whether an HTTP server answers. Any status will do: what it says is its clients' business.
fn answers_http(address: SocketAddr) -> bool {
    let attempt = || -> std::io::Result<bool> {
        let mut stream = TcpStream::connect_timeout(&address, ATTEMPT)?;
        stream.set_read_timeout(Some(ATTEMPT))?;
        stream.set_write_timeout(Some(ATTEMPT))?;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: forkd-machine\r\nConnection: close\r\n\r\n")?;
        let mut start = [0; 5];
        stream.read_exact(&mut start)?;
        Ok(&start == b"HTTP/")
    };
    attempt().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn only_a_server_that_speaks_counts_as_up() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("free port");
        let address = listener.local_addr().expect("bound");
        let server = std::thread::spawn(move || {
            // The first connection is dropped unanswered, as QEMU does while nothing listens inside.
            drop(listener.accept().expect("client comes"));
            let (mut stream, _) = listener.accept().expect("client comes again");
            stream.write_all(b"HTTP/1.1 401 Unauthorized\r\n\r\n").expect("client waits");
        });
        assert!(!answers_http(address));
        assert!(answers_http(address));
        server.join().expect("server ends");
    }
}
