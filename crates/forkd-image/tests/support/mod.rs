//! What the tests of real kernels and disks share.

#![allow(dead_code, unreachable_pub, clippy::print_stdout, clippy::print_stderr)]

use std::path::PathBuf;
use std::process::Command;

use forkd_image::kernel::{self, Kernel, KernelChoice};
use forkd_image::{ImageError, Progress};

/// A cache that outlives the test, so that a second run downloads nothing.
pub fn cache() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("image-cache")
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
