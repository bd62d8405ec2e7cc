//! Sessions of a real client with the server, over the real API of a node with an empty store.

use std::path::Path;
use std::sync::Arc;

use axum::Router;
use axum::http::{Request as HttpRequest, StatusCode, header};
use forkd_api::{Api, router};
use forkd_mcp::http::{HttpError, HttpServer};
use forkd_mcp::{Body, CallError, Calling, Daemon, Request, Server};
use forkd_node::{LimitsMode, Node, NodeConfig};
use http_body_util::BodyExt;
use rmcp::model::{CallToolRequestParams, CallToolResult};
use rmcp::service::RunningService;
use rmcp::{RoleClient, ServiceExt};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

/// The API without a network in between.
struct InProcess {
    router: Router,
    _directory: tempfile::TempDir,
}

impl Daemon for InProcess {
    fn call(&self, request: Request) -> Calling<'_> {
        Box::pin(self.send(request))
    }
}

impl InProcess {
    async fn send(&self, request: Request) -> Result<Vec<u8>, CallError> {
        let built = HttpRequest::builder().method(request.method).uri(&request.path);
        let built = match request.body {
            Body::Empty => built.body(axum::body::Body::empty()),
            Body::Json(value) => {
                built.header(header::CONTENT_TYPE, "application/json").body(axum::body::Body::from(value.to_string()))
            }
            Body::Bytes(bytes) => built.body(axum::body::Body::from(bytes)),
        };
        let answer = self.router.clone().oneshot(built.expect("a sound request")).await.expect("infallible");
        let status = answer.status();
        let bytes = answer.into_body().collect().await.expect("body").to_bytes().to_vec();
        if status.is_success() {
            return Ok(bytes);
        }
        Err(CallError(format!("{} ({status})", String::from_utf8_lossy(&bytes))))
    }
}

async fn daemon() -> Arc<InProcess> {
    let directory = tempfile::tempdir().expect("tempdir");
    let mut config = NodeConfig::new(directory.path(), Path::new("/nonexistent/forkd-vmm")).expect("short path");
    // A spawn asks for a memory limit; not every host that tests run on can keep it.
    config.limits = LimitsMode::Off;
    let node = Node::start(config).await.expect("an empty node starts");
    Arc::new(InProcess { router: router(Api::new(node), None, None), _directory: directory })
}

async fn session() -> RunningService<RoleClient, ()> {
    let (near, far) = tokio::io::duplex(64 << 10);
    let server = Server::new(daemon().await);
    tokio::spawn(async move {
        let serving = server.serve(far).await.expect("the client opens a session");
        serving.waiting().await
    });
    ().serve(near).await.expect("the server answers")
}

async fn call(client: &RunningService<RoleClient, ()>, tool: &'static str, arguments: Value) -> CallToolResult {
    let arguments = arguments.as_object().expect("an object").clone();
    client.call_tool(CallToolRequestParams::new(tool).with_arguments(arguments)).await.expect("the protocol works")
}

fn text(result: &CallToolResult) -> String {
    result.content.iter().filter_map(|content| content.as_text()).map(|content| content.text.clone()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn all_tools_are_listed_and_described() {
    let client = session().await;
    let info = client.peer_info().expect("initialised");
    assert!(info.instructions.as_deref().is_some_and(|text| text.contains("fork_sandbox")));
    let tools = client.list_all_tools().await.expect("a list");
    let mut names: Vec<_> = tools.iter().map(|tool| tool.name.to_string()).collect();
    names.sort();
    let known = [
        "branch_sandbox",
        "checkpoint_sandbox",
        "create_snapshot",
        "eval_code",
        "exec_command",
        "fork_sandbox",
        "get_sandbox",
        "kill_sandbox",
        "list_checkpoints",
        "list_files",
        "list_sandboxes",
        "list_snapshots",
        "ping_sandbox",
        "read_file",
        "rewind_sandbox",
        "spawn_sandboxes",
        "wait_for_text",
        "write_file",
    ];
    assert_eq!(names, known);
    for tool in tools {
        assert!(tool.description.as_deref().is_some_and(|text| text.len() > 30), "{} is hardly described", tool.name);
        let schema = Value::Object((*tool.input_schema).clone());
        for (argument, about) in schema["properties"].as_object().into_iter().flatten() {
            assert!(about["description"].is_string(), "{argument} of {} is not described", tool.name);
        }
    }
    client.cancel().await.expect("it ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_the_daemons_and_so_are_errors() {
    let client = session().await;
    let listed = call(&client, "list_snapshots", json!({})).await;
    assert_eq!((listed.is_error, text(&listed).as_str()), (Some(false), "[]"));
    assert_eq!(listed.structured_content, Some(json!({"result": []})));

    for (tool, arguments) in [
        ("get_sandbox", json!({})),
        ("kill_sandbox", json!({})),
        ("ping_sandbox", json!({})),
        ("list_checkpoints", json!({})),
        ("fork_sandbox", json!({})),
        ("branch_sandbox", json!({})),
        ("checkpoint_sandbox", json!({})),
        ("rewind_sandbox", json!({})),
        ("exec_command", json!({"args": ["true"]})),
        ("eval_code", json!({"code": "1"})),
        ("wait_for_text", json!({"path": "/a", "marker": "b"})),
        ("read_file", json!({"path": "/a"})),
        ("write_file", json!({"path": "/a", "content": "b"})),
        ("list_files", json!({"path": "/a"})),
    ] {
        let mut arguments = arguments;
        arguments["sandbox_id"] = json!("sb-1-0000");
        let failed = call(&client, tool, arguments).await;
        assert_eq!(failed.is_error, Some(true), "{tool}");
        assert!(text(&failed).contains("sandbox sb-1-0000 not found"), "{tool}: {}", text(&failed));
    }
    let failed = call(&client, "spawn_sandboxes", json!({"snapshot_tag": "nothing"})).await;
    assert!(text(&failed).contains("nothing"), "{}", text(&failed));
    let failed = call(&client, "create_snapshot", json!({"tag": "t", "kernel": "/no/kernel", "rootfs": "/no"})).await;
    assert!(text(&failed).contains("/no/kernel"), "{}", text(&failed));
    client.cancel().await.expect("it ends");
}

/// One request over a plain connection; the whole answer.
async fn exchange(address: std::net::SocketAddr, host: &str, more: &str) -> String {
    let body = r#"{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-06-18","capabilities":{},"clientInfo":{"name":"test","version":"1"}}}"#;
    let request = format!(
        "POST /mcp HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Accept: application/json, text/event-stream\r\nContent-Length: {}\r\n{more}\r\n{body}",
        body.len()
    );
    let mut stream = tokio::net::TcpStream::connect(address).await.expect("it listens");
    stream.write_all(request.as_bytes()).await.expect("open");
    let mut answer = Vec::new();
    let mut piece = [0; 4096];
    // The stream of a session stays open after the answer.
    while !String::from_utf8_lossy(&answer).contains("serverInfo") {
        match stream.read(&mut piece).await.expect("open") {
            0 => break,
            n => answer.extend_from_slice(&piece[..n]),
        }
    }
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn http_wants_the_token_or_a_loopback_name() {
    let any = "127.0.0.1:0".parse().expect("an address");
    let stop = CancellationToken::new();
    let _stopped = stop.clone().drop_guard();

    let open = HttpServer::bind(any, None).await.expect("a free port");
    let address = open.address();
    tokio::spawn(open.serve(daemon().await, stop.clone()));
    let answer = exchange(address, &address.to_string(), "").await;
    assert!(answer.contains("\"serverInfo\"") && answer.contains("forkd"), "{answer}");
    // A name that a web page was given for this address.
    let answer = exchange(address, "rebound.example", "").await;
    assert!(!answer.contains("serverInfo") && answer.starts_with("HTTP/1.1 4"), "{answer}");

    let guarded = HttpServer::bind(any, Some(" secret ".to_owned())).await.expect("a free port");
    let address = guarded.address();
    tokio::spawn(guarded.serve(daemon().await, stop.clone()));
    let refused = format!("HTTP/1.1 {}", StatusCode::UNAUTHORIZED.as_u16());
    for wrong in ["", "Authorization: Bearer secre\r\n", "Authorization: Basic secret\r\n"] {
        let answer = exchange(address, "box.example", wrong).await;
        assert!(answer.starts_with(&refused), "{wrong}: {answer}");
    }
    let answer = exchange(address, "box.example", "Authorization: Bearer secret\r\n").await;
    assert!(answer.contains("serverInfo"), "{answer}");
}

#[tokio::test]
async fn http_without_a_token_stays_on_the_loopback() {
    let everywhere = "0.0.0.0:0".parse().expect("an address");
    let refused = HttpServer::bind(everywhere, None).await.expect_err("anybody could come");
    assert!(matches!(refused, HttpError::Unguarded { .. }));
    assert!(refused.to_string().contains("no token"), "{refused}");
    assert!(HttpServer::bind(everywhere, Some("  ".to_owned())).await.is_err(), "an empty token is none");
}
