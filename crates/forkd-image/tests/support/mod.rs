//! What the tests of real kernels and disks share.

#![allow(dead_code, unreachable_pub, clippy::print_stdout, clippy::print_stderr)]

use std::path::{Path, PathBuf};
use std::process::Command;

use forkd_image::kernel::{self, Kernel, KernelChoice};
use forkd_image::{ImageError, Progress};

/// The cache that all tests share (the test kit's), so that each kernel and disk is made once.
pub fn cache() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/testkit/forkd/cache"))
}

/// Shows progress in the captured output of a test.
pub fn show(progress: Progress<'_>) {
    let percent = progress.fraction.map_or(String::new(), |fraction| format!("{:3.0} % ", fraction * 100.0));
    println!("{percent}{}", progress.step);
}

/// Says that a test could not run, and why.
pub fn skip(why: &str) {
    println!("SKIPPED: {why}");
    eprintln!("SKIPPED: {why}");
}

/// Installs a kernel, or says why not when this machine is offline.
pub fn kernel(choice: &KernelChoice) -> Option<Kernel> {
    match kernel::install(choice, &cache(), &mut show) {
        Ok(kernel) => Some(kernel),
        Err(error @ (ImageError::NoNetwork { .. } | ImageError::MissingTool { .. })) => {
            skip(&error.to_string());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Whether a program is installed.
pub fn has(program: &str) -> bool {
    Command::new("sh")
        .args(["-c", "command -v \"$0\" >/dev/null", program])
        .status()
        .is_ok_and(|status| status.success())
}

/// Runs a program and returns what it wrote; panics with it when it fails.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program).args(arguments).env("PATH", path).output().expect(program);
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}

/// Runs a test of `program`, one that is ignored otherwise, in a process of its own under `wrapper`, with `first_in_path` before all other programs. Returns what it said; panics when it fails.
pub fn run_apart(program: &Path, test: &str, wrapper: &[&str], first_in_path: Option<&Path>) -> String {
    let program = program.display().to_string();
    let command = [wrapper, &[&program, "--exact", test, "--ignored", "--nocapture"]].concat();
    let mut path = std::env::var("PATH").unwrap_or_default();
    if let Some(first) = first_in_path {
        path = format!("{}:{path}", first.display());
    }
    let output = Command::new(command[0]).args(&command[1..]).env("PATH", path).output().expect("runs");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("1 passed"), "{command:?}: {text}");
    text
}
