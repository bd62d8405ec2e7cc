//! Listening on TCP and a unix socket until told to stop.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::Router;
use axum::serve::ListenerExt;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::watch;

/// How long requests under way may take once the server is told to stop.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);

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

/// Listens on a unix socket that only this user may connect to, in place of one that a daemon left
/// behind.
pub async fn listen_unix(path: &Path) -> Result<UnixListener, ListenError> {
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
        std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
        Ok(listener)
    };
    listen().map_err(|source| ListenError::Unix { path: path.to_owned(), source })
}

/// Serves `router` on TCP until `stop` says so, then lets requests under way finish.
pub async fn serve_tcp(listener: TcpListener, router: Router, stop: watch::Receiver<bool>) -> io::Result<()> {
    // Answers are small and complete: waiting to fill a segment would only delay them.
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "cannot turn off Nagle's algorithm");
        }
    });
    let serving = axum::serve(listener, router).with_graceful_shutdown(stopped(stop.clone()));
    bounded(serving.into_future(), stop).await
}

/// Serves `router` on a unix socket until `stop` says so, then lets requests under way finish.
pub async fn serve_unix(listener: UnixListener, router: Router, stop: watch::Receiver<bool>) -> io::Result<()> {
    let serving = axum::serve(listener, router).with_graceful_shutdown(stopped(stop.clone()));
    bounded(serving.into_future(), stop).await
}

async fn stopped(mut stop: watch::Receiver<bool>) {
    // An error means that the sender is gone, which is the same wish.
    let _ = stop.wait_for(|stop| *stop).await;
}

async fn bounded(serving: impl Future<Output = io::Result<()>>, stop: watch::Receiver<bool>) -> io::Result<()> {
    let overdue = async {
        stopped(stop).await;
        tokio::time::sleep(DRAIN_LIMIT).await;
    };
    tokio::select! {
        result = serving => result,
        () = overdue => {
            tracing::warn!("requests still under way after {} s are cut off", DRAIN_LIMIT.as_secs());
            Ok(())
        }
    }
}
