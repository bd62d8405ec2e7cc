//! Who may connect and how much they may ask for, from settings to what the listeners use, and what of it is taken up
//! while the daemon runs.

use std::io;
use std::net::ToSocketAddrs;
use std::time::Duration;

use anyhow::{Context, bail};
use forkd_api::auth::{Guard, Keyring, Peers, Token, TokensError, group_id};
use forkd_api::limits::RequestLimits;
use forkd_api::reload;
use forkd_api::server::ServerLimits;
use forkd_api::server::tls::Tls;
use rustix::process::{Resource, getrlimit};
use tokio::sync::watch;

use crate::args::AccessArgs;

/// How often files are looked at for changes.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How much of the descriptors that this process may have each listener may use: sandboxes need some too.
const SHARE_OF_DESCRIPTORS: u64 = 3;

/// What the listeners ask of their clients.
#[derive(Debug)]
pub(crate) struct Access {
    /// The bearer tokens, if there are any.
    keyring: Option<Keyring>,
    /// The certificate, if there is one.
    pub(crate) tls: Option<Tls>,
    /// The group that the socket is for.
    pub(crate) group: Option<u32>,
    requests: RequestLimits,
    connections: ServerLimits,
}

impl Access {
    /// Reads what `args` name, for a daemon that listens on the TCP `address`.
    pub(crate) fn resolve(args: AccessArgs, address: Option<&str>) -> anyhow::Result<Self> {
        if address.is_none() && args.tls_cert.is_some() {
            bail!("--tls-cert protects TCP, and --no-tcp turns that off; leave out one of them");
        }
        let single = args.token_file.as_deref().map(Token::read).transpose()?;
        let keyring = match (single, args.tokens) {
            (None, None) => None,
            (single, tokens) => Some(Keyring::open(single, tokens).map_err(advised)?),
        };
        let tls = match (&args.tls_cert, &args.tls_key) {
            (Some(certificates), Some(key)) => Some(Tls::open(certificates, key)?),
            _ => None,
        };
        if let Some(address) = address {
            check_address(address, keyring.as_ref(), tls.is_some())?;
        }
        Ok(Self {
            keyring,
            tls,
            group: args.socket_group.as_deref().map(group_id).transpose()?,
            requests: RequestLimits { rate: args.rate_limit, in_flight: args.max_in_flight },
            connections: ServerLimits {
                connections: args.max_connections,
                header: args.header_timeout,
                idle: args.idle_timeout,
            },
        })
    }

    /// What TCP clients must pass.
    pub(crate) fn tcp(&self) -> Guard {
        match &self.keyring {
            Some(keyring) => Guard::tokens(keyring.clone(), self.requests),
            None => Guard::open(self.requests),
        }
    }

    /// What clients of the unix socket must pass.
    pub(crate) fn unix(&self) -> Guard {
        Guard::socket(Peers::new(self.group))
    }

    /// What each listener allows, as far as this process has descriptors for it.
    pub(crate) fn connections(&self) -> ServerLimits {
        let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let affordable = usize::try_from(descriptors / SHARE_OF_DESCRIPTORS).unwrap_or(usize::MAX).max(1);
        if affordable < self.connections.connections {
            tracing::warn!(
                descriptors,
                "each listener holds {affordable} connections open at most; raise the limit of open files (LimitNOFILE)"
            );
        }
        ServerLimits { connections: self.connections.connections.min(affordable), ..self.connections }
    }

    /// Takes up new tokens and a new certificate when their files change, and when `asked` says so.
    pub(crate) fn follow(&self, asked: &watch::Receiver<()>) {
        if let Some((keyring, path)) =
            self.keyring.clone().and_then(|keyring| Some((keyring.clone(), keyring.path()?.clone())))
        {
            let reloading =
                reload::on_change(&[&path.clone()], LOOK_EVERY, asked.clone(), move || match keyring.reload() {
                    Ok(count) => tracing::info!(path = %path.display(), count, "read the tokens anew"),
                    Err(error) => {
                        tracing::error!("the tokens known so far stay in force: {:#}", anyhow::Error::new(error))
                    }
                });
            tokio::spawn(reloading);
        }
        if let Some(tls) = self.tls.clone() {
            let files = tls.clone();
            let reloading = reload::on_change(&files.paths(), LOOK_EVERY, asked.clone(), move || match tls.reload() {
                Ok(()) => tracing::info!("read the certificate anew"),
                Err(error) => tracing::error!("the certificate in use stays: {:#}", anyhow::Error::new(error)),
            });
            tokio::spawn(reloading);
        }
    }
}

/// A file that is missing is made by its first token.
fn advised(error: TokensError) -> anyhow::Error {
    let missing = matches!(&error, TokensError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound);
    match missing {
        true => anyhow::Error::new(error).context("make the first token with `forkd-controller token create`"),
        false => error.into(),
    }
}

/// Whoever can connect can run programs: without a token that must be this host's users only.
fn check_address(address: &str, keyring: Option<&Keyring>, encrypted: bool) -> anyhow::Result<()> {
    let mut resolved = address.to_socket_addrs().with_context(|| format!("cannot resolve the address {address}"))?;
    let open = resolved.find(|address| !address.ip().is_loopback());
    match (keyring, open) {
        (None, Some(open)) => {
            bail!("{open} can be reached from other hosts; give --token-file or --tokens, or listen on 127.0.0.1")
        }
        (Some(_), Some(open)) if !encrypted => {
            tracing::warn!(address = %open, "tokens cross the network unencrypted; give --tls-cert and --tls-key");
        }
        _ => {}
    }
    if keyring.is_some_and(Keyring::is_empty) {
        tracing::warn!(
            "there is no token yet, so nobody gets in over TCP; make one with `forkd-controller token create`"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_may_go_without_a_token() {
        for closed in ["127.0.0.1:8889", "127.9.9.9:1", "[::1]:8889"] {
            check_address(closed, None, false).expect(closed);
        }
        for open in ["0.0.0.0:8889", "[::]:8889", "192.0.2.1:1"] {
            assert!(check_address(open, None, true).is_err(), "{open}");
        }
    }
}
