//! The one child's agent at the address where existing clients look for it.
//!
//! Connections to `10.42.0.2:8888` on this host are carried to the same port in the guest, wherever the daemon is.
//! The address is made this host's first of all, and nothing listens before the agent does: a client that is refused
//! tries again, while one whose packets go astray, or that is accepted and hears nothing, gives up.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::time::{Duration, Instant};

use forkd_types::SandboxId;
use forkd_types::rest::GUEST_ADDR;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::own_address::OwnAddress;
use crate::client::{Client, ClientError};
use crate::commands::port_forward;
use crate::progress::Progress;

/// The agent's port in the guest.
const AGENT_PORT: u16 = 8888;

/// How long the agent's port may take to open after the agent has answered.
const READY_LIMIT: Duration = Duration::from_secs(30);

/// How often it is tried meanwhile.
const TRY_EVERY: Duration = Duration::from_millis(50);

/// Why the agent cannot be had at an address of this host.
#[derive(Debug, thiserror::Error)]
pub(super) enum BridgeError {
    /// The guest has nothing on the agent's port.
    #[error("the agent of {sandbox} does not listen on port {AGENT_PORT}: {source}")]
    NotReady {
        /// The sandbox.
        sandbox: SandboxId,
        /// Why.
        source: ClientError,
    },
    /// The address is not this host's and could not be made so.
    #[error(
        "{address} is not an address of this host, and adding it failed: {source}; as root: ip address add {}/32 dev lo; \
         or choose another with --listen and set FORKD_TARGET to it", address.ip()
    )]
    NotOurs {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// It cannot be listened on.
    #[error("could not listen on {address}: {source}; choose another with --listen and set FORKD_TARGET to it")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
}

/// Reads an address, or a name and a port that has one. An empty one is the usual.
pub(super) fn address(text: &str) -> Result<SocketAddr, String> {
    if text.is_empty() {
        return Ok(usual_address());
    }
    let wrong = |why: &dyn std::fmt::Display| format!("{why}; write ADDRESS:PORT, as in 127.0.0.1:8888 or [::1]:8888");
    let mut found = text.to_socket_addrs().map_err(|error| wrong(&error))?;
    found.next().ok_or_else(|| wrong(&"no address has this name"))
}

/// An address of this host at which the agent is going to be.
#[derive(Debug)]
pub(super) struct Landing {
    address: SocketAddr,
    own: Option<OwnAddress>,
}

impl Landing {
    /// Makes `address` one of this host if it is none.
    pub(super) fn prepare(address: SocketAddr) -> Result<Self, BridgeError> {
        let is_foreign = |ip| {
            let bound = std::net::TcpListener::bind((ip, 0));
            bound.is_err_and(|error| error.kind() == io::ErrorKind::AddrNotAvailable)
        };
        let own = match address.ip() {
            IpAddr::V4(ip) if is_foreign(ip) => {
                OwnAddress::add(ip).map_err(|source| BridgeError::NotOurs { address, source })?
            }
            _ => None,
        };
        Ok(Self { address, own })
    }
}

/// The agent at an address of this host, until this is dropped.
#[derive(Debug)]
pub(super) struct Bridge {
    serving: JoinHandle<()>,
    /// Dropped after the listener, which `serving` holds.
    _own: Option<OwnAddress>,
}

impl Drop for Bridge {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// Where existing clients look for an agent.
pub(super) fn usual_address() -> SocketAddr {
    GUEST_ADDR.parse().expect("the constant is an address")
}

impl Bridge {
    /// Waits for the agent's port in the guest, then listens.
    pub(super) async fn open(
        landing: Landing,
        client: &Client,
        sandbox: &SandboxId,
        progress: &Progress,
    ) -> Result<Self, BridgeError> {
        let Landing { address, own } = landing;
        ready(client, sandbox).await?;
        let listener = TcpListener::bind(address).await.map_err(|source| BridgeError::Listen { address, source })?;
        let (client, sandbox, progress) = (client.clone(), sandbox.clone(), progress.clone());
        let serving = tokio::spawn(async move {
            let ended = port_forward::serve(&listener, &client, &sandbox, AGENT_PORT, &progress).await;
            if let Err(error) = ended {
                progress.warn(format_args!("{address} is not listened on any more: {error}"));
            }
        });
        Ok(Self { serving, _own: own })
    }
}

async fn ready(client: &Client, sandbox: &SandboxId) -> Result<(), BridgeError> {
    let began = Instant::now();
    loop {
        let tried = async { client.quiet_agent(sandbox).await?.tunnel(AGENT_PORT).await };
        match tried.await {
            Ok(_) => return Ok(()),
            Err(ClientError::Agent(_)) if began.elapsed() < READY_LIMIT => tokio::time::sleep(TRY_EVERY).await,
            Err(source) => return Err(BridgeError::NotReady { sandbox: sandbox.clone(), source }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_numbers_or_a_name_with_a_port() {
        assert_eq!(address("127.0.0.1:8888"), Ok(([127, 0, 0, 1], 8888).into()));
        assert_eq!(address("[::1]:80").map(|address| address.port()), Ok(80));
        assert!(address("localhost:8888").is_ok_and(|address| address.ip().is_loopback()));
        // What a script that sets it to nothing means.
        assert_eq!(address(""), Ok(usual_address()));
        for wrong in ["8888", "127.0.0.1", "127.0.0.1:port"] {
            assert!(address(wrong).is_err_and(|why| why.contains("ADDRESS:PORT")), "{wrong}");
        }
    }
}
