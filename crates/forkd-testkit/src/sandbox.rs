//! One sandbox of a test; it is killed when it goes out of scope.

use anyhow::{Result, bail};
use forkd_types::SandboxId;
use forkd_types::rest::SandboxInfo;
use serde::Deserialize;

use crate::{Host, Output};

/// A running sandbox.
#[derive(Debug)]
pub struct Sandbox<'a> {
    host: &'a Host,
    /// What the daemon said about it when it was made.
    pub info: SandboxInfo,
}

/// What `forkd eval --json` prints.
#[derive(Debug, Deserialize)]
struct Evaluated {
    result: Option<String>,
    error: Option<String>,
}

impl<'a> Sandbox<'a> {
    pub(crate) fn new(host: &'a Host, info: SandboxInfo) -> Self {
        Self { host, info }
    }

    /// Its id.
    pub fn id(&self) -> &SandboxId {
        &self.info.id
    }

    /// Runs a program; `exec`'s own options may come first in `options`.
    pub fn exec_with(&self, options: &[&str], command: &[&str]) -> Result<Output> {
        let mut arguments = vec!["exec"];
        arguments.extend(options);
        arguments.extend([self.id().as_str(), "--"]);
        arguments.extend(command);
        self.host.forkd(&arguments)
    }

    /// Runs a program that must succeed and returns what it printed, trailing newline removed.
    pub fn exec(&self, command: &[&str]) -> Result<String> {
        Ok(self.exec_with(&[], command)?.success()?.trim_end_matches('\n').to_owned())
    }

    /// Runs a shell script that must succeed.
    pub fn sh(&self, script: &str) -> Result<String> {
        self.exec(&["sh", "-c", script])
    }

    /// Evaluates Python source and returns the `repr` of its value.
    pub fn eval(&self, source: &str) -> Result<String> {
        let output = self.host.forkd(&["eval", "--json", "--timeout-secs", "120", self.id().as_str(), "--", source])?;
        let stdout = output.stdout.clone();
        let evaluated: Evaluated = serde_json::from_str(&stdout)
            .map_err(|_| anyhow::anyhow!("`eval {source}`: {}\n{}", output.stdout, output.stderr))?;
        match (evaluated.result, evaluated.error) {
            (_, Some(error)) => bail!("`eval {source}` raised:\n{error}"),
            (result, None) => Ok(result.unwrap_or_default()),
        }
    }

    /// Makes `n` running copies of it, all of which must come up.
    pub fn branch(&self, n: u32) -> Result<Vec<Sandbox<'a>>> {
        self.host.collect_children(n, &["branch", self.id().as_str(), "-n", &n.to_string(), "--json"])
    }

    /// Makes one running copy of it.
    pub fn branch_once(&self) -> Result<Sandbox<'a>> {
        Ok(self.branch(1)?.remove(0))
    }

    /// Waits until its machine has ended by itself and returns the reason that is given.
    pub fn wait_for_end(&self) -> Result<String> {
        let mut reason = None;
        self.host.wait_until(&format!("{} has ended", self.id()), || {
            let all = self.host.sandboxes()?;
            reason = all.into_iter().find(|info| info.id == *self.id()).and_then(|info| info.stopped);
            Ok(reason.is_some())
        })?;
        Ok(reason.unwrap_or_default())
    }

    /// Kills it now and says how that went.
    pub fn kill(&self) -> Result<Output> {
        self.host.forkd(&["kill", self.id().as_str()])
    }

    /// Process id of its monitor on the daemon's host.
    pub fn monitor_pid(&self) -> Result<String> {
        self.info.pid.map(|pid| pid.to_string()).ok_or_else(|| anyhow::anyhow!("{} has no monitor", self.id()))
    }
}

impl Drop for Sandbox<'_> {
    fn drop(&mut self) {
        // It may be dead already, which is what some tests are about.
        let _ = self.kill();
    }
}
