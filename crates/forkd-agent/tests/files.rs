//! Files, tunnels and the JSON-line protocol of a real agent.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::unix::fs::PermissionsExt;

use forkd_proto::agent::{FailureCode, FileType, Request, Response};
use forkd_proto::frame::Kind;
use support::Agent;

fn write(agent: &Agent, path: &str, pieces: &[&[u8]], mode: u32, parents: bool) -> Response {
    let mut client = agent.connect();
    client.say(&Request::WriteFile { path: path.into(), mode, parents });
    for piece in pieces {
        client.send(Kind::Data, piece);
    }
    client.send(Kind::Data, b"");
    client.response()
}

fn read(agent: &Agent, path: &str) -> Result<Vec<u8>, forkd_proto::agent::Failure> {
    let mut client = agent.connect();
    client.say(&Request::ReadFile { path: path.into() });
    match client.response() {
        Response::File(info) => assert_eq!(info.file_type, FileType::File),
        Response::Error(failure) => return Err(failure),
        other => panic!("{other:?}"),
    }
    let mut bytes = Vec::new();
    loop {
        let frame = client.frame();
        assert_eq!(frame.kind, Kind::Data);
        if frame.payload.is_empty() {
            return Ok(bytes);
        }
        bytes.extend(frame.payload);
    }
}

#[test]
fn files_are_written_whole_and_read_back() {
    let agent = Agent::start();
    let root = tempfile::tempdir().unwrap();
    let path = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    let big: Vec<u8> = (0..5u32 << 20).map(|n| (n * 7 % 253) as u8).collect();
    let pieces: Vec<&[u8]> = big.chunks(900_000).collect();
    assert_eq!(write(&agent, &path("a/b/big"), &pieces, 0o640, true), Response::Done);
    assert!(read(&agent, &path("a/b/big")).unwrap() == big);
    let mode = |name: &str| std::fs::metadata(path(name)).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode("a/b/big"), 0o640);

    std::fs::set_permissions(path("a/b/big"), std::fs::Permissions::from_mode(0o600)).unwrap();
    std::os::unix::fs::symlink("big", path("a/b/link")).unwrap();
    assert_eq!(write(&agent, &path("a/b/link"), &[b"new"], 0o777, false), Response::Done);
    assert_eq!(read(&agent, &path("a/b/big")).unwrap(), b"new", "the link was followed");
    assert_eq!(mode("a/b/big"), 0o600, "an old file keeps its permissions");
    assert!(std::fs::symlink_metadata(path("a/b/link")).unwrap().is_symlink());
    assert_eq!(write(&agent, &path("empty"), &[], 0o644, false), Response::Done);
    assert_eq!(read(&agent, &path("empty")).unwrap(), b"");
    assert_eq!(std::fs::read_dir(path("a/b")).unwrap().count(), 2, "no temporary file is left");
}

#[test]
fn a_torn_upload_leaves_the_old_file() {
    let agent = Agent::start();
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("f");
    std::fs::write(&path, "old").unwrap();
    let mut client = agent.connect();
    client.say(&Request::WriteFile { path: path.to_str().unwrap().into(), mode: 0o644, parents: false });
    client.send(Kind::Data, b"half");
    drop(client);
    support::eventually("the temporary file is gone", || std::fs::read_dir(root.path()).unwrap().count() == 1);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "old");
}

#[test]
fn failures_of_files_are_told_even_after_much_was_sent() {
    let agent = Agent::start();
    let chunk = vec![0; 1 << 20];
    let pieces: Vec<&[u8]> = std::iter::repeat_n(chunk.as_slice(), 8).collect();
    let fails = |response| match response {
        Response::Error(failure) => failure,
        other => panic!("{other:?}"),
    };
    assert_eq!(fails(write(&agent, "/nowhere/file", &pieces, 0o644, false)).code, FailureCode::NotFound);
    assert_eq!(fails(write(&agent, "/usr", &pieces, 0o644, false)).code, FailureCode::Conflict);
    assert_eq!(read(&agent, "/nowhere").unwrap_err().code, FailureCode::NotFound);
    assert!(read(&agent, "/usr").unwrap_err().message.contains("directory"));
    assert!(read(&agent, "/dev/zero").unwrap_err().message.contains("regular"));
    assert!(!read(&agent, "/proc/self/status").unwrap().is_empty(), "a file without a size is read to its end");
}

#[test]
fn directories_are_listed_and_changed() {
    let agent = Agent::start();
    let root = tempfile::tempdir().unwrap();
    let path = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    assert_eq!(agent.request(&Request::MakeDir { path: path("a/b") }), Response::Done);
    assert_eq!(write(&agent, &path("a/f"), &[b"x"], 0o600, false), Response::Done);
    match agent.request(&Request::List { path: path("a"), pages: false }) {
        Response::Listing { entries } => {
            let names: Vec<_> = entries.iter().map(|entry| entry.name.as_str()).collect();
            assert_eq!(names, ["b", "f"]);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(agent.request(&Request::Rename { from: path("a/f"), to: path("a/g") }), Response::Done);
    assert!(matches!(agent.request(&Request::Stat { path: path("a/g") }), Response::Stat(info) if info.mode == 0o600));
    assert!(matches!(agent.request(&Request::Remove { path: path("a"), recursive: false }), Response::Error(_)));
    assert_eq!(agent.request(&Request::Remove { path: path("a"), recursive: true }), Response::Done);
    assert_eq!(agent.request(&Request::Sync), Response::Done);
}

#[test]
fn tunnels_carry_both_directions_and_half_closes() {
    let agent = Agent::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"welcome").unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        got.reverse();
        stream.write_all(&got).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
    });
    let mut client = agent.connect();
    client.say(&Request::Tunnel { port });
    assert_eq!(client.response(), Response::Done);
    assert_eq!(client.frame().payload, b"welcome", "before the client said anything");
    let sent: Vec<u8> = (0..3_000_000u32).map(|n| (n % 255) as u8).collect();
    for piece in sent.chunks(1 << 20) {
        client.send(Kind::Data, piece);
    }
    client.send(Kind::Data, b"");
    let mut got = Vec::new();
    loop {
        let frame = client.frame();
        if frame.payload.is_empty() {
            break;
        }
        got.extend(frame.payload);
    }
    got.reverse();
    assert!(got == sent);
    server.join().unwrap();

    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    assert!(
        matches!(agent.request(&Request::Tunnel { port: unused }), Response::Error(failure) if failure.code == FailureCode::NotFound)
    );
}

#[test]
fn json_lines_are_answered_as_existing_clients_expect() {
    let agent = Agent::start();
    let pong = agent.legacy(r#"{"action":"ping"}"#, true);
    assert_eq!((&pong["pong"], &pong["warmup_ready"]), (&true.into(), &true.into()));
    assert_eq!(pong["numpy_version"], "not-installed");
    let done = agent.legacy(r#"{"action":"exec","args":["sh","-c","echo out; echo err >&2; exit 4"]}"#, false);
    assert_eq!(done, serde_json::json!({"stdout": "out\n", "stderr": "err\n", "exit_code": 4}));
    let started = std::time::Instant::now();
    let late = agent.legacy(r#"{"action":"exec","args":["sleep","30"],"timeout":0.2}"#, false);
    assert!(late["error"].as_str().unwrap().starts_with("TimeoutExpired") && late["exit_code"] == 1, "{late}");
    let missing = agent.legacy(r#"{"action":"exec","args":["no-such-program"]}"#, false);
    assert!(missing["error"].as_str().unwrap().starts_with("FileNotFoundError"), "{missing}");
    assert!(started.elapsed() < std::time::Duration::from_secs(5));
    for bad in [r#"{"action":"exec"}"#, r#"{"action":"dance"}"#, "{}", "nonsense", r#"{"action":"eval"}"#] {
        let answer = agent.legacy(bad, false);
        assert!(answer["error"].is_string() && answer["exit_code"] == 1, "{bad} → {answer}");
    }
    let sum = agent.legacy(r#"{"action":"eval","code":"1 + 1"}"#, false);
    assert_eq!(sum, serde_json::json!({"result": "2", "exit_code": 0}));
    // A client that has said all it will say is still there, however long its code takes.
    let slow = r#"{"action":"eval","code":"[__import__('time').sleep(0.5), 3][1]"}"#;
    assert_eq!(agent.legacy(slow, true), serde_json::json!({"result": "3", "exit_code": 0}));
    let statement = agent.legacy(r#"{"action":"eval","code":"x = 1"}"#, false);
    assert!(statement["traceback"].as_str().unwrap().contains("SyntaxError"), "{statement}");
}
