//! The verbs, one file each (or one for a few that belong together).
//!
//! A verb's arguments are a struct that resolves them; its `run` returns the exit code, or an error
//! that `main` renders.

pub(crate) mod bake;
pub(crate) mod branch;
pub(crate) mod checkpoints;
pub(crate) mod cleanup;
pub(crate) mod cp;
pub(crate) mod env;
pub(crate) mod eval;
pub(crate) mod events;
pub(crate) mod exec;
pub(crate) mod files;
pub(crate) mod fork;
pub(crate) mod hub;
pub(crate) mod images;
pub(crate) mod kernel;
pub(crate) mod layers;
pub(crate) mod machine;
pub(crate) mod man;
pub(crate) mod mcp;
pub(crate) mod packs;
pub(crate) mod ping;
pub(crate) mod port_forward;
pub(crate) mod quickstart;
pub(crate) mod run;
pub(crate) mod sandboxes;
pub(crate) mod shell;
pub(crate) mod spawn;
pub(crate) mod tree;
pub(crate) mod verify;
pub(crate) mod workspace;

use std::time::Duration;

use forkd_types::SandboxId;

use crate::client::{Client, ClientError};
use crate::data_dir::DataDir;
use crate::endpoint::{self, DaemonChoice, Endpoint};
use crate::failure::{UsageError, advised};
use crate::output;
use crate::progress::Progress;

/// What every verb is given.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    /// Where progress goes.
    pub(crate) progress: Progress,
    /// Where files go.
    pub(crate) data: DataDir,
    /// What is known about the daemon.
    pub(crate) daemon: DaemonChoice,
}

impl Context {
    /// The daemon; started when there is none.
    pub(crate) async fn endpoint(&self) -> anyhow::Result<Endpoint> {
        endpoint::find_or_start(&self.daemon, &self.data, &self.progress).await
    }

    /// A client of the daemon; started when there is none.
    pub(crate) async fn client(&self) -> anyhow::Result<Client> {
        Ok(self.endpoint().await?.client)
    }
}

/// `forkd where`.
pub(crate) fn where_(context: &Context) -> anyhow::Result<u8> {
    output::line(context.data.root().display())?;
    Ok(0)
}

/// Adds to an error what to type when the sandbox is not there.
fn sandbox_error(error: ClientError) -> anyhow::Error {
    match error.status() {
        Some(http::StatusCode::NOT_FOUND) => advised(error, "forkd ls"),
        _ => error.into(),
    }
}

/// The error of a connection to the agent of `sandbox`: when that ended meanwhile, how it did, and else what to type.
async fn lost(client: &Client, error: anyhow::Error, sandbox: &SandboxId) -> anyhow::Error {
    if let Some(ClientError::Frame(_)) = error.downcast_ref::<ClientError>() {
        // The connection ends with the machine; the daemon knows a moment later why.
        for _ in 0..10 {
            match client.sandbox(sandbox).await.map(|info| info.stopped) {
                Ok(Some(reason)) => {
                    let ended = anyhow::anyhow!("sandbox {sandbox} {reason}");
                    return advised(ended, format!("forkd logs {sandbox}"));
                }
                Ok(None) => tokio::time::sleep(Duration::from_millis(100)).await,
                Err(_) => break,
            }
        }
    }
    silent(error, sandbox)
}

/// Adds to an error what to type when the guest of `sandbox` is silent.
fn silent(error: anyhow::Error, sandbox: &SandboxId) -> anyhow::Error {
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::Late { .. }) => {
            advised(error, format!("forkd logs {sandbox}   (what its guest said last), or: forkd kill {sandbox}"))
        }
        _ => error,
    }
}

/// Adds to an error what to type when the snapshot is not there or not usable.
pub(crate) fn snapshot_error(error: ClientError) -> anyhow::Error {
    match error.status() {
        Some(http::StatusCode::NOT_FOUND) => {
            advised(error, "forkd images   (or make one: forkd from-image debian:bookworm --tag NAME)")
        }
        Some(http::StatusCode::CONFLICT) => advised(error, "forkd images"),
        _ => error.into(),
    }
}

/// [`snapshot_error`] for an error that may have other causes.
pub(crate) fn spawn_error(error: anyhow::Error) -> anyhow::Error {
    match error.downcast::<ClientError>() {
        Ok(error) => snapshot_error(error),
        Err(error) => error,
    }
}

/// The error for a verb that was given no sandbox.
fn no_sandbox(verb: &str) -> anyhow::Error {
    advised(UsageError(format!("no sandbox given: forkd {verb} SANDBOX …")), "forkd ls")
}
