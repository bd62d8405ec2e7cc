//! The real agent as an ordinary program, and a client that speaks its protocol.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used, clippy::print_stdout)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use forkd_proto::agent::{Eval, Evaluated, Exec, ExecControl, Exited, Failure, Identity, Request, Response};
use forkd_proto::frame::{Frame, Kind};
use serde_json::Value;

pub const TOKEN: &str = "correct horse battery staple";

/// A running agent; it ends with this value.
pub struct Agent {
    process: Child,
    pub tcp: SocketAddr,
    pub legacy: SocketAddr,
    _token: tempfile::NamedTempFile,
}

/// How a program ended and what it wrote.
#[derive(Debug)]
pub struct Outcome {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub code: i32,
    pub timed_out: bool,
}

impl Outcome {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }
}

impl Agent {
    pub fn start() -> Self {
        Self::start_by(&["env"])
    }

    /// Starts it by another program, which gets the agent's command line as its last arguments.
    pub fn start_by(starter: &[&str]) -> Self {
        let token = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(token.path(), TOKEN).unwrap();
        let mut process = Command::new(starter[0])
            .args(&starter[1..])
            .arg(env!("CARGO_BIN_EXE_forkd-agent"))
            .args(["--no-init", "--tcp", "127.0.0.1:0", "--legacy", "127.0.0.1:0", "--token-file"])
            .arg(token.path())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines().map(Result::unwrap);
        let mut address = |name: &str| -> SocketAddr {
            let line = lines.next().expect("the agent says where it listens");
            line.strip_prefix(&format!("forkd-agent {name} ")).unwrap_or_else(|| panic!("{line}")).parse().unwrap()
        };
        let (tcp, legacy) = (address("tcp"), address("legacy"));
        assert_eq!(lines.next().as_deref(), Some("forkd-agent ready"));
        std::thread::spawn(move || lines.for_each(|line| println!("agent: {line}")));
        Self { process, tcp, legacy, _token: token }
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// A connection past its hello.
    pub fn connect(&self) -> Client {
        let mut client = Client(TcpStream::connect(self.tcp).unwrap());
        client.0.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        client.0.set_nodelay(true).unwrap();
        client.say(&Request::Hello { token: TOKEN.into() });
        assert_eq!(client.response(), Response::Done);
        client
    }

    pub fn request(&self, request: &Request) -> Response {
        let mut client = self.connect();
        client.say(request);
        client.response()
    }

    /// Makes the agent take on an identity.
    pub fn identify(&self, id: &str, seed: u8) {
        let identity = Identity {
            sandbox_id: id.into(),
            hostname: id.into(),
            machine_id: "0".repeat(32),
            seed: format!("{seed:02x}").repeat(64),
            wall_clock_ns: 0,
        };
        assert_eq!(self.request(&Request::Identify(identity)), Response::Identified { warnings: vec![] });
    }

    pub fn exec(&self, exec: Exec) -> Outcome {
        self.try_exec(exec).expect("the program starts")
    }

    pub fn try_exec(&self, exec: Exec) -> Result<Outcome, Failure> {
        self.start_exec(exec)?.finish()
    }

    /// Starts a program; its process id is known.
    pub fn start_exec(&self, exec: Exec) -> Result<Client, Failure> {
        let mut client = self.connect();
        client.say(&Request::Exec(exec));
        match client.response() {
            Response::Started { pid } => {
                assert!(pid > 1);
                Ok(client)
            }
            Response::Error(failure) => Err(failure),
            other => panic!("{other:?}"),
        }
    }

    pub fn sh(&self, script: &str) -> Outcome {
        self.exec(sh(script))
    }

    pub fn eval(&self, language: &str, code: &str) -> Result<Evaluated, Failure> {
        self.eval_for(language, code, None)
    }

    pub fn eval_for(&self, language: &str, code: &str, timeout_ms: Option<u64>) -> Result<Evaluated, Failure> {
        let eval = Eval { language: Some(language.into()), code: code.into(), timeout_ms };
        match self.request(&Request::Eval(eval)) {
            Response::Evaluated(evaluated) => Ok(evaluated),
            Response::Error(failure) => Err(failure),
            other => panic!("{other:?}"),
        }
    }

    /// One exchange of the JSON-line protocol.
    pub fn legacy(&self, line: &str, half_close: bool) -> Value {
        let mut stream = TcpStream::connect(self.legacy).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        if half_close {
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        } else {
            stream.write_all(b"\n").unwrap();
        }
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.ends_with('\n') && answer.lines().count() == 1, "{answer:?}");
        serde_json::from_str(&answer).unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub fn sh(script: &str) -> Exec {
    Exec { args: vec!["sh".into(), "-c".into(), script.into()], ..Exec::default() }
}

/// One connection.
pub struct Client(pub TcpStream);

impl Client {
    pub fn say(&mut self, request: &Request) {
        Frame::json(Kind::Request, request).unwrap().write_to(&mut self.0).unwrap();
    }

    pub fn control(&mut self, control: &ExecControl) {
        Frame::json(Kind::Request, control).unwrap().write_to(&mut self.0).unwrap();
    }

    pub fn send(&mut self, kind: Kind, bytes: &[u8]) {
        Frame::bytes(kind, bytes).write_to(&mut self.0).unwrap();
    }

    pub fn frame(&mut self) -> Frame {
        Frame::read_from(&mut self.0).unwrap()
    }

    pub fn response(&mut self) -> Response {
        self.frame().parse(Kind::Response).unwrap()
    }

    /// Reads standard output until it holds `text`.
    pub fn wait_for(&mut self, text: &str) -> String {
        let mut seen = String::new();
        while !seen.contains(text) {
            let frame = self.frame();
            assert_eq!(frame.kind, Kind::Stdout, "waiting for {text:?}, saw {seen:?}, got {frame:?}");
            seen.push_str(&String::from_utf8_lossy(&frame.payload));
        }
        seen
    }

    /// Reads until the program has ended and the agent has closed the connection.
    pub fn finish(mut self) -> Result<Outcome, Failure> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            let frame = self.frame();
            match frame.kind {
                Kind::Stdout => stdout.extend(frame.payload),
                Kind::Stderr => stderr.extend(frame.payload),
                _ => match frame.parse(Kind::Response).unwrap() {
                    Response::Exited(Exited { code, timed_out }) => {
                        assert!(matches!(Frame::read_from(&mut self.0), Err(forkd_proto::frame::FrameError::Closed)));
                        return Ok(Outcome { stdout, stderr, code, timed_out });
                    }
                    Response::Error(failure) => return Err(failure),
                    other => panic!("{other:?}"),
                },
            }
        }
    }
}

/// Waits until `condition` holds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("not within 30 s: {what}");
}

pub fn process_exists(pid: u32) -> bool {
    std::path::Path::new(&format!("/proc/{pid}")).exists()
}
