//! What the agent says about itself.
//!
//! As PID 1 it speaks through the kernel's log (`/dev/kmsg`), so its lines stand in order among the
//! kernel's, `dmesg` shows them, and the console log level (`quiet`, `loglevel=`) decides which of
//! them reach the console. Lines that a host waits for go straight to the console. As an ordinary
//! program it writes to standard error.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::OnceLock;

static KERNEL_LOG: OnceLock<File> = OnceLock::new();

/// How much a line matters; the numbers are the kernel's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum Level {
    Error = 3,
    Warning = 4,
    Info = 6,
}

/// Sends further lines to the kernel's log; without one they keep going to standard error.
pub fn use_kernel_log() {
    if let Ok(file) = OpenOptions::new().write(true).open("/dev/kmsg") {
        let _ = KERNEL_LOG.set(file);
    }
}

/// Something went as it should.
pub fn info(text: &str) {
    write(Level::Info, text);
}

/// Something did not, and the agent goes on.
pub fn warn(text: &str) {
    write(Level::Warning, text);
}

/// Something failed that someone should look at.
pub fn error(text: &str) {
    write(Level::Error, text);
}

/// A line for whoever watches the console, whatever the log level.
pub fn announce(text: &str) {
    let line = format!("{text}\n");
    let shown = OpenOptions::new()
        .write(true)
        .open("/dev/console")
        .ok()
        .filter(|_| KERNEL_LOG.get().is_some())
        .is_some_and(|mut console| console.write_all(line.as_bytes()).is_ok());
    if !shown {
        to_standard_error(&line);
    }
}

fn write(level: Level, text: &str) {
    match KERNEL_LOG.get() {
        Some(log) => {
            for line in text.lines() {
                // One write is one record; the kernel cuts records near 1 KiB.
                let mut end = line.len().min(900);
                while !line.is_char_boundary(end) {
                    end -= 1;
                }
                let _ = (&mut &*log).write_all(format!("<{}>forkd-agent: {}\n", level as u8, &line[..end]).as_bytes());
            }
        }
        None => to_standard_error(&format!("forkd-agent: {text}\n")),
    }
}

fn to_standard_error(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}
