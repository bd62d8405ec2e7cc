//! How long a test waits, and when it may begin again.
//!
//! Under `forkd machine` by translation, guests run on QEMU's emulation of nested virtualisation. It
//! has a defect that ends or wedges about one guest in two hundred: when the first touch of a page
//! coincides with an interrupt that is being injected, the guest goes on at an address of the outer
//! kernel (seen in traces as endless faults at an instruction of `__svm_vcpu_run`). The outer machine
//! itself dies now and then too, and is healed by a restart. Neither says anything about forkd, so a
//! test that fails *by losing its guest* is run again there, loudly. On hardware KVM no test is.

use std::io::Read;
use std::process::Child;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::{Host, Output};

/// How long one command may take before it is taken for hung.
const PATIENCE: Duration = Duration::from_secs(300);
/// How often a test that lost its guest is begun.
const ATTEMPTS: u32 = 6;
/// What a test says when its guest or the machine around it was lost.
const LOST: [&str; 24] = [
    "was taken for hung",
    "no answer within",
    "closed the connection",
    "connection closed",
    "early eof",
    "broke during",
    "did not answer",
    "did not accept",
    "children came up",
    "were lost",
    "asked for a reboot",
    "is not running",
    "time limit",
    "the machine",
    "did not leave the guest",
    "no forkd daemon answers",
    // The same, as clients in Python and JavaScript say it.
    "Remote end closed connection",
    "Connection refused",
    "Connection reset by peer",
    "Server disconnected",
    "All connection attempts failed",
    "ECONNREFUSED",
    "ECONNRESET",
    "fetch failed",
];

/// Runs a test on real guests; see the module for when it is begun again.
pub fn on_real_guests(test: impl Fn(&Host) -> Result<()>) -> Result<()> {
    let host = Host::shared()?;
    for attempt in 1.. {
        let Err(error) = test(host) else { return Ok(()) };
        let text = format!("{error:#}");
        let lost = LOST.iter().any(|sign| text.contains(sign));
        if attempt == ATTEMPTS || !lost || !host.in_machine()? {
            return Err(error);
        }
        say(&format!("RETRIED: a guest was lost in the translated machine (attempt {attempt}): {text}"));
        // A machine that died is started again by whatever asks for the daemon, which not every test does first.
        let _ = host.forkd(&["ls"])?;
    }
    unreachable!("the loop ends by returning")
}

/// Waits for a command that was started by hand; `command` is for the message.
pub fn finish(mut child: Child, command: &str) -> Result<std::process::ExitStatus> {
    let end = std::time::Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if std::time::Instant::now() > end {
            child.kill()?;
            child.wait()?;
            bail!("`{command}` was taken for hung after {PATIENCE:?}");
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Does `work` with `program`, which is killed when that takes too long.
pub(crate) fn watched<T>(program: &mut Child, work: impl FnOnce() -> Result<T>) -> Result<T> {
    thread::scope(|scope| {
        let (done, waiting) = mpsc::channel::<()>();
        let watch = scope.spawn(move || {
            let hung = waiting.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout);
            if hung {
                let _ = program.kill();
            }
            hung
        });
        let outcome = work();
        drop(done);
        if watch.join().is_ok_and(|hung| hung) {
            bail!("a request was taken for hung after {PATIENCE:?}");
        }
        outcome
    })
}

/// Collects what a command says until it ends.
pub(crate) fn output(mut child: Child, command: String) -> Result<Output> {
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let status = finish(child, &command)?;
    // A daemon that the command started may hold its standard error open for ever.
    let text = |pieces: mpsc::Receiver<Vec<u8>>| {
        let mut all = Vec::new();
        while let Ok(piece) = pieces.recv_timeout(Duration::from_secs(1)) {
            all.extend(piece);
        }
        all
    };
    Ok(Output::new(command, status, text(stdout), text(stderr)))
}

/// Reads a stream in a thread of its own.
fn collect(stream: Option<impl Read + Send + 'static>) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let Some(mut stream) = stream else { return };
        let mut buffer = vec![0; 64 << 10];
        while let Ok(n @ 1..) = stream.read(&mut buffer) {
            if sender.send(buffer[..n].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Writes past the test harness's capture, so that a retry is seen also when the test passes.
fn say(text: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{text}");
}
