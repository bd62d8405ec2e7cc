//! `cargo bench`: what the monitor costs next to the floor of this host, which is `forkd bench raw`.
//!
//! It is that program, built as for use, with its report on the terminal: nothing is measured here that
//! a user could not measure. Arguments after `--` go to it, for example
//! `cargo bench -- --n 100 --memory 128M --memory 4G --json`.

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode, String> {
    // Cargo tells a benchmark that it is one.
    let arguments: Vec<OsString> = std::env::args_os().skip(1).filter(|argument| argument != "--bench").collect();
    let forkd = Path::new(env!("CARGO_BIN_EXE_forkd"));
    build_monitor_beside(forkd)?;
    let mut bench = Command::new(forkd);
    // The compiled floor and the scratch files stay out of this user's data.
    bench.args(["bench", "raw"]).args(arguments).env("XDG_DATA_HOME", env!("CARGO_TARGET_TMPDIR"));
    let status = bench.status().map_err(|error| format!("cannot run {}: {error}", forkd.display()))?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Cargo builds the programs of this package for its benchmarks, not those of others.
fn build_monitor_beside(forkd: &Path) -> Result<(), String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .args(["build", "--release", "--locked", "--quiet", "--package", "forkd-vmm", "--bin", "forkd-vmm"])
        .status()
        .map_err(|error| format!("cannot run cargo: {error}"))?;
    let monitor = forkd.with_file_name("forkd-vmm");
    if built.success() && monitor.is_file() {
        return Ok(());
    }
    Err(format!("{} could not be built: cargo build --release --bin forkd-vmm", monitor.display()))
}
