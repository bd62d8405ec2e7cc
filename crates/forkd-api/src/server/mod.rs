//! Listening on TCP and a unix socket until told to stop.
//!
//! Connections are HTTP/1.1, over TLS where there is a certificate. Each is a task of its own; a slow handshake or a
//! slow header holds up nobody else.
//!
//! | module | owns |
//! |---|---|
//! | `lines` | which connections are open, which of them are silent, and who must go when there are too many |
//! | `watched` | a socket that tells its line what it does |
//! | `connection` | one connection, from its handshake to its end |
//! | [`mod@tls`] | the certificate, and its replacement while the server runs |

mod connection;
mod lines;
pub mod tls;
mod watched;

use std::fmt;
use std::fs::Permissions;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};

use connection::Serving;
use lines::Lines;
use tls::Tls;

/// How long requests under way may take once the server is told to stop.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);

/// How long a failure to accept is slept on, when it is this process's own.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long a peer may be silent before the kernel asks whether it is still there.
const PROBE_AFTER: Duration = Duration::from_secs(60);

/// Who is at the other end of a connection. In the extensions of every request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Remote {
    /// An address.
    Tcp(SocketAddr),
    /// A process of this host.
    Unix(Peer),
}

/// In the extensions of requests that came over TLS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct OverTls;

/// A process at the other end of a unix socket, as it was when it connected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Peer {
    /// Its user.
    pub uid: u32,
    /// Its first group.
    pub gid: u32,
    /// Its number, where this process can see it.
    pub pid: Option<i32>,
}

impl fmt::Display for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(Peer { uid, .. }) => write!(f, "uid {uid}"),
        }
    }
}

/// What a server allows its clients.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ServerLimits {
    /// How many connections may be open. When there are more, the one that has been silent longest is closed, those
    /// first that never made a request; while none is silent, new ones wait to be accepted.
    pub connections: usize,
    /// How long a request's header may take from its first byte, and a new connection until its first header is
    /// there, the handshake of TLS included.
    pub header: Duration,
    /// How long a connection may be silent between requests.
    pub idle: Duration,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self { connections: 8192, header: Duration::from_secs(10), idle: Duration::from_secs(75) }
    }
}

/// Why the server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The TCP address cannot be had.
    #[error("cannot listen on {address}; is another daemon running there? Choose another address with --bind")]
    Tcp {
        /// The address.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// The unix socket cannot be made.
    #[error("cannot listen on the socket {}", path.display())]
    Unix {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process answers on the unix socket.
    #[error("another daemon answers on {}; stop it, or choose another path with --socket", path.display())]
    InUse {
        /// Its path.
        path: PathBuf,
    },
}

/// Listens on a TCP address.
pub async fn listen_tcp(address: &str) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address).await.map_err(|source| ListenError::Tcp { address: address.to_owned(), source })
}

/// Listens on a unix socket that only this user, and the members of `group` if there is one, may connect to, in
/// place of one that a daemon left behind.
pub async fn listen_unix(path: &Path, group: Option<u32>) -> Result<UnixListener, ListenError> {
    if UnixStream::connect(path).await.is_ok() {
        return Err(ListenError::InUse { path: path.to_owned() });
    }
    let listen = || {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        let mode = match group {
            None => 0o600,
            Some(_) => {
                std::os::unix::fs::chown(path, None, group)?;
                0o660
            }
        };
        std::fs::set_permissions(path, Permissions::from_mode(mode))?;
        Ok(listener)
    };
    listen().map_err(|source| ListenError::Unix { path: path.to_owned(), source })
}

/// Serves `router` on TCP, over TLS if there is a certificate, until `stop` says so; then lets requests under way
/// finish.
pub async fn serve_tcp(
    listener: TcpListener,
    router: Router,
    tls: Option<Tls>,
    limits: ServerLimits,
    stop: watch::Receiver<bool>,
) -> io::Result<()> {
    serve(listener, router, tls, Lines::new("tcp", limits), stop).await
}

/// Serves `router` on a unix socket until `stop` says so, then lets requests under way finish.
pub async fn serve_unix(
    listener: UnixListener,
    router: Router,
    limits: ServerLimits,
    stop: watch::Receiver<bool>,
) -> io::Result<()> {
    serve(listener, router, None, Lines::new("unix", limits), stop).await
}

/// What connections come from.
trait Source {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    async fn next(&self) -> io::Result<(Self::Stream, Remote)>;
}

impl Source for TcpListener {
    type Stream = TcpStream;

    async fn next(&self) -> io::Result<(TcpStream, Remote)> {
        let (stream, address) = self.accept().await?;
        // Answers are small and complete: waiting to fill a segment would only delay them.
        let set = stream.set_nodelay(true).and_then(|()| {
            rustix::net::sockopt::set_socket_keepalive(&stream, true)?;
            Ok(rustix::net::sockopt::set_tcp_keepidle(&stream, PROBE_AFTER)?)
        });
        if let Err(error) = set {
            tracing::debug!(%error, "cannot set the options of a connection");
        }
        Ok((stream, Remote::Tcp(address)))
    }
}

impl Source for UnixListener {
    type Stream = UnixStream;

    async fn next(&self) -> io::Result<(UnixStream, Remote)> {
        let (stream, _) = self.accept().await?;
        let peer = stream.peer_cred()?;
        Ok((stream, Remote::Unix(Peer { uid: peer.uid(), gid: peer.gid(), pid: peer.pid() })))
    }
}

async fn serve(
    source: impl Source,
    router: Router,
    tls: Option<Tls>,
    lines: Arc<Lines>,
    stop: watch::Receiver<bool>,
) -> io::Result<()> {
    // Ends when the last connection has dropped its sender.
    let (alive, mut all_ended) = mpsc::channel::<()>(1);
    let accepting = async {
        loop {
            match source.next().await {
                Ok((stream, remote)) => {
                    let line = lines.admit().await;
                    let serving = Serving { router: router.clone(), remote, line, stop: stop.clone() };
                    let (tls, alive) = (tls.clone(), alive.clone());
                    tokio::spawn(async move {
                        serving.run(stream, tls).await;
                        drop(alive);
                    });
                }
                Err(error) if is_of_the_peer(&error) => tracing::debug!(%error, "a connection was gone at once"),
                Err(error) => {
                    tracing::error!(%error, "cannot accept connections");
                    lines.evict_one();
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        () = accepting => unreachable!("accepting has no end"),
        () = stopped(stop.clone()) => {}
    }
    // Nobody waits in vain: what would connect now is refused.
    drop(source);
    drop(alive);
    if tokio::time::timeout(DRAIN_LIMIT, all_ended.recv()).await.is_err() {
        tracing::warn!("requests still under way after {} s are cut off", DRAIN_LIMIT.as_secs());
    }
    Ok(())
}

/// Whether accepting failed for a reason that concerns one connection only.
fn is_of_the_peer(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, NotConnected};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | NotConnected)
}

async fn stopped(mut stop: watch::Receiver<bool>) {
    // An error means that the sender is gone, which is the same wish.
    let _ = stop.wait_for(|stop| *stop).await;
}
