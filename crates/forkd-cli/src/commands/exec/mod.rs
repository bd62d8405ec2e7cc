//! `exec`: a program in a sandbox, as if it ran here.

pub(super) mod session;

use std::io::Read;
use std::time::Duration;

use clap::Args;
use forkd_proto::agent::Exec;
use forkd_types::SandboxId;
use serde_json::{Value, json};

use super::{Context, lost, no_sandbox, sandbox_error};
use crate::direct_agent::{DirectAgent, DirectArgs};
use crate::failure::advised;
use crate::{output, terminal};

/// Time limit of a direct request that names none.
const DIRECT_TIMEOUT_SECS: u64 = 30;

/// Arguments of `forkd exec`.
#[derive(Args, Debug)]
pub(crate) struct ExecArgs {
    /// The sandbox
    #[arg(conflicts_with_all = ["target", "child"])]
    sandbox: Option<SandboxId>,
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Run it on a terminal
    #[arg(short, long)]
    tty: bool,
    /// Set a variable
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Working directory
    #[arg(short = 'w', long, value_name = "DIR", visible_alias = "workdir")]
    cwd: Option<String>,
    /// User name or numeric id
    #[arg(short, long)]
    user: Option<String>,
    /// Kill the program and all it started after this long
    #[arg(long, value_name = "SECONDS")]
    timeout_secs: Option<u64>,
    /// Leave it running and return at once
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    detach: bool,
    #[command(flatten)]
    direct: DirectArgs,
    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl ExecArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        match (&self.sandbox, self.direct.agent()) {
            (Some(sandbox), _) => {
                let client = context.client().await?;
                let connection = client.agent(sandbox).await.map_err(sandbox_error)?;
                match session::run(connection, &self.exec()).await {
                    Err(error) => Err(lost(&client, error, sandbox).await),
                    done => done,
                }
            }
            (None, Some(agent)) => self.run_directly(agent).await,
            (None, None) => self.run_directly(DirectAgent::usual().await.ok_or_else(|| no_sandbox("exec"))?).await,
        }
    }

    fn exec(&self) -> Exec {
        let env = if self.tty { terminal::with_kind(self.env.clone()) } else { self.env.clone() };
        Exec {
            args: self.command.clone(),
            env,
            cwd: self.cwd.clone(),
            user: self.user.clone(),
            timeout_ms: self.timeout_secs.map(|seconds| seconds.saturating_mul(1000)),
            stdin: self.interactive,
            terminal: self.tty.then(terminal::size),
            detach: self.detach,
        }
    }

    async fn run_directly(&self, agent: DirectAgent) -> anyhow::Result<u8> {
        if self.interactive {
            // The older protocol has no input; what would be lost is said rather than dropped.
            let mut first = [0];
            if std::io::stdin().read(&mut first)? > 0 {
                anyhow::bail!("--target and --child cannot pass standard input on; name the sandbox instead");
            }
        }
        let seconds = self.timeout_secs.unwrap_or(DIRECT_TIMEOUT_SECS);
        let request = json!({ "action": "exec", "args": self.command, "timeout": seconds });
        let answer = agent.ask(request, Some(Duration::from_secs(seconds))).await?;
        let text = |name: &str| answer.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        if let Some(error) = answer.get("error").and_then(Value::as_str) {
            return Err(anyhow::anyhow!("the agent could not run {:?}: {error}", self.command[0]));
        }
        output::bytes(text("stdout").as_bytes())?;
        if !text("stderr").is_empty() {
            output::remark(text("stderr").trim_end_matches('\n'));
        }
        Ok(exit_code(answer.get("exit_code").and_then(Value::as_i64).unwrap_or(1)))
    }
}

/// The signals that are passed on to the program.
pub(super) const FORWARDED: [i32; 4] = [1, 2, 3, 15];

/// The signals that are passed on to a program on a terminal.
const FORWARDED_ON_TERMINAL: [i32; 2] = [2, 3];

/// The exit code to end with: that of the program, or 128 and the signal that ended it, as shells do.
pub(super) fn exit_code(code: i64) -> u8 {
    if code < 0 { (128 - code).min(255) as u8 } else { (code & 0xff) as u8 }
}

/// The error of a program that ran into its time limit.
pub(super) fn timed_out(command: &str) -> anyhow::Error {
    advised(anyhow::anyhow!("{command:?} was killed at its time limit"), "a larger --timeout-secs, or none")
}

pub(super) fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write NAME=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_signals_become_what_a_shell_reports() {
        for (code, exit) in [(0, 0), (7, 7), (255, 255), (256, 0), (-9, 137), (-15, 143)] {
            assert_eq!(exit_code(code), exit, "{code}");
        }
    }

    #[test]
    fn variables_have_a_name() {
        assert_eq!(variable("A=b=c"), Ok(("A".into(), "b=c".into())));
        assert_eq!(variable("A="), Ok(("A".into(), String::new())));
        assert!(variable("A").is_err() && variable("=b").is_err());
    }
}
