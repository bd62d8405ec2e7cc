//! `files`: looking at and changing files of a sandbox; [`cp`](super::cp) carries their contents.

use clap::{Args, Subcommand};
use forkd_types::SandboxId;
use forkd_types::rest::{FileEntry, FileKind};

use super::{Context, sandbox_error};
use crate::{output, units};

/// Arguments of `forkd files`.
#[derive(Args, Debug)]
pub(crate) struct FilesArgs {
    #[command(subcommand)]
    verb: FilesVerb,
}

#[derive(Subcommand, Debug)]
enum FilesVerb {
    /// List a directory
    Ls {
        /// The sandbox
        sandbox: SandboxId,
        /// Absolute path in it
        #[arg(default_value = "/")]
        path: String,
        /// Print the daemon's answer as JSON
        #[arg(long)]
        json: bool,
    },
    /// Describe one file as JSON
    Stat {
        /// The sandbox
        sandbox: SandboxId,
        /// Absolute path in it
        path: String,
    },
    /// Remove a file, or an empty directory
    Rm {
        /// The sandbox
        sandbox: SandboxId,
        /// Absolute path in it
        path: String,
        /// Also what is below it
        #[arg(short, long)]
        recursive: bool,
    },
    /// Make a directory and its parents
    Mkdir {
        /// The sandbox
        sandbox: SandboxId,
        /// Absolute path in it
        path: String,
    },
    /// Rename within one file system
    Mv {
        /// The sandbox
        sandbox: SandboxId,
        /// Absolute path in it
        from: String,
        /// Absolute path in it
        to: String,
    },
}

impl FilesArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let client = context.client().await?;
        match self.verb {
            FilesVerb::Ls { sandbox, path, json } => {
                let entries = client.list_files(&sandbox, &path).await.map_err(sandbox_error)?;
                if json { output::json(&entries)? } else { print(&entries)? }
            }
            FilesVerb::Stat { sandbox, path } => {
                output::json(&client.stat_file(&sandbox, &path).await.map_err(sandbox_error)?)?;
            }
            FilesVerb::Rm { sandbox, path, recursive } => {
                client.remove_file(&sandbox, &path, recursive).await.map_err(sandbox_error)?;
            }
            FilesVerb::Mkdir { sandbox, path } => {
                client.make_directory(&sandbox, &path).await.map_err(sandbox_error)?;
            }
            FilesVerb::Mv { sandbox, from, to } => {
                client.move_file(&sandbox, &from, &to).await.map_err(sandbox_error)?;
            }
        }
        Ok(0)
    }
}

fn print(entries: &[FileEntry]) -> anyhow::Result<()> {
    let mut table = output::table(&["MODE", "OWNER", "SIZE", "MODIFIED", "NAME"]);
    for entry in entries {
        let kind = match entry.kind {
            FileKind::File => "-",
            FileKind::Directory => "d",
            FileKind::Symlink => "l",
            FileKind::Other => "?",
        };
        let target = entry.target.as_ref().map(|target| format!(" -> {target}")).unwrap_or_default();
        table.add_row([
            format!("{kind}{}", entry.mode),
            format!("{}:{}", entry.uid, entry.gid),
            entry.size.to_string(),
            units::age(u64::try_from(entry.modified_unix).unwrap_or_default()),
            format!("{}{target}", entry.name),
        ]);
    }
    output::print_table(&mut table)
}
