//! Listening sockets: one thread accepts, one thread per connection serves.

mod vsock;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use forkd_proto::frame::FrameError;

use crate::agent::Agent;
use crate::connection::Connection;
use crate::token::Token;
use crate::{console, failure, legacy, requests};

/// Connections served at once, over all listeners.
const MAX_CONNECTIONS: usize = 1024;
/// Enough for JSON of the depth that the parser allows.
const STACK: usize = 512 << 10;
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
    std::thread::Builder::new().name("accept".into()).stack_size(STACK).spawn(move || {
        loop {
            match rustix::net::accept_with(&listener, rustix::net::SocketFlags::CLOEXEC) {
                Ok(socket) => hand_over(&agent, Connection::new(socket), &service),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(error) => {
                    // Out of descriptors or memory, most likely; both come back.
                    console::error(&format!("cannot accept connections on {name}: {error}"));
                    std::thread::sleep(Duration::from_millis(200));
                }
            }
        }
    })?;
    Ok(())
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

fn hand_over(agent: &Arc<Agent>, connection: Connection, service: &Service) {
    // Answers are written whole; waiting to merge them only delays them. Fails for vsock, which has
    // no such delay.
    let _ = rustix::net::sockopt::set_tcp_nodelay(connection.as_fd(), true);
    let Some(place) = Place::take() else {
        let _ = connection.set_nonblocking(true);
        let message = format!("{MAX_CONNECTIONS} connections are open, which is the limit; close some");
        let _ = connection.fail(failure::internal(message));
        return;
    };
    let (agent, service) = (Arc::clone(agent), service.clone());
    let served = std::thread::Builder::new().name("connection".into()).stack_size(STACK).spawn(move || {
        let _place = place;
        let outcome = match service {
            Service::Requests(token) => requests::serve(&agent, connection, token.as_deref()),
            Service::Legacy => legacy::serve(&agent, connection),
        };
        match outcome {
            // Clients come and go.
            Ok(()) | Err(FrameError::Closed | FrameError::Io(_)) => {}
            Err(error) => console::warn(&format!("a connection ended badly: {error}")),
        }
    });
    if let Err(error) = served {
        console::error(&format!("cannot serve a connection: no thread: {error}"));
    }
}
