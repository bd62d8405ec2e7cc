//! `shell`: a terminal in a sandbox.

use clap::Args;
use forkd_proto::agent::Exec;
use forkd_types::SandboxId;

use super::exec::{session, variable};
use super::{Context, lost, sandbox_error};
use crate::terminal;

/// The user's shell of the guest, else bash, else sh. `$SHELL` is the login shell of the user that was asked for.
const ANY_SHELL: &str = r#"
[ -x "$SHELL" ] && exec "$SHELL"
command -v bash >/dev/null 2>&1 && exec bash
exec sh"#;

/// Arguments of `forkd shell`.
#[derive(Args, Debug)]
pub(crate) struct ShellArgs {
    /// The sandbox
    sandbox: SandboxId,
    /// User name or numeric id
    #[arg(short, long)]
    user: Option<String>,
    /// Set a variable
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Working directory
    #[arg(short = 'w', long, value_name = "DIR", visible_alias = "workdir")]
    cwd: Option<String>,
    /// What to run instead of a shell
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl ShellArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let client = context.client().await?;
        let connection = client.agent(&self.sandbox).await.map_err(sandbox_error)?;
        match session::run(connection, &self.exec()).await {
            Err(error) => Err(lost(&client, error, &self.sandbox).await),
            done => done,
        }
    }

    fn exec(&self) -> Exec {
        let args = if self.command.is_empty() {
            ["sh", "-c", ANY_SHELL].map(str::to_owned).to_vec()
        } else {
            self.command.clone()
        };
        Exec {
            args,
            env: terminal::with_kind(self.env.clone()),
            cwd: self.cwd.clone(),
            user: self.user.clone(),
            stdin: true,
            terminal: Some(terminal::size()),
            ..Exec::default()
        }
    }
}
