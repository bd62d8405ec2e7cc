//! Runs the workspace's test programs, as many at a time as there are processors. Many of them wait for other
//! programs, or have one long test; one after the other, as `cargo test` runs them, they leave processors idle.

use std::io::BufReader;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use cargo_metadata::camino::Utf8PathBuf;
use cargo_metadata::{Artifact, Message};

use crate::say;

/// A test program that cargo has built.
struct Program {
    path: Utf8PathBuf,
    /// Where cargo would run it.
    directory: Utf8PathBuf,
    title: String,
}

/// Builds what `selection`, arguments of `cargo test`, names, and runs it. Fails when a test does, after all have run.
pub(crate) fn run(selection: &[String]) -> Result<()> {
    let programs = build(selection)?;
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(Vec::new());
    let workers = std::thread::available_parallelism()?.get().min(programs.len());
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(program) = programs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = run_one(program);
                    let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                    match outcome {
                        Ok(true) => {}
                        Ok(false) => failed.push(program.title.clone()),
                        Err(error) => failed.push(format!("{}: {error:#}", program.title)),
                    }
                }
            });
        }
    });
    let mut failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    if failed.is_empty() {
        return Ok(());
    }
    failed.sort();
    bail!("{} of {} test programs failed:\n  {}", failed.len(), programs.len(), failed.join("\n  "))
}

fn build(selection: &[String]) -> Result<Vec<Program>> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["test", "--no-run", "--message-format=json-render-diagnostics"]).args(selection);
    // What cargo tells this program of its own package; a build script that looks at it would run again each time.
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")) {
            cargo.env_remove(name);
        }
    }
    let mut cargo = cargo.stdout(Stdio::piped()).spawn().context("cannot run cargo")?;
    let mut programs = Vec::new();
    if let Some(messages) = cargo.stdout.take() {
        for message in Message::parse_stream(BufReader::new(messages)) {
            if let Message::CompilerArtifact(artifact) = message.context("cargo's messages")? {
                programs.extend(program(artifact));
            }
        }
    }
    if !cargo.wait()?.success() {
        bail!("the tests cannot be built");
    }
    programs.sort_by(|a, b| a.title.cmp(&b.title));
    Ok(programs)
}

/// The program of an artifact, if it is one of tests.
fn program(artifact: Artifact) -> Option<Program> {
    let path = artifact.executable.filter(|_| artifact.profile.test)?;
    let directory = artifact.manifest_path.parent()?.to_owned();
    let source = artifact.target.src_path.strip_prefix(&directory).unwrap_or(&artifact.target.src_path);
    let title = format!("{} {source}", directory.file_name()?);
    Some(Program { path, directory, title })
}

/// Runs a program; what it says is shown in one piece when it has ended.
fn run_one(program: &Program) -> Result<bool> {
    let began = Instant::now();
    let output = Command::new(&program.path)
        .current_dir(&program.directory)
        .env("CARGO_MANIFEST_DIR", &program.directory)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", Path::new(&program.path).display()))?;
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned());
    let text: Vec<_> = text.into_iter().filter(|text| !text.is_empty()).collect();
    say(&format!("==> {} ({:.1} s)\n{}", program.title, began.elapsed().as_secs_f64(), text.join("\n")));
    Ok(output.status.success())
}
