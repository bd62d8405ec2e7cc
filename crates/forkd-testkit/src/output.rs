//! What a program printed and how it ended.

use std::process::ExitStatus;

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;

/// The outcome of one `forkd` command.
#[derive(Debug, Clone)]
pub struct Output {
    /// The command, for messages.
    pub command: String,
    /// Exit code; -1 when a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    pub(crate) fn new(command: String, status: ExitStatus, stdout: Vec<u8>, stderr: Vec<u8>) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self { command, code: status.code().unwrap_or(-1), stdout: text(stdout), stderr: text(stderr) }
    }

    /// Standard output of a command that must have succeeded.
    pub fn success(self) -> Result<String> {
        if self.code != 0 {
            bail!(
                "`{}` ended with {}\n--- stdout\n{}\n--- stderr\n{}",
                self.command,
                self.code,
                self.stdout,
                self.stderr
            );
        }
        Ok(self.stdout)
    }

    /// Standard output of a command that must have succeeded, as JSON.
    pub fn json<T: DeserializeOwned>(self) -> Result<T> {
        let command = self.command.clone();
        let text = self.success()?;
        serde_json::from_str(&text).with_context(|| format!("`{command}` printed unexpected JSON: {text}"))
    }

    /// Standard error of a command that must have failed with `code`.
    pub fn failure(self, code: i32) -> Result<String> {
        if self.code != code {
            bail!("`{}` ended with {} instead of {code}\n{}\n{}", self.command, self.code, self.stdout, self.stderr);
        }
        Ok(self.stderr)
    }
}

/// For assertions on what a program said, which show the text when they fail.
pub trait Said {
    /// Fails unless the text holds every one of `parts`.
    fn says(&self, parts: &[&str]) -> Result<()>;
}

impl<T: AsRef<str>> Said for T {
    fn says(&self, parts: &[&str]) -> Result<()> {
        let text = self.as_ref();
        for part in parts {
            if !text.contains(part) {
                bail!("expected to read {part:?} in:\n{text}");
            }
        }
        Ok(())
    }
}
