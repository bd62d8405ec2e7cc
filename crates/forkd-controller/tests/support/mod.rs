//! A daemon that is ended with its test, and requests to it.

// Each test program uses a part of this.
#![allow(dead_code, unreachable_pub)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_forkd-controller");

/// A daemon that is ended with the test.
pub struct Daemon {
    pub child: Child,
    pub address: Option<String>,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Daemon {
    pub fn tcp(&self) -> TcpStream {
        TcpStream::connect(self.address.as_deref().expect("announced")).expect("connect")
    }
}

pub fn serve(state: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    // Any program will do as long as no snapshot is forked.
    command
        .args(["serve", "--network", "off", "--bind", "127.0.0.1:0", "--vmm", "/bin/true", "--state-dir"])
        .arg(state)
        .args(more);
    command.env_remove("FORKD_TOKEN_FILE").env_remove("FORKD_TOKENS").stderr(Stdio::piped());
    command
}

pub fn start(state: &Path, more: &[&str]) -> Daemon {
    let child = serve(state, more).spawn().expect("spawn");
    let mut daemon = Daemon { child, address: None };
    let until = Instant::now() + Duration::from_secs(20);
    while daemon.address.is_none() {
        assert!(Instant::now() < until, "the daemon did not announce itself");
        std::thread::sleep(Duration::from_millis(20));
        let text = std::fs::read_to_string(state.join("daemon.json")).unwrap_or_default();
        let Some(rest) = text.split_once(r#""address":""#) else { continue };
        daemon.address = rest.1.split_once('"').map(|(address, _)| address.to_owned());
    }
    daemon
}

/// The status of a request without a token.
pub fn get(stream: impl Read + Write, path: &str) -> String {
    get_with(stream, path, "")
}

/// The status of a request with `token`, if there is one.
pub fn get_with(stream: impl Read + Write, path: &str, token: &str) -> String {
    let mut stream = BufReader::new(stream);
    let token = if token.is_empty() { String::new() } else { format!("authorization: Bearer {token}\r\n") };
    write!(stream.get_mut(), "GET {path} HTTP/1.1\r\nhost: x\r\n{token}connection: close\r\n\r\n").expect("ask");
    let mut status = String::new();
    stream.read_line(&mut status).expect("answer");
    status.split(' ').nth(1).expect("a status").to_owned()
}
