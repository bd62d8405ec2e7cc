//! The JSON-line protocol on TCP 8888.
//!
//! One JSON object and a newline (or the client's half-close) in, one JSON object and a newline out,
//! then the connection is closed. Actions are `ping`, `exec` and `eval`; all are carried out by the
//! same code as the framed protocol's requests.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use forkd_proto::agent::{Exec, Exited, Failure, FailureCode, Response};
use forkd_proto::frame::{Frame, FrameError, Kind};
use serde_json::{Value, json};

use crate::agent::Agent;
use crate::connection::Connection;
use crate::runtimes::{Gone, Language, Scope};
use crate::{exec, failure, requests};

/// The TCP port of this protocol in a guest.
pub const PORT: u16 = 8888;

/// The most of one request, and of each output stream of an answer.
const LIMIT: usize = 16 << 20;
const DEFAULT_TIMEOUT_SECS: f64 = 30.0;
const PATIENCE: Duration = Duration::from_secs(30);

/// Serves one connection.
pub fn serve(agent: &Agent, connection: Connection) -> Result<(), FrameError> {
    connection.set_read_timeout(Some(PATIENCE))?;
    let answer = match receive(&connection)? {
        Some(line) => match serde_json::from_slice::<Value>(&line) {
            Ok(request) => answer(agent, &connection, &request),
            Err(error) => refused("JSONDecodeError", &format!("the request is not JSON: {error}")),
        },
        None => refused("ValueError", &format!("the request exceeds {LIMIT} bytes")),
    };
    let mut bytes = serde_json::to_vec(&answer)?;
    bytes.push(b'\n');
    (&connection).write_all(&bytes)?;
    connection.close_gently();
    Ok(())
}

/// One line, or all that comes before a half-close; `None` when it is too long.
fn receive(mut connection: &Connection) -> Result<Option<Vec<u8>>, FrameError> {
    let mut line = Vec::new();
    let mut piece = [0; 16 << 10];
    loop {
        let got = connection.read(&mut piece)?;
        if let Some(end) = piece[..got].iter().position(|byte| *byte == b'\n') {
            line.extend_from_slice(&piece[..end]);
            return Ok(Some(line));
        }
        line.extend_from_slice(&piece[..got]);
        match got {
            0 if line.is_empty() => return Err(FrameError::Closed),
            0 => return Ok(Some(line)),
            _ if line.len() > LIMIT => return Ok(None),
            _ => {}
        }
    }
}

/// The shape of every error of this protocol.
fn refused(kind: &str, message: &str) -> Value {
    json!({ "error": format!("{kind}: {message}"), "traceback": "", "exit_code": 1 })
}

fn failed(failure: &Failure) -> Value {
    let kind = match failure.code {
        FailureCode::NotFound => "FileNotFoundError",
        FailureCode::Denied => "PermissionError",
        FailureCode::Invalid => "ValueError",
        FailureCode::TimedOut => "TimeoutExpired",
        FailureCode::Conflict | FailureCode::NoSpace => "OSError",
        FailureCode::Internal => "RuntimeError",
    };
    refused(kind, &failure.message)
}

fn answer(agent: &Agent, connection: &Connection, request: &Value) -> Value {
    match request.get("action").and_then(Value::as_str) {
        Some("ping") => ping(agent),
        Some("exec") => run(agent, request).unwrap_or_else(|failure| failed(&failure)),
        Some("eval") => evaluate(agent, connection, request).unwrap_or_else(|failure| failed(&failure)),
        Some(other) => refused("ValueError", &format!("unknown action {other:?}; there are ping, exec and eval")),
        None => refused("KeyError", "the request has no action; there are ping, exec and eval"),
    }
}

fn ping(agent: &Agent) -> Value {
    let pong = requests::pong(agent);
    json!({
        "pong": true,
        "numpy_version": pong.numpy_version.as_deref().unwrap_or("not-installed"),
        "pid": std::process::id(),
        "agent_lang": agent.environment.get("FORKD_AGENT_LANG").unwrap_or_else(|| "python".to_owned()),
        "warmup_ready": agent.warmup.get().is_some() || agent.environment.get("FORKD_WARMUP_CMD").is_none(),
    })
}

fn run(agent: &Agent, request: &Value) -> Result<Value, Failure> {
    let args: Vec<String> = request
        .get("args")
        .and_then(|args| serde_json::from_value(args.clone()).ok())
        .ok_or_else(|| failure::invalid("exec needs args, an array of strings"))?;
    let timeout = match request.get("timeout") {
        None | Some(Value::Null) => DEFAULT_TIMEOUT_SECS,
        Some(value) => value.as_f64().ok_or_else(|| failure::invalid("timeout must be a number of seconds"))?,
    };
    let limit = Duration::try_from_secs_f64(timeout).map_err(|_| {
        failure::invalid(format!("timeout must be a number of seconds that is not negative, it is {timeout}"))
    })?;
    let exec = Exec { args, timeout_ms: Some(limit.as_millis() as u64), ..Exec::default() };

    let broken = |error: FrameError| failure::internal(format!("exec: {error}"));
    let (ours, theirs) = UnixStream::pair().map_err(|error| failure::from_io("exec", &error))?;
    let (stdout, stderr, exited) = std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("exec".into())
            .stack_size(512 << 10)
            .spawn_scoped(scope, || exec::serve(agent, Connection::new(theirs.into()), &exec))
            .map_err(|error| failure::from_io("exec", &error))?;
        let collected = collect(&ours);
        let _ = ours.shutdown(std::net::Shutdown::Both);
        collected.map_err(broken)?
    })?;
    if exited.timed_out {
        return Err(Failure {
            code: FailureCode::TimedOut,
            message: format!("Command {:?} timed out after {timeout} seconds", exec.args),
        });
    }
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok(json!({ "stdout": text(stdout), "stderr": text(stderr), "exit_code": exited.code }))
}

type Collected = (Vec<u8>, Vec<u8>, Exited);

/// Both output streams and the end of a program.
fn collect(mut stream: &UnixStream) -> Result<Result<Collected, Failure>, FrameError> {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        let frame = Frame::read_from(&mut stream)?;
        match frame.kind {
            Kind::Stdout => append(&mut stdout, &frame.payload),
            Kind::Stderr => append(&mut stderr, &frame.payload),
            _ => match frame.parse(Kind::Response)? {
                Response::Exited(exited) => return Ok(Ok((stdout, stderr, exited))),
                Response::Error(failure) => return Ok(Err(failure)),
                _ => {}
            },
        }
    }
}

/// Keeps output up to the limit; the program's last words matter less than its first here.
fn append(kept: &mut Vec<u8>, bytes: &[u8]) {
    const NOTICE: &[u8] = b"\n[output beyond 16 MiB dropped]\n";
    let room = LIMIT.saturating_sub(kept.len());
    kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
    if room > 0 && bytes.len() >= room {
        kept.extend_from_slice(NOTICE);
    }
}

fn evaluate(agent: &Agent, connection: &Connection, request: &Value) -> Result<Value, Failure> {
    let code =
        request.get("code").and_then(Value::as_str).ok_or_else(|| failure::invalid("eval needs code, a string"))?;
    let language = match agent.environment.get("FORKD_AGENT_LANG").as_deref() {
        Some("node") => Language::Node,
        _ => Language::Python,
    };
    let evaluated = match agent.evaluating_warmup() {
        Some(warmup) => warmup.evaluate(code, None)?,
        None => agent.runtimes.run(Some(language), code, Scope::Single, None, (connection, Gone::WhenBroken))?,
    };
    Ok(match (evaluated.error, language) {
        (Some(trace), Language::Python) => {
            let last = trace.trim_end().lines().last().unwrap_or_default().to_owned();
            json!({ "error": last, "traceback": trace, "exit_code": 1 })
        }
        (Some(stack), Language::Node) => {
            let first = stack.lines().next().unwrap_or_default().to_owned();
            json!({ "error": first, "stack": stack, "exit_code": 1 })
        }
        (None, Language::Python) => json!({ "result": evaluated.result, "exit_code": 0 }),
        (None, Language::Node) => {
            json!({ "result_json": evaluated.result.unwrap_or_else(|| "null".to_owned()), "exit_code": 0 })
        }
    })
}
