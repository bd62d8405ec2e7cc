//! One connection, one request: receives it and hands it to what carries it out.

use std::time::Duration;

use forkd_proto::agent::{Eval, Evaluated, Failure, FailureCode, PROTOCOL_VERSION, Pong, Request, Response};
use forkd_proto::frame::{FrameError, Kind};

use crate::agent::Agent;
use crate::connection::Connection;
use crate::files::transfer::Range;
use crate::token::Token;
use crate::{exec, failure, files, identity, poweroff, runtimes, tunnel};

/// How long a client may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(30);

/// Serves `connection`. With a `token`, nothing but a `Hello` that holds it is listened to first.
pub fn serve(agent: &Agent, connection: Connection, token: Option<&Token>) -> Result<(), FrameError> {
    connection.set_read_timeout(Some(PATIENCE))?;
    let mut request = receive(&connection)?;
    if let Some(Request::Hello { token: offered }) = &request {
        if !token.is_none_or(|token| token.matches(offered)) {
            return refuse(connection, FailureCode::Denied, "the token is wrong");
        }
        connection.respond(&Response::Done)?;
        request = receive(&connection)?;
    } else if token.is_some() {
        return refuse(connection, FailureCode::Denied, "this agent wants a hello with its token first");
    }
    let Some(request) = request else {
        return refuse(
            connection,
            FailureCode::Invalid,
            "the request is not one this agent knows: its op is unknown or a field is missing or of the wrong type",
        );
    };
    connection.set_read_timeout(None)?;
    carry_out(agent, connection, request)
}

/// The next request; `None` when it is not one.
fn receive(connection: &Connection) -> Result<Option<Request>, FrameError> {
    match connection.receive()?.parse(Kind::Request) {
        Ok(request) => Ok(Some(request)),
        Err(FrameError::Json(_) | FrameError::Unexpected { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

fn refuse(connection: Connection, code: FailureCode, message: &str) -> Result<(), FrameError> {
    connection.fail(Failure { code, message: message.to_owned() })?;
    connection.close_gently();
    Ok(())
}

fn carry_out(agent: &Agent, connection: Connection, request: Request) -> Result<(), FrameError> {
    let answer = match request {
        Request::Exec(request) => return exec::serve(agent, connection, &request),
        Request::ReadFile { path } => return files::transfer::send(&connection, &path, Range::default()),
        Request::ReadRange { path, offset, length } => {
            return files::transfer::send(&connection, &path, Range { offset, length });
        }
        Request::WriteFile { path, mode, parents } => {
            return files::transfer::receive(connection, &path, mode, parents);
        }
        Request::Archive { path } => return files::archive::send(&connection, &path),
        Request::Extract { path, owners } => return files::archive::receive(connection, &path, owners),
        Request::Watch { path, recursive } => return files::watch::serve(&connection, &path, recursive),
        Request::List { path, pages: true } => return files::send_listing(&connection, &path),
        Request::Tunnel { port } => return tunnel::serve(connection, port),
        Request::Shutdown => return poweroff::serve(agent, connection),
        Request::Eval(request) => evaluate(agent, &connection, &request).map(Response::Evaluated),
        Request::Hello { .. } => Err(failure::invalid("hello comes once, before the request")),
        Request::Ping => Ok(Response::Pong(pong(agent))),
        Request::Identify(request) => {
            identity::take_on(agent, &request).map(|warnings| Response::Identified { warnings })
        }
        Request::List { path, pages: false } => files::list(&path).map(|entries| Response::Listing { entries }),
        Request::Stat { path } => files::stat(&path).map(Response::Stat),
        Request::Remove { path, recursive } => files::remove(&path, recursive).map(|()| Response::Done),
        Request::MakeDir { path } => files::make_directory(&path).map(|()| Response::Done),
        Request::Rename { from, to } => files::rename(&from, &to).map(|()| Response::Done),
        Request::Sync => {
            rustix::fs::sync();
            Ok(Response::Done)
        }
    };
    connection.respond(&answer.unwrap_or_else(Response::Error))
}

/// Code without a language is the warm-up program's, if the image has one that evaluates.
fn evaluate(agent: &Agent, connection: &Connection, request: &Eval) -> Result<Evaluated, Failure> {
    match agent.evaluating_warmup().filter(|_| request.language.is_none()) {
        Some(warmup) => {
            let limit = request.timeout_ms.map(Duration::from_millis);
            warmup.evaluate(&request.code, limit).map(runtimes::fit_in_a_frame)
        }
        None => agent.runtimes.evaluate(request, connection),
    }
}

/// What is here.
pub fn pong(agent: &Agent) -> Pong {
    let uptime = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Pong {
        protocol: PROTOCOL_VERSION,
        agent: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        warm: agent.runtimes.warm(),
        sandbox_id: agent.identity.sandbox_id(),
        numpy_version: agent.runtimes.numpy_version(),
        uptime_ns: uptime.tv_sec as u64 * 1_000_000_000 + uptime.tv_nsec as u64,
    }
}
