//! The API's surface against a real node with an empty store: routes, statuses, bodies.

use std::path::Path;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use forkd_api::audit::AuditLog;
use forkd_api::auth::{Guard, Keyring, Token};
use forkd_api::limits::RequestLimits;
use forkd_api::{Api, router};
use forkd_node::{Node, NodeConfig};
use forkd_types::Digest;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

struct Fixture {
    dir: tempfile::TempDir,
    router: Router,
}

async fn node(dir: &Path) -> Node {
    let config = NodeConfig::new(dir, Path::new("/nonexistent/forkd-vmm")).expect("short path");
    Node::start(config).await.expect("an empty node starts")
}

async fn fixture() -> Fixture {
    let dir = tempfile::tempdir().expect("tempdir");
    let router = router(Api::new(node(dir.path()).await), None, None);
    Fixture { dir, router }
}

struct Answer {
    status: u16,
    headers: axum::http::HeaderMap,
    bytes: Vec<u8>,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.bytes).unwrap_or_else(|error| panic!("{error}: {:?}", self.text()))
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }

    /// The code of an error's body, which must have both keys.
    fn code(&self) -> String {
        let body = self.json();
        assert!(body["error"].as_str().is_some_and(|text| !text.is_empty()), "{body}");
        body["code"].as_str().expect("a code").to_owned()
    }
}

async fn send(router: &Router, request: Request<Body>) -> Answer {
    let response = router.clone().oneshot(request).await.expect("infallible");
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let bytes = response.into_body().collect().await.expect("body").to_bytes().to_vec();
    Answer { status, headers, bytes }
}

impl Fixture {
    async fn call(&self, method: &str, path: &str) -> Answer {
        send(&self.router, Request::builder().method(method).uri(path).body(Body::empty()).expect("request")).await
    }

    async fn post(&self, path: &str, body: Value) -> Answer {
        let request = Request::post(path).header(header::CONTENT_TYPE, "application/json");
        send(&self.router, request.body(Body::from(body.to_string())).expect("request")).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn discovery_answers_as_documented() {
    let api = fixture().await;
    let health = api.call("GET", "/healthz").await;
    assert_eq!((health.status, health.text().as_str()), (200, r#"{"ok":true}"#));
    let version = api.call("GET", "/version").await.json();
    assert_eq!(version["api"], "v1");
    assert_eq!(api.call("HEAD", "/healthz").await.status, 200);
    let metrics = api.call("GET", "/metrics").await;
    assert_eq!(metrics.headers[header::CONTENT_TYPE], "text/plain; version=0.0.4");
    for line in [
        "# TYPE forkd_snapshots_total gauge",
        "# HELP forkd_sandboxes_active ",
        "forkd_sandboxes_active 0",
        "forkd_branches_in_flight 0",
        "forkd_branch_concurrency_cap ",
        "forkd_build_info{version=\"",
    ] {
        assert!(metrics.text().contains(line), "{line} is not in\n{}", metrics.text());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_node_lists_nothing_and_knows_nobody() {
    let api = fixture().await;
    assert_eq!(api.call("GET", "/v1/sandboxes").await.text(), "[]");
    assert_eq!(api.call("GET", "/v1/snapshots").await.text(), "[]");
    for (method, path) in [
        ("GET", "/v1/sandboxes/sb-1-0000"),
        ("DELETE", "/v1/sandboxes/sb-1-0000"),
        ("DELETE", "/v1/sandboxes/a%20b"),
        ("POST", "/v1/sandboxes/sb-1-0000/ping"),
        ("GET", "/v1/sandboxes/sb-1-0000/memory"),
        ("GET", "/v1/sandboxes/sb-1-0000/console"),
        ("GET", "/v1/sandboxes/sb-1-0000/agent"),
    ] {
        let answer = api.call(method, path).await;
        assert_eq!((answer.status, answer.code().as_str()), (404, "sandbox_not_found"), "{method} {path}");
    }
    let answer = api.call("GET", "/v1/sandboxes/sb-1-0000").await;
    assert_eq!(answer.json()["error"], "sandbox sb-1-0000 not found");
    for (method, path) in
        [("DELETE", "/v1/snapshots/py"), ("GET", "/v1/snapshots/py/info"), ("POST", "/v1/snapshots/py/verify")]
    {
        let answer = api.call(method, path).await;
        assert_eq!((answer.status, answer.code().as_str()), (404, "snapshot_not_found"), "{method} {path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn spawn_checks_count_then_tag_then_existence() {
    let api = fixture().await;
    for (body, status, code) in [
        (json!({"snapshot_tag": "a b", "n": 0}), 400, "bad_spawn_count"),
        (json!({"snapshot_tag": "py", "n": 1001}), 400, "bad_spawn_count"),
        (json!({"snapshot_tag": "a/b"}), 400, "bad_tag"),
        (json!({"snapshot_tag": "py"}), 404, "snapshot_not_found"),
        (json!({"snapshot_tag": "py", "n": 1000, "hugepages": true, "unknown": [1]}), 404, "snapshot_not_found"),
    ] {
        let answer = api.post("/v1/sandboxes", body.clone()).await;
        assert_eq!((answer.status, answer.code().as_str()), (status, code), "{body}");
    }
    let answer = api.post("/v1/sandboxes?detail=yes", json!({"snapshot_tag": "py"})).await;
    assert_eq!((answer.status, answer.code().as_str()), (400, "bad_query"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_cannot_be_used_is_a_conflict_and_is_listed_as_failed() {
    let api = fixture().await;
    let broken = api.dir.path().join("snapshots/broken");
    std::fs::create_dir_all(&broken).expect("mkdir");
    std::fs::write(broken.join("snapshot.json"), "{").expect("write");
    let answer = api.post("/v1/sandboxes", json!({"snapshot_tag": "broken"})).await;
    assert_eq!((answer.status, answer.code().as_str()), (409, "snapshot_not_ready"));
    let list = api.call("GET", "/v1/snapshots").await.json();
    assert_eq!((list[0]["status"].as_str(), list[0]["bootable"].as_bool()), (Some("failed"), Some(false)), "{list}");
    assert!(list[0]["warning"].as_str().is_some_and(|warning| warning.contains("snapshot.json")), "{list}");
    assert_eq!(api.call("DELETE", "/v1/snapshots/broken").await.status, 204);
    assert_eq!(api.call("GET", "/v1/snapshots").await.text(), "[]");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_have_the_documented_statuses_and_json_bodies() {
    let api = fixture().await;
    let raw = async |content_type: Option<&str>, body: String| {
        let mut request = Request::post("/v1/sandboxes");
        if let Some(content_type) = content_type {
            request = request.header(header::CONTENT_TYPE, content_type);
        }
        send(&api.router, request.body(Body::from(body)).expect("request")).await
    };
    let json_type = Some("application/json");
    let good = r#"{"snapshot_tag":"py"}"#.to_owned();
    let cases = [
        (raw(None, good.clone()).await, 415, "unsupported_media_type"),
        (raw(Some("text/plain"), good.clone()).await, 415, "unsupported_media_type"),
        (raw(Some("application/json; charset=utf-8"), good).await, 404, "snapshot_not_found"),
        (raw(json_type, "{".to_owned()).await, 400, "bad_json"),
        (raw(json_type, String::new()).await, 400, "bad_json"),
        (raw(json_type, "{}".to_owned()).await, 422, "bad_body"),
        (raw(json_type, r#"{"snapshot_tag":"py","n":-1}"#.to_owned()).await, 422, "bad_body"),
        (raw(json_type, r#"{"snapshot_tag":"py","n":"1"}"#.to_owned()).await, 422, "bad_body"),
        (raw(json_type, format!("\"{}\"", "x".repeat(3 << 20))).await, 413, "body_too_large"),
    ];
    for (answer, status, code) in cases {
        assert_eq!((answer.status, answer.code().as_str()), (status, code));
    }
    // A bad body is told before an unknown sandbox.
    let answer = api.post("/v1/sandboxes/sb-1-0000/exec", json!({"args": "not a list"})).await;
    assert_eq!(answer.status, 422);
    let answer = api.post("/v1/sandboxes/sb-1-0000/exec", json!({"args": []})).await;
    assert_eq!(answer.status, 404);
    assert_eq!(api.call("GET", "/v2").await.code(), "unknown_path");
    let answer = api.call("PUT", "/v1/sandboxes").await;
    assert_eq!((answer.status, answer.code().as_str()), (405, "method_not_allowed"));
    let allowed = answer.headers[header::ALLOW].to_str().expect("ascii").to_owned();
    assert!(allowed.contains("GET") && allowed.contains("POST"), "{allowed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn removal_options_exclude_one_another() {
    let api = fixture().await;
    let both = api.call("DELETE", "/v1/snapshots/py?cascade=true&force=true").await;
    assert_eq!((both.status, both.code().as_str()), (400, "cascade_and_force"));
    assert_eq!(api.call("DELETE", "/v1/snapshots/py?cascade=1").await.status, 400);
    assert_eq!(api.call("DELETE", "/v1/snapshots/..").await.status, 400);
    assert_eq!(api.call("DELETE", "/v1/snapshots/py?cascade=true").await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_are_taken_plain_or_compressed_and_checked() {
    let api = fixture().await;
    let content: Vec<u8> = (0..3_000_000u32).map(|i| if i % 70_000 < 60_000 { 0 } else { i as u8 }).collect();
    let digest = Digest::from_bytes(*blake3::hash(&content).as_bytes());
    let path = format!("/v1/blobs/{digest}");
    let put = async |body: Vec<u8>, encoding: Option<&str>| {
        let mut request = Request::put(&path);
        if let Some(encoding) = encoding {
            request = request.header(header::CONTENT_ENCODING, encoding);
        }
        send(&api.router, request.body(Body::from(body)).expect("request")).await
    };
    assert_eq!(api.call("HEAD", &path).await.status, 404);
    let packed = zstd::encode_all(content.as_slice(), 1).expect("compress");

    let answer = put(packed[..packed.len() / 2].to_vec(), Some("zstd")).await;
    assert_eq!(answer.status, 400, "half a body: {}", answer.text());
    let answer = put(content[1..].to_vec(), None).await;
    assert_eq!((answer.status, answer.code().as_str()), (400, "digest_mismatch"));
    let answer = put(content.clone(), Some("zstd")).await;
    assert_eq!((answer.status, answer.code().as_str()), (400, "broken_body"));
    let answer = put(content.clone(), Some("br")).await;
    assert_eq!((answer.status, answer.code().as_str()), (415, "unsupported_encoding"));
    assert_eq!(api.call("HEAD", &path).await.status, 404, "nothing of these was kept");

    for (body, encoding) in [(packed, Some("zstd")), (content.clone(), None)] {
        let answer = put(body, encoding).await;
        assert_eq!((answer.status, answer.json()["bytes"].as_u64()), (201, Some(3_000_000)), "{}", answer.text());
    }
    let head = api.call("HEAD", &path).await;
    assert_eq!((head.status, head.headers[header::CONTENT_LENGTH].as_bytes()), (200, &b"3000000"[..]));
    assert_eq!(std::fs::read(api.dir.path().join("blobs").join(digest.hex())).expect("blob"), content);
    assert_eq!(api.call("HEAD", "/v1/blobs/sha256:00").await.status, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bake_is_checked_before_its_stream_begins() {
    let api = fixture().await;
    let none = Digest::from_bytes([7; 32]).to_string();
    let body = |change: Value| {
        let mut body = json!({"tag": "py", "disk": none, "kernel": none, "initramfs": none});
        body.as_object_mut().expect("object").extend(change.as_object().expect("object").clone());
        body
    };
    for (change, status, code) in [
        (json!({"tag": ".."}), 400, "bad_tag"),
        (json!({"memory_mib": 64}), 400, "bad_field"),
        (json!({"kernel": "vmlinux"}), 400, "bad_field"),
        (json!({}), 404, "blob_missing"),
    ] {
        let answer = api.post("/v1/bakes", body(change.clone())).await;
        assert_eq!((answer.status, answer.code().as_str()), (status, code), "{change}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bake_without_a_monitor_program_fails_in_its_stream_and_leaves_nothing() {
    let api = fixture().await;
    let content = vec![1; 4096];
    let digest = Digest::from_bytes(*blake3::hash(&content).as_bytes()).to_string();
    let put = Request::put(format!("/v1/blobs/{digest}")).body(Body::from(content)).expect("request");
    assert_eq!(send(&api.router, put).await.status, 201);
    let body = json!({"tag": "py", "disk": digest, "kernel": digest, "initramfs": digest});
    let answer = api.post("/v1/bakes", body).await;
    assert_eq!(answer.status, 200);
    let last: Value = serde_json::from_str(answer.text().lines().last().expect("a line")).expect("json");
    assert_eq!(last["event"], "failed", "{last}");
    assert_eq!(api.call("GET", "/v1/snapshots").await.text(), "[]");
    assert_eq!(api.dir.path().join("run").read_dir().expect("list").count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_path_but_health_needs_the_token_and_all_are_audited() {
    let dir = tempfile::tempdir().expect("tempdir");
    let token_file = dir.path().join("token");
    std::fs::write(&token_file, "0123456789abcdef\n").expect("write");
    let token = Token::read(&token_file).expect("good token");
    let log = dir.path().join("audit.log");
    let audit = AuditLog::open(&log).expect("audit log");
    let keyring = Keyring::open(Some(token), None).expect("no file");
    let guard = Guard::tokens(keyring, RequestLimits::default());
    let router = router(Api::new(node(dir.path()).await), Some(guard), Some(audit));
    let ask = async |path: &str, authorization: Option<&str>| {
        let mut request = Request::get(path).header(header::USER_AGENT, "test/1");
        if let Some(authorization) = authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        send(&router, request.body(Body::empty()).expect("request")).await
    };
    for path in ["/version", "/metrics", "/v1/sandboxes", "/nowhere", "/healthz/x"] {
        let answer = ask(path, None).await;
        assert_eq!((answer.status, answer.json()["error"].as_str()), (401, Some("missing bearer token")), "{path}");
    }
    assert_eq!(ask("/version", Some("bearer 0123456789abcdef")).await.json()["error"], "missing bearer token");
    assert_eq!(ask("/version", Some("Bearer wrong")).await.json()["error"], "invalid bearer token");
    assert_eq!(ask("/version?x=1", Some("Bearer 0123456789abcdef")).await.status, 200);
    assert_eq!(ask("/healthz", None).await.status, 200);
    assert_eq!(ask("/healthz/", None).await.status, 404);
    let lines = std::fs::read_to_string(log).expect("log");
    let statuses: Vec<_> = lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("json"))
        .map(|line| (line["path"].as_str().expect("path").to_owned(), line["status"].as_u64().expect("status")))
        .collect();
    assert_eq!(statuses.len(), 10);
    assert_eq!(statuses[7], ("/version".to_owned(), StatusCode::OK.as_u16().into()));
    assert!(lines.contains(r#""ua":"test/1""#));
}
