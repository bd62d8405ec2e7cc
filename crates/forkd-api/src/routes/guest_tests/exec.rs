use std::time::Duration;

use axum::body::Body;
use axum::http::{Method, Request};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures_util::{SinkExt, StreamExt};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

use super::{BASE, Server};

struct Socket(WebSocketStream<TcpStream>);

/// All that a program said.
#[derive(Debug, Default)]
struct Said {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    last: Value,
}

impl Socket {
    async fn open(server: &Server, request: Value) -> Self {
        let stream = TcpStream::connect(server.address).await.expect("it listens");
        let url = format!("ws://{}{BASE}/exec/stream", server.address);
        let (socket, _) = tokio_tungstenite::client_async(url, stream).await.expect("upgraded");
        let mut socket = Self(socket);
        socket.say(request).await;
        socket
    }

    async fn say(&mut self, message: Value) {
        self.0.send(Message::text(message.to_string())).await.expect("open");
    }

    async fn input(&mut self, bytes: &[u8]) {
        let message = [&[0], bytes].concat();
        self.0.send(Message::binary(message)).await.expect("open");
    }

    async fn next(&mut self) -> Message {
        let next = tokio::time::timeout(Duration::from_secs(20), self.0.next());
        next.await.expect("something comes").expect("open").expect("sound")
    }

    async fn started(&mut self) -> i32 {
        let Message::Text(text) = self.next().await else { panic!("text comes first") };
        let event: Value = serde_json::from_str(&text).expect("json");
        assert_eq!(event["type"], "started", "{event}");
        i32::try_from(event["pid"].as_i64().expect("pid")).expect("pid")
    }

    async fn wait_for(&mut self, text: &str) {
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains(text) {
            match self.next().await {
                Message::Binary(bytes) => seen.extend_from_slice(&bytes[1..]),
                other => panic!("waiting for {text:?} after {:?}: {other:?}", String::from_utf8_lossy(&seen)),
            }
        }
    }

    async fn finish(mut self) -> Said {
        let mut said = Said::default();
        loop {
            match self.next().await {
                Message::Binary(bytes) if bytes[0] == 1 => said.stdout.extend_from_slice(&bytes[1..]),
                Message::Binary(bytes) if bytes[0] == 2 => said.stderr.extend_from_slice(&bytes[1..]),
                Message::Text(text) => said.last = serde_json::from_str(&text).expect("json"),
                Message::Close(_) => return said,
                Message::Ping(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

fn sh(script: &str) -> Value {
    json!({ "args": ["sh", "-c", script] })
}

fn exists(pid: i32) -> bool {
    std::path::Path::new(&format!("/proc/{pid}")).exists()
}

async fn eventually(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..1000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("not within 20 s: {what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_carries_all_three_streams() {
    let server = Server::start().await;
    let mut request = sh("tr a-z A-Z; echo problem >&2; printf \"$GREETING\"; pwd; exit 7");
    request["stdin"] = true.into();
    request["env"] = json!([["GREETING", "hi "]]);
    request["cwd"] = "/usr".into();
    let mut socket = Socket::open(&server, request).await;
    socket.started().await;
    socket.input(b"first ").await;
    socket.say(json!({ "type": "stdin", "data": BASE64.encode("second ") })).await;
    socket.input(b"").await;
    let said = socket.finish().await;
    assert_eq!(String::from_utf8_lossy(&said.stdout), "FIRST SECOND hi /usr\n");
    assert_eq!(said.stderr, b"problem\n");
    assert_eq!(said.last, json!({ "type": "exit", "code": 7, "timed_out": false }));
}

#[tokio::test(flavor = "multi_thread")]
async fn much_flows_both_ways_at_once() {
    let server = Server::start().await;
    let mut request = json!({ "args": ["cat"], "stdin": true });
    request["timeout_secs"] = 120.into();
    let socket = Socket::open(&server, request).await;
    let (mut sink, mut stream) = socket.0.split();
    let content: Vec<u8> = (0..20u32 << 20).map(|n| (n * 13 % 251) as u8).collect();
    let sent = content.clone();
    let sending = tokio::spawn(async move {
        for piece in sent.chunks(1 << 20) {
            sink.send(Message::binary([&[0], piece].concat())).await.expect("open");
        }
        sink.send(Message::text(r#"{"type":"stdin_close"}"#)).await.expect("open");
        sink
    });
    let mut got = Vec::new();
    while let Some(Ok(message)) = stream.next().await {
        if let Message::Binary(bytes) = message {
            got.extend_from_slice(&bytes[1..]);
        }
    }
    assert!(got == content, "{} of {} bytes", got.len(), content.len());
    drop(sending.await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_has_a_size_that_changes_and_an_interrupt_key() {
    let server = Server::start().await;
    let mut request = sh("trap 'stty size' WINCH; stty size; while :; do sleep 0.1; done");
    request["pty"] = json!({ "rows": 11, "cols": 22 });
    request["stdin"] = true.into();
    let mut socket = Socket::open(&server, request).await;
    socket.started().await;
    socket.wait_for("11 22").await;
    socket.say(json!({ "type": "resize", "rows": 33, "cols": 44 })).await;
    socket.wait_for("33 44").await;
    socket.input(b"\x03").await;
    let said = socket.finish().await;
    assert_eq!(said.last["type"], "exit");
    assert!([-2, 130].contains(&said.last["code"].as_i64().expect("code")), "{said:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn signals_reach_the_program_and_time_limits_end_it() {
    let server = Server::start().await;
    let mut socket =
        Socket::open(&server, sh("trap 'echo caught; exit 3' USR1; echo up; while :; do sleep 0.1; done")).await;
    socket.started().await;
    socket.wait_for("up").await;
    socket.say(json!({ "type": "signal", "signal": "SIGUSR1" })).await;
    let said = socket.finish().await;
    assert_eq!((said.last["code"].as_i64(), &said.stdout[..]), (Some(3), &b"caught\n"[..]));

    let mut request = sh("sleep 100");
    request["timeout_secs"] = 1.into();
    let said = Socket::open(&server, request).await.finish().await;
    assert_eq!(said.last, json!({ "type": "exit", "code": -9, "timed_out": true }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_takes_its_program_along_unless_that_is_detached() {
    let server = Server::start().await;
    for detach in [false, true] {
        let mut request = sh("echo up; sleep 60");
        request["detach"] = detach.into();
        let mut socket = Socket::open(&server, request).await;
        let pid = socket.started().await;
        socket.wait_for("up").await;
        drop(socket);
        if detach {
            tokio::time::sleep(Duration::from_millis(500)).await;
            assert!(exists(pid), "it runs on");
            let group = rustix::process::Pid::from_raw(pid).expect("positive");
            rustix::process::kill_process_group(group, rustix::process::Signal::KILL).expect("it is ours");
        } else {
            eventually("the program is gone", || !exists(pid)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_start_and_what_makes_no_sense_is_told() {
    let server = Server::start().await;
    let code = |said: Said| said.last["code"].as_str().map(str::to_owned);
    let missing = Socket::open(&server, json!({ "args": ["no-such-program"] })).await.finish().await;
    assert!(missing.last["error"].as_str().expect("text").contains("no-such-program"), "{missing:?}");
    assert_eq!(code(missing).as_deref(), Some("guest_not_found"));
    let nothing = Socket::open(&server, json!({ "args": [] })).await.finish().await;
    assert_eq!(code(nothing).as_deref(), Some("guest_invalid"));
    let wrong = Socket::open(&server, json!({ "argv": ["true"] })).await.finish().await;
    assert_eq!(code(wrong).as_deref(), Some("bad_message"));
    let mut socket = Socket::open(&server, sh("sleep 60")).await;
    let pid = socket.started().await;
    socket.say(json!({ "type": "dance" })).await;
    assert_eq!(code(socket.finish().await).as_deref(), Some("bad_message"));
    eventually("the program is gone", || !exists(pid)).await;
    let plain = server.get(&format!("{BASE}/exec/stream")).await;
    assert_eq!(plain.refusal(), (426, "upgrade_required".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn simple_clients_get_lines_or_server_sent_events() {
    let server = Server::start().await;
    let url = format!("{BASE}/exec/stream");
    let answer = server.call(Method::POST, &url, sh("printf out; printf err >&2; exit 4").to_string()).await;
    assert_eq!(answer.headers["content-type"], "application/x-ndjson");
    let events: Vec<Value> = answer.text().lines().map(|line| serde_json::from_str(line).expect("json")).collect();
    assert_eq!(events[0]["type"], "started");
    let of = |kind: &str| events.iter().find(|event| event["type"] == kind).expect(kind);
    assert_eq!(of("stdout")["data"], BASE64.encode("out"));
    assert_eq!(of("stderr")["data"], BASE64.encode("err"));
    assert_eq!(events.last(), Some(&json!({ "type": "exit", "code": 4, "timed_out": false })));

    let missing = server.call(Method::POST, &url, json!({ "args": ["no-such-program"] }).to_string()).await;
    assert_eq!(missing.refusal(), (404, "guest_not_found".into()));
    let input = server.call(Method::POST, &url, json!({ "args": ["cat"], "stdin": true }).to_string()).await;
    assert_eq!(input.refusal(), (400, "bad_field".into()));

    let request = Request::post(&url).header("host", "x").header("content-type", "application/json");
    let request = request.header("accept", "text/event-stream").body(Body::from(sh("echo up; sleep 60").to_string()));
    let mut body = server.send(request.expect("request")).await.into_body();
    let mut seen = String::new();
    while !seen.contains("event: stdout") {
        let frame = body.frame().await.expect("no end").expect("no error");
        seen.push_str(&String::from_utf8_lossy(&frame.into_data().expect("data")));
    }
    let pid = seen.split("\"pid\":").nth(1).and_then(|rest| rest.split('}').next()).expect("started");
    let pid: i32 = pid.parse().expect("a number");
    assert!(exists(pid));
    drop(body);
    eventually("the program is gone", || !exists(pid)).await;
}
