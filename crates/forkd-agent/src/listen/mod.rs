//! Listening sockets, and what is spoken on them. A [`crew`] of threads serves each.

mod crew;
mod vsock;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use forkd_proto::frame::FrameError;

use crate::agent::Agent;
use crate::connection::Connection;
use crate::token::Token;
use crate::{console, failure, legacy, requests};

/// Connections served at once, over all listeners.
const MAX_CONNECTIONS: usize = 1024;
const BACKLOG: i32 = 1024;

static OPEN: AtomicUsize = AtomicUsize::new(0);

/// What is spoken on a listener.
#[derive(Clone, Debug)]
enum Service {
    Requests(Option<Arc<Token>>),
    Legacy,
}

/// Listens on vsock, from any context id.
pub fn on_vsock(agent: &Arc<Agent>, port: u32) -> io::Result<()> {
    let socket = vsock::listen(port, BACKLOG)?;
    accept_in_background(agent, socket, format!("vsock port {port}"), Service::Requests(None))
}

/// Listens on TCP for clients that show `token`; returns the address, whose port is found when it was 0.
pub fn on_tcp(agent: &Arc<Agent>, address: SocketAddr, token: Token) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(address)?;
    let address = listener.local_addr()?;
    let service = Service::Requests(Some(Arc::new(token)));
    accept_in_background(agent, listener.into(), format!("tcp {address}"), service)?;
    Ok(address)
}

/// Listens on TCP for clients of the JSON-line protocol.
pub fn on_legacy_tcp(agent: &Arc<Agent>, address: SocketAddr) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(address)?;
    let address = listener.local_addr()?;
    accept_in_background(agent, listener.into(), format!("tcp {address} (JSON lines)"), Service::Legacy)?;
    Ok(address)
}

fn accept_in_background(agent: &Arc<Agent>, listener: OwnedFd, name: String, service: Service) -> io::Result<()> {
    let agent = Arc::clone(agent);
    crew::start(listener, name, move |socket| serve(&agent, Connection::new(socket), &service))
}

/// Counts a connection as open while it lives.
struct Place;

impl Place {
    fn take() -> Option<Self> {
        let place = Self;
        (OPEN.fetch_add(1, Ordering::Relaxed) < MAX_CONNECTIONS).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        OPEN.fetch_sub(1, Ordering::Relaxed);
    }
}

fn serve(agent: &Agent, connection: Connection, service: &Service) {
    // Answers are written whole; waiting to merge them only delays them. Fails for vsock, which has
    // no such delay.
    let _ = rustix::net::sockopt::set_tcp_nodelay(connection.as_fd(), true);
    let Some(_place) = Place::take() else {
        let _ = connection.set_nonblocking(true);
        let message = format!("{MAX_CONNECTIONS} connections are open, which is the limit; close some");
        let _ = connection.fail(failure::internal(message));
        return;
    };
    let outcome = match service {
        Service::Requests(token) => requests::serve(agent, connection, token.as_deref()),
        Service::Legacy => legacy::serve(agent, connection),
    };
    match outcome {
        // Clients come and go.
        Ok(()) | Err(FrameError::Closed | FrameError::Io(_)) => {}
        Err(error) => console::warn(&format!("a connection ended badly: {error}")),
    }
}
