//! How the daemon is found, or brought up where none runs.
//!
//! In this order:
//!
//! 1. the address given by `--daemon-url` or `FORKD_URL`;
//! 2. the unix socket of this user's daemon, if it answers;
//! 3. this user's `forkd machine`, if it runs;
//! 4. the system's daemon, on its unix socket or the usual TCP port, if it answers and lets us in;
//! 5. where guest code runs at hardware speed under `/dev/kvm`: a local daemon, started now;
//! 6. else `forkd machine`, started now, and the daemon inside it.
//!
//! Only 5 and 6 say so, in one line, because only they change something.

use crate::client::{Address, Client, ClientError};
use crate::daemon;
use crate::data_dir::DataDir;
use crate::failure::{Advise, advised};
use crate::machine;
use crate::progress::Progress;

/// The socket of a daemon that the system runs.
const SYSTEM_SOCKET: &str = "/var/lib/forkd/forkd.sock";

/// What the command line and the environment say about the daemon.
#[derive(Clone, Debug, Default)]
pub(crate) struct DaemonChoice {
    /// Its address, if one was given.
    pub(crate) url: Option<String>,
    /// The token to present, if one was given.
    pub(crate) token: Option<String>,
}

/// Where the daemon that answers is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// Where `--daemon-url` or `FORKD_URL` says.
    Given,
    /// On this host.
    Local,
    /// Inside `forkd machine`.
    Machine,
}

/// A daemon that answers.
#[derive(Clone, Debug)]
pub(crate) struct Endpoint {
    /// How to talk to it.
    pub(crate) client: Client,
    /// Where it is.
    pub(crate) place: Place,
}

/// Finds a daemon that runs; starts nothing.
pub(crate) async fn find(choice: &DaemonChoice, data: &DataDir) -> anyhow::Result<Option<Endpoint>> {
    if let Some(url) = &choice.url {
        return given(url, choice.token.clone()).await.map(Some);
    }
    if let Some(endpoint) = answering(Address::Unix(data.daemon_socket()), choice).await? {
        return Ok(Some(endpoint));
    }
    if let Some(access) = machine::running(data).await {
        return Ok(Some(in_machine(access)));
    }
    for address in [Address::Unix(SYSTEM_SOCKET.into()), Address::usual()] {
        if let Some(endpoint) = answering(address, choice).await? {
            return Ok(Some(endpoint));
        }
    }
    Ok(None)
}

/// Finds a daemon that runs, or starts one.
pub(crate) async fn find_or_start(
    choice: &DaemonChoice,
    data: &DataDir,
    progress: &Progress,
) -> anyhow::Result<Endpoint> {
    if let Some(endpoint) = find(choice, data).await? {
        return Ok(endpoint);
    }
    let verdict = machine::probe().await;
    if verdict.is_usable() {
        progress.say(format_args!("==> Starting a daemon on this host: {}", verdict.reason()));
        let socket = daemon::start(data, choice.token.as_deref(), progress).await?;
        return Ok(Endpoint { client: Client::new(Address::Unix(socket), None), place: Place::Local });
    }
    progress.say(format_args!("==> Using `forkd machine`: {}", verdict.reason()));
    machine::ensure_running(data, progress).await.map(in_machine)
}

async fn given(url: &str, token: Option<String>) -> anyhow::Result<Endpoint> {
    let address: Address = url.parse().map_err(|error: crate::client::AddressError| {
        anyhow::Error::from(crate::failure::UsageError(format!("--daemon-url: {error}")))
    })?;
    let client = Client::new(address, token);
    match client.probe().await {
        Ok(_) => Ok(Endpoint { client, place: Place::Given }),
        Err(error) if error.status() == Some(http::StatusCode::UNAUTHORIZED) => {
            Err(advised(error, "set FORKD_TOKEN (or --daemon-token) to the daemon's token"))
        }
        Err(error) => Err(error).advise(
            "forkd-controller serve   (on the daemon's host), or unset FORKD_URL to use or start a daemon here",
        ),
    }
}

/// The daemon of this host at `address` if it answers and accepts us. One that is there but hangs is
/// an error only on a unix socket, where nobody else can be meant.
async fn answering(address: Address, choice: &DaemonChoice) -> anyhow::Result<Option<Endpoint>> {
    let ours = address.is_unix();
    let client = Client::new(address, choice.token.clone());
    match client.probe().await {
        Ok(_) => Ok(Some(Endpoint { client, place: Place::Local })),
        Err(error @ ClientError::Silent { .. }) if ours => {
            Err(advised(error, "forkd doctor   (the daemon hangs; its log is daemon.log in `forkd where`)"))
        }
        Err(_) => Ok(None),
    }
}

fn in_machine(access: machine::Access) -> Endpoint {
    Endpoint { client: Client::new(access.api, Some(access.token)), place: Place::Machine }
}

impl Place {
    /// In words, for tables and reports.
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::Given => "the given address",
            Self::Local => "this host",
            Self::Machine => "forkd machine",
        }
    }
}
