//! Programs that are measured, and the C programs that measure the floor.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use tokio::process::Command;

use crate::commands::Context;
use crate::failure::{Advise, advised};
use crate::programs;

/// How long one run may take; a KVM that is emulated badly hangs rather than fails.
const RUN_TIMEOUT: Duration = Duration::from_secs(120);

/// A C program of `limits/`, part of this program so that a benchmark needs no checkout.
pub(super) struct FloorProgram {
    pub(super) name: &'static str,
    pub(super) source: &'static str,
}

impl FloorProgram {
    /// Compiles it, unless this very source was compiled before.
    pub(super) async fn compile(&self, context: &Context) -> anyhow::Result<PathBuf> {
        let directory = context.data.bench()?;
        let hash = blake3::hash(self.source.as_bytes()).to_hex();
        let program = directory.join(format!("{}-{}", self.name, &hash[..16]));
        if program.is_file() {
            return Ok(program);
        }
        let step = context.progress.step("Compiling the floor");
        let compiler = programs::in_path("cc").or_else(|| programs::in_path("gcc")).ok_or_else(|| {
            advised(
                anyhow::anyhow!("no C compiler: the floor is compiled where it is measured"),
                "sudo apt-get install gcc libc6-dev",
            )
        })?;
        let scratch = tempfile::tempdir_in(&directory)?;
        let source = scratch.path().join(format!("{}.c", self.name));
        std::fs::write(&source, self.source)?;
        let built = scratch.path().join(self.name);
        let mut command = Command::new(compiler);
        command.args(["-O2", "-static", "-o"]).arg(&built).arg(&source);
        run(command, "cc").await.advise("sudo apt-get install gcc libc6-dev")?;
        std::fs::rename(&built, &program)?;
        step.done("Compiled the floor");
        Ok(program)
    }
}

/// Runs a program to its end within the time limit and gives its standard output.
pub(super) async fn run(mut command: Command, what: &str) -> anyhow::Result<String> {
    let child = command.kill_on_drop(true).stdin(std::process::Stdio::null()).output();
    let output = tokio::time::timeout(RUN_TIMEOUT, child)
        .await
        .map_err(|_| advised(anyhow::anyhow!("{what} did not end within {} s", RUN_TIMEOUT.as_secs()), "forkd doctor"))?
        .with_context(|| format!("could not run {what}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(advised(anyhow::anyhow!("{what} failed ({}): {said}", output.status), "forkd doctor   (is /dev/kvm usable?)"))
}

/// A value in what a floor prints: `… NAME=VALUE …`.
pub(super) fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}
