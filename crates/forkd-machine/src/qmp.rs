//! QEMU's control socket (QMP): just the commands that a machine needs.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::MachineError;

/// QEMU's main loop answers within milliseconds unless it is stuck itself.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// A conversation with one QEMU.
pub(crate) struct Qmp {
    path: PathBuf,
    stream: BufReader<UnixStream>,
}

#[derive(Deserialize)]
struct Message {
    #[serde(rename = "return")]
    value: Option<Value>,
    error: Option<QmpError>,
}

#[derive(Deserialize)]
struct QmpError {
    desc: String,
}

impl Qmp {
    /// Connects to the socket `name` in `directory` and leaves negotiation mode.
    pub(crate) fn connect(directory: &Path, name: &str) -> Result<Self, MachineError> {
        let path = directory.join(name);
        let failed = |error: std::io::Error| MachineError::Qmp { path: path.clone(), reason: error.to_string() };
        let stream = connect_below(directory, name).map_err(failed)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT)).map_err(failed)?;
        stream.set_write_timeout(Some(ANSWER_LIMIT)).map_err(failed)?;
        let mut qmp = Self { path, stream: BufReader::new(stream) };
        qmp.read_line()?;
        qmp.execute("qmp_capabilities")?;
        Ok(qmp)
    }

    /// What QEMU says the machine does: `running`, `paused`, `guest-panicked`, `internal-error`…
    pub(crate) fn run_state(&mut self) -> Result<String, MachineError> {
        let answer = self.execute("query-status")?;
        answer["status"].as_str().map(str::to_owned).ok_or_else(|| self.failed("query-status has no status"))
    }

    /// Asks QEMU to end without regard to the guest. QEMU may be gone before it has answered.
    pub(crate) fn quit(&mut self) -> Result<(), MachineError> {
        self.execute("quit").map(drop)
    }

    fn execute(&mut self, command: &str) -> Result<Value, MachineError> {
        let mut line = json!({ "execute": command }).to_string();
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes()).map_err(|error| self.failed(error))?;
        loop {
            let text = self.read_line()?;
            let message: Message = serde_json::from_str(&text).map_err(|error| self.failed(error))?;
            match message {
                Message { error: Some(error), .. } => {
                    return Err(self.failed(format!("{command} was refused: {}", error.desc)));
                }
                Message { value: Some(value), .. } => return Ok(value),
                // An event that happened to come in between.
                Message { value: None, error: None } => {}
            }
        }
    }

    fn read_line(&mut self) -> Result<String, MachineError> {
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => Err(self.failed("QEMU closed it")),
            Ok(_) => Ok(line),
            Err(error) => Err(self.failed(error)),
        }
    }

    fn failed(&self, reason: impl ToString) -> MachineError {
        MachineError::Qmp { path: self.path.clone(), reason: reason.to_string() }
    }
}

/// Connects by way of a descriptor of the directory: a socket's own path may be at most 107 bytes,
/// and a user's data directory may be longer.
///
/// A QEMU that is stuck does not accept, and a blocking connect to a full queue waits for ever; so the attempt
/// itself does not block.
fn connect_below(directory: &Path, name: &str) -> std::io::Result<UnixStream> {
    let directory = std::fs::File::open(directory)?;
    let address = SocketAddrUnix::new(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &address)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// A peer that speaks the protocol's grammar from a script: greeting, then one answer per line.
    fn serve(directory: &Path, answers: &'static [&'static str]) -> std::thread::JoinHandle<Vec<String>> {
        let listener = UnixListener::bind(directory.join("qmp")).expect("short path");
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("client comes");
            let mut lines = BufReader::new(stream.try_clone().expect("clone")).lines();
            let mut writer = stream;
            writeln!(writer, r#"{{"QMP":{{"version":{{}}}}}}"#).expect("greets");
            let mut seen = Vec::new();
            for answer in answers {
                seen.push(lines.next().expect("asked").expect("text"));
                writeln!(writer, "{answer}").expect("answers");
            }
            seen
        })
    }

    #[test]
    fn events_between_question_and_answer_are_passed_over() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let peer = serve(
            directory.path(),
            &[
                r#"{"return":{}}"#,
                "{\"event\":\"STOP\",\"timestamp\":{}}\n{\"return\":{\"status\":\"guest-panicked\",\"running\":false}}",
            ],
        );
        let mut qmp = Qmp::connect(directory.path(), "qmp").expect("connects");
        assert_eq!(qmp.run_state().expect("answers"), "guest-panicked");
        let asked = peer.join().expect("peer ends");
        assert!(asked[0].contains("qmp_capabilities") && asked[1].contains("query-status"));
    }

    #[test]
    fn a_stuck_qemu_is_not_waited_for() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).expect("a socket");
        let path = directory.path().join("qmp");
        rustix::net::bind(&socket, &SocketAddrUnix::new(&path).expect("short path")).expect("bound");
        rustix::net::listen(&socket, 0).expect("listens, and never accepts");
        let _waiting = UnixStream::connect(&path).expect("the one place in the queue");
        let started = std::time::Instant::now();
        assert!(Qmp::connect(directory.path(), "qmp").is_err());
        assert!(started.elapsed() < ANSWER_LIMIT);
    }

    #[test]
    fn refusals_and_silence_are_errors_that_name_the_socket() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let peer = serve(directory.path(), &[r#"{"return":{}}"#, r#"{"error":{"class":"X","desc":"not now"}}"#]);
        let mut qmp = Qmp::connect(directory.path(), "qmp").expect("connects");
        let error = qmp.quit().expect_err("refused").to_string();
        assert!(error.contains("quit was refused: not now") && error.contains("qmp"), "{error}");
        peer.join().expect("peer ends");
        assert!(qmp.quit().is_err(), "the peer is gone");
        assert!(Qmp::connect(directory.path(), "absent").is_err());
    }
}
