//! `cp`: files and trees between this host and a sandbox.
//!
//! The rules are those of `docker cp`: what is copied to a directory that is there goes into it, under its own name;
//! a directory written `DIR/.` gives its contents rather than itself; `-` is a tar stream on standard input or
//! output. Files are carried whole and appear under their name when the last byte has come; trees go as tar streams,
//! which the agent makes and unpacks, so the guest needs no tar.
//!
//! What comes in belongs to root there unless `--archive` asks for the owners here; what goes out belongs to whoever
//! runs this.

mod download;
mod pipe;
mod place;
mod upload;

use clap::Args;
use forkd_proto::agent::{FailureCode, FileInfo, FileType};
use forkd_types::SandboxId;

use self::place::Place;
use super::{Context, sandbox_error};
use crate::client::{Client, ClientError};
use crate::failure::{UsageError, advised};
use crate::interrupt::Interrupts;

/// Arguments of `forkd cp`.
#[derive(Args, Debug)]
pub(crate) struct CpArgs {
    /// SANDBOX:PATH, a path of this host, or - for a tar stream on standard input
    source: Place,
    /// SANDBOX:PATH, a path of this host, or - for a tar stream on standard output
    destination: Place,
    /// Keep owner and group, by their numbers, when copying a tree to a sandbox
    #[arg(short, long)]
    archive: bool,
}

impl CpArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let mut interrupts = Interrupts::catch()?;
        let copying = async {
            match (&self.source, &self.destination) {
                (Place::Guest(sandbox, path), Place::Here(to)) => {
                    let guest = Guest::of(context, sandbox).await?;
                    download::to_path(&guest, path, to, &context.progress).await
                }
                (Place::Guest(sandbox, path), Place::Stream) => {
                    download::to_stream(&Guest::of(context, sandbox).await?, path).await
                }
                (Place::Here(from), Place::Guest(sandbox, path)) => {
                    let guest = Guest::of(context, sandbox).await?;
                    upload::from_path(&guest, from, path, self.archive, &context.progress).await
                }
                (Place::Stream, Place::Guest(sandbox, path)) => {
                    upload::from_stream(&Guest::of(context, sandbox).await?, path, self.archive).await
                }
                _ => {
                    let error = UsageError("one side must be SANDBOX:PATH, the other a path of this host or -".into());
                    Err(advised(error, "forkd cp SANDBOX:/etc/hosts ."))
                }
            }
        };
        interrupts.guard(copying).await.map(|()| 0)
    }
}

/// The sandbox that is copied from or to.
struct Guest {
    client: Client,
    sandbox: SandboxId,
}

impl Guest {
    async fn of(context: &Context, sandbox: &SandboxId) -> anyhow::Result<Self> {
        Ok(Self { client: context.client().await?, sandbox: sandbox.clone() })
    }

    async fn connect(&self) -> anyhow::Result<crate::client::AgentConnection> {
        self.client.quiet_agent(&self.sandbox).await.map_err(sandbox_error)
    }

    /// What is at `path`; none when nothing is.
    async fn stat(&self, path: &str) -> anyhow::Result<Option<FileInfo>> {
        match self.connect().await?.stat(path).await {
            Ok(info) => Ok(Some(info)),
            Err(ClientError::Agent(failure)) if failure.code == FailureCode::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether `path`, or what it links to, is a directory.
    async fn is_directory(&self, path: &str) -> anyhow::Result<bool> {
        match self.stat(path).await? {
            Some(FileInfo { file_type: FileType::Directory, .. }) => Ok(true),
            Some(FileInfo { file_type: FileType::Symlink, .. }) => {
                let inside = format!("{}/.", path.trim_end_matches('/'));
                // A link to a file has no inside.
                Ok(self.connect().await?.stat(&inside).await.is_ok())
            }
            _ => Ok(false),
        }
    }
}
