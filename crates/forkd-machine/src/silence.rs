//! Machines that run and do not do what they are told: a process in QEMU's place whose agent is silent, or answers
//! pings and begins nothing.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use forkd_proto::agent::{Exec, Exited, PROTOCOL_VERSION, Pong, Request, Response};
use forkd_proto::frame::{Frame, FrameError, Kind};

use crate::error::MachineError;
use crate::exec::Streams;
use crate::health::Patience;
use crate::machine::{Machine, Status, StopOutcome};

/// Nobody here is busy.
const PATIENCE: Patience = Patience {
    status: Duration::from_millis(300),
    answer: Duration::from_millis(400),
    last_chance: Duration::from_millis(200),
    ping_every: Duration::from_millis(50),
    shutdown: Duration::from_millis(300),
    begin: Duration::from_millis(1500),
    end: Duration::from_millis(500),
};

/// Far below what is waited for where nothing is said about it.
const SOON: Duration = Duration::from_secs(4);

/// A machine that was started, as far as `machine.json` and the process table say.
struct StandIn {
    qemu: Child,
    machine: Machine,
    _data: tempfile::TempDir,
}

impl StandIn {
    /// One whose agent is what `listener` hands out.
    fn with_agent(listener: &TcpListener) -> Self {
        let data = tempfile::tempdir().expect("temporary directory");
        let qemu = Command::new("sleep").arg("600").spawn().expect("sleep exists");
        let machine = Machine::open(data.path(), "silent").expect("a plain name").with_patience(PATIENCE);
        let directory = data.path().join("machine/silent");
        std::fs::create_dir_all(&directory).expect("created");
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/machine-1.json");
        let text = std::fs::read_to_string(fixture).expect("the fixture is there");
        let mut record: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        record["running"]["qemu"] = serde_json::json!({ "pid": qemu.id(), "start_time": start_time(qemu.id()) });
        record["running"]["agent_port"] = listener.local_addr().expect("bound").port().into();
        std::fs::write(directory.join("machine.json"), record.to_string()).expect("written");
        std::fs::write(directory.join("console.log"), "last words of the kernel\n").expect("written");
        Self { qemu, machine, _data: data }
    }

    fn run(&self, exec: Exec) -> Result<(Exited, Vec<u8>), MachineError> {
        let mut said = Vec::new();
        let streams = Streams { stdin: None, stdout: &mut said, stderr: &mut std::io::sink(), control: None };
        let exited = self.machine.exec(exec, streams)?;
        Ok((exited, said))
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Field 22 of `/proc/PID/stat`; a name without spaces is assumed, and `sleep` is one.
fn start_time(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    stat.split_ascii_whitespace().nth(21).expect("22 fields").parse().expect("a number")
}

fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").expect("a free port")
}

/// Serves each connection as an agent does that `exec` says what becomes of a program.
fn agent(listener: &TcpListener, exec: fn(&mut TcpStream) -> Result<(), FrameError>) {
    let listener = listener.try_clone().expect("cloned");
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || serve(stream, exec));
        }
    });
}

fn serve(mut stream: TcpStream, exec: fn(&mut TcpStream) -> Result<(), FrameError>) -> Result<(), FrameError> {
    loop {
        let answer = match Frame::read_from(&mut stream)?.parse(Kind::Request)? {
            Request::Hello { .. } => Response::Done,
            Request::Ping => Response::Pong(pong()),
            Request::Exec(_) => return exec(&mut stream),
            other => panic!("{other:?} was not expected"),
        };
        send(&mut stream, &answer)?;
    }
}

fn pong() -> Pong {
    Pong {
        protocol: PROTOCOL_VERSION,
        agent: "1".into(),
        kernel: "6.12".into(),
        warm: Vec::new(),
        sandbox_id: String::new(),
        numpy_version: None,
        uptime_ns: 1,
    }
}

fn send(stream: &mut TcpStream, answer: &Response) -> Result<(), FrameError> {
    Frame::json(Kind::Response, answer)?.write_to(stream)
}

fn a_program() -> Exec {
    Exec { args: vec!["true".into()], ..Exec::default() }
}

#[test]
fn a_machine_whose_agent_says_nothing_is_not_called_running() {
    // QEMU's own listener takes connections though nothing in the machine does.
    let silent = listener();
    let stand_in = StandIn::with_agent(&silent);
    let began = Instant::now();
    match stand_in.machine.status().expect("a status") {
        Status::NotAnswering { running, waited, console_tail } => {
            assert_eq!(running.qemu_pid, stand_in.qemu.id());
            assert!(began.elapsed() >= waited && began.elapsed() < SOON, "{:?}", began.elapsed());
            assert!(console_tail.contains("last words"), "{console_tail}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_program_for_a_machine_that_says_nothing_is_given_up() {
    let silent = listener();
    let stand_in = StandIn::with_agent(&silent);
    let began = Instant::now();
    let error = stand_in.run(a_program()).expect_err("nobody answers");
    assert!(error.is_machine_death() && error.to_string().contains("it hung"), "{error}");
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
}

#[test]
fn a_program_that_does_not_begin_is_given_up_though_the_agent_answers() {
    let stuck = listener();
    agent(&stuck, |stream| Frame::read_from(stream).map(drop));
    let stand_in = StandIn::with_agent(&stuck);
    assert!(matches!(stand_in.machine.status(), Ok(Status::Running { .. })));
    let began = Instant::now();
    let error = stand_in.run(a_program()).expect_err("it does not begin");
    assert!(error.is_machine_stuck() && error.to_string().contains("\"true\" within 1 s"), "{error}");
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
}

#[test]
fn a_program_that_outlives_its_limit_is_given_up_and_one_without_is_not() {
    let slow = listener();
    agent(&slow, |stream| {
        send(stream, &Response::Started { pid: 7 })?;
        std::thread::sleep(Duration::from_secs(3));
        Frame::bytes(Kind::Stdout, b"done".as_slice()).write_to(stream)?;
        send(stream, &Response::Exited(Exited { code: 3, timed_out: false }))
    });
    let stand_in = StandIn::with_agent(&slow);
    let limited = Exec { timeout_ms: Some(1000), ..a_program() };
    std::thread::scope(|scope| {
        let limited = scope.spawn(|| stand_in.run(limited));
        let (exited, said) = stand_in.run(a_program()).expect("it takes its time");
        assert_eq!((exited.code, said.as_slice()), (3, b"done".as_slice()));
        let error = limited.join().expect("no panic").expect_err("it was to end after a second");
        assert!(error.is_machine_stuck() && error.to_string().contains("end after 1 s"), "{error}");
    });
}

#[test]
fn a_qemu_that_stands_still_is_told_from_one_that_ended() {
    let silent = listener();
    let stand_in = StandIn::with_agent(&silent);
    let pid = stand_in.qemu.id().to_string();
    let signal = |name| Command::new("kill").args([name, pid.as_str()]).status().expect("kill runs");
    assert!(signal("-STOP").success());
    assert!(matches!(stand_in.machine.status(), Ok(Status::NotAnswering { .. })));
    assert!(signal("-KILL").success());
    // Nobody has collected it yet: a zombie has ended all the same.
    let began = Instant::now();
    while !matches!(stand_in.machine.status(), Ok(Status::Dead { .. })) {
        assert!(began.elapsed() < SOON, "{:?}", stand_in.machine.status());
    }
}

#[test]
fn a_machine_that_says_nothing_is_ended_all_the_same() {
    let silent = listener();
    let mut stand_in = StandIn::with_agent(&silent);
    let began = Instant::now();
    assert_eq!(stand_in.machine.stop(&mut |_| {}).expect("stopped"), StopOutcome::Forced);
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    assert!(stand_in.qemu.wait().expect("ended").code().is_none(), "by a signal");
    assert_eq!(stand_in.machine.status().expect("a status"), Status::Stopped);
}
