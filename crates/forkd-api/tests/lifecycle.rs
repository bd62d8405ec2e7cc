//! Workspaces, lifetimes, events, idempotency keys and snapshots from files, against a real node with an empty store:
//! routes, statuses, bodies.

use std::path::Path;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, header};
use forkd_api::{Api, router};
use forkd_node::{Node, NodeConfig};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

struct Fixture {
    dir: tempfile::TempDir,
    node: Node,
    router: Router,
}

async fn fixture() -> Fixture {
    let dir = tempfile::tempdir().expect("tempdir");
    let config = NodeConfig::new(dir.path(), Path::new("/nonexistent/forkd-vmm")).expect("short path");
    let node = Node::start(config).await.expect("an empty node starts");
    let router = router(Api::new(node.clone()), None, None);
    Fixture { dir, node, router }
}

struct Answer {
    status: u16,
    replayed: bool,
    text: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {:?}", self.text))
    }

    fn code(&self) -> String {
        let body = self.json();
        assert!(body["error"].as_str().is_some_and(|text| !text.is_empty()), "{body}");
        body["code"].as_str().expect("a code").to_owned()
    }
}

impl Fixture {
    async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.expect("infallible");
        let (status, replayed) = (response.status().as_u16(), response.headers().contains_key("idempotency-replayed"));
        let bytes = response.into_body().collect().await.expect("body").to_bytes();
        Answer { status, replayed, text: String::from_utf8_lossy(&bytes).into_owned() }
    }

    async fn call(&self, method: &str, path: &str) -> Answer {
        self.send(Request::builder().method(method).uri(path).body(Body::empty()).expect("request")).await
    }

    async fn post(&self, path: &str, body: Value) -> Answer {
        self.post_keyed(path, body, None).await
    }

    async fn post_keyed(&self, path: &str, body: Value, key: Option<&str>) -> Answer {
        let mut request = Request::post(path).header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = key {
            request = request.header("Idempotency-Key", key);
        }
        self.send(request.body(Body::from(body.to_string())).expect("request")).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn workspaces_that_cannot_be_are_refused_with_the_documented_statuses() {
    let api = fixture().await;
    assert_eq!(api.call("GET", "/v1/workspaces").await.text, "[]");
    let create = |name: &str, tag: &str| json!({ "name": name, "snapshot_tag": tag });
    for (body, status, code) in [
        (create("a/b", "py"), 400, "bad_workspace_name"),
        (create("", "py"), 400, "bad_workspace_name"),
        (create(&"w".repeat(56), "py"), 400, "bad_workspace_name"),
        (create("w", "a/b"), 400, "bad_tag"),
        (create("w", "py"), 404, "snapshot_not_found"),
        (create(&"w".repeat(55), "py"), 404, "snapshot_not_found"),
        (json!({ "name": "w" }), 422, "bad_body"),
    ] {
        let answer = api.post("/v1/workspaces", body.clone()).await;
        assert_eq!((answer.status, answer.code().as_str()), (status, code), "{body}");
    }
    assert_eq!(api.call("GET", "/v1/workspaces").await.text, "[]", "a name is free again when its making failed");
    for (method, path) in
        [("GET", "/v1/workspaces/w"), ("DELETE", "/v1/workspaces/w"), ("POST", "/v1/workspaces/w/resume")]
    {
        let answer = api.call(method, path).await;
        assert_eq!((answer.status, answer.code().as_str()), (404, "workspace_not_found"), "{method} {path}");
    }
    assert_eq!(api.post("/v1/workspaces/w/suspend", json!({})).await.code(), "workspace_not_found");
    assert_eq!(api.call("POST", "/v1/workspaces/w/suspend").await.status, 415, "a suspend needs a JSON body");
}

#[tokio::test(flavor = "multi_thread")]
async fn lifetimes_are_checked_before_anything_is_spawned() {
    let api = fixture().await;
    for body in [
        json!({ "snapshot_tag": "py", "timeout_secs": 0 }),
        json!({ "snapshot_tag": "py", "timeout_secs": 31_536_001 }),
        json!({ "snapshot_tag": "py", "on_timeout": "suspend" }),
    ] {
        let answer = api.post("/v1/sandboxes", body.clone()).await;
        assert_eq!((answer.status, answer.code().as_str()), (400, "bad_field"), "{body}");
    }
    let odd = json!({ "snapshot_tag": "py", "timeout_secs": 9, "on_timeout": "sleep" });
    assert_eq!(api.post("/v1/sandboxes", odd).await.status, 422);
    let good = json!({ "snapshot_tag": "py", "timeout_secs": 9, "on_timeout": "suspend" });
    assert_eq!(api.post("/v1/sandboxes", good).await.status, 404);
    for (path, body) in [("timeout", json!({ "timeout_secs": 7 })), ("suspend", json!({}))] {
        let answer = api.post(&format!("/v1/sandboxes/sb-1-0000/{path}"), body).await;
        assert_eq!((answer.status, answer.code().as_str()), (404, "sandbox_not_found"), "{path}");
    }
    assert_eq!(api.post("/v1/sandboxes/sb-1-0000/timeout", json!({})).await.status, 422);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_from_files_is_checked_in_the_known_order() {
    let api = fixture().await;
    let path = |name: &str| api.dir.path().join(name).display().to_string();
    std::fs::write(path("kernel"), "no kernel").expect("write");
    std::fs::write(path("disk.ext4"), vec![0; 4096]).expect("write");
    std::fs::create_dir_all(path("snapshots/broken")).expect("mkdir");
    let body = |tag: &str, kernel: &str, rootfs: &str, wait: u64| json!({ "tag": tag, "kernel": path(kernel), "rootfs": path(rootfs), "rw": true, "tap": null, "boot_wait_secs": wait });
    for (body, code, says) in [
        (body("a/b", "none", "none", 61), "bad_tag", "a/b"),
        (body("py", "none", "none", 61), "bad_ingredient", "kernel"),
        (body("py", "kernel", "none", 61), "bad_ingredient", "rootfs"),
        (body("py", "kernel", "disk.ext4", 61), "bad_field", "boot_wait_secs"),
    ] {
        let answer = api.post("/v1/snapshots", body.clone()).await;
        assert_eq!((answer.status, answer.code().as_str()), (400, code), "{body}");
        assert!(answer.json()["error"].as_str().is_some_and(|text| text.contains(says)), "{}", answer.text);
    }
    let answer = api.post("/v1/snapshots", json!({ "tag": "py", "kernel": path("kernel") })).await;
    assert_eq!(answer.status, 422);
    // No agent lies beside the monitor program of this test.
    let answer = api.post("/v1/snapshots", body("py", "kernel", "disk.ext4", 10)).await;
    assert_eq!((answer.status, answer.code().as_str()), (500, "io"), "{}", answer.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_never_a_failure_of_the_daemon() {
    let api = fixture().await;
    for (path, body, code) in [
        ("/v1/snapshots/none/compact", json!({ "to": "flat" }), "snapshot_not_found"),
        ("/v1/sandboxes/sb-1-0000/branch", json!({ "mode": "live" }), "sandbox_not_found"),
        ("/v1/sandboxes/sb-1-0000/fork", json!({}), "sandbox_not_found"),
        ("/v1/workspaces", json!({ "name": "w", "snapshot_tag": "none" }), "snapshot_not_found"),
    ] {
        let answer = api.post(path, body).await;
        assert_eq!((answer.status, answer.code().as_str()), (404, code), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_branch_that_makes_no_sense_is_refused_before_anyone_looks_for_its_sandbox() {
    let api = fixture().await;
    for body in [json!({ "diff": true, "measure_diff": true }), json!({ "wait": false }), json!({ "tag": "../up" })] {
        let answer = api.post("/v1/sandboxes/sb-1-0000/branch", body.clone()).await;
        assert_eq!(answer.status, 400, "{body}: {}", answer.text);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_there_is_is_told_at_once_when_there_is_nothing() {
    let api = fixture().await;
    assert_eq!(api.call("GET", "/v1/tree").await.text, r#"{"roots":[]}"#);
    assert_eq!(api.call("GET", "/v1/usage").await.text, "[]");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_with_a_key_is_done_once_and_answered_alike() {
    let api = fixture().await;
    let body = json!({ "snapshot_tag": "py" });
    let first = api.post_keyed("/v1/sandboxes", body.clone(), Some("k")).await;
    assert_eq!((first.status, first.replayed), (404, false));
    let second = api.post_keyed("/v1/sandboxes", body.clone(), Some("k")).await;
    assert_eq!((second.status, second.replayed), (404, true));
    assert_eq!(second.text, first.text);
    let other = api.post_keyed("/v1/sandboxes", json!({ "snapshot_tag": "web" }), Some("k")).await;
    assert_eq!((other.status, other.code().as_str()), (422, "idempotency_key_reused"));
    let queried = api.post_keyed("/v1/sandboxes?detail=true", body.clone(), Some("k")).await;
    assert_eq!(queried.status, 422, "the query is part of what was asked");
    let elsewhere = api.post_keyed("/v1/workspaces", json!({ "name": "w", "snapshot_tag": "py" }), Some("k")).await;
    assert_eq!((elsewhere.status, elsewhere.replayed), (404, false), "a key belongs to a path");
    let unkeyed = api.post("/v1/sandboxes", body.clone()).await;
    assert!(!unkeyed.replayed);
    let long = "k".repeat(256);
    assert_eq!(api.post_keyed("/v1/sandboxes", body.clone(), Some(&long)).await.code(), "bad_idempotency_key");
    let huge = json!({ "snapshot_tag": "x".repeat(3 << 20) });
    let answer = api.post_keyed("/v1/sandboxes", huge, Some("huge")).await;
    assert_eq!((answer.status, answer.code().as_str()), (413, "body_too_large"));

    // Answers outlive the daemon.
    let Fixture { dir, node, router } = api;
    node.settle().await.expect("settled");
    drop((node, router));
    let config = NodeConfig::new(dir.path(), Path::new("/nonexistent/forkd-vmm")).expect("short path");
    let node = start_again(config).await;
    let router = forkd_api::router(Api::new(node.clone()), None, None);
    let api = Fixture { dir, node, router };
    let third = api.post_keyed("/v1/sandboxes", body, Some("k")).await;
    assert_eq!((third.status, third.replayed, third.text), (404, true, first.text));
}

/// Waits for the node before to let go of its store.
async fn start_again(config: NodeConfig) -> Node {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        match Node::start(config.clone()).await {
            Ok(node) => return node,
            Err(error) if std::time::Instant::now() > end => panic!("{}", error.message()),
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_of_the_daemon_is_not_kept_under_a_key() {
    let api = fixture().await;
    let path = |name: &str| api.dir.path().join(name).display().to_string();
    std::fs::write(path("kernel"), "no kernel").expect("write");
    let body = json!({ "tag": "py", "kernel": path("kernel"), "rootfs": path("kernel") });
    for _ in 0..2 {
        let answer = api.post_keyed("/v1/snapshots", body.clone(), Some("k")).await;
        assert_eq!((answer.status, answer.replayed), (500, false), "{}", answer.text);
    }
}

/// Reads a stream of events until `count` lines of data have come, or it ends.
async fn read(body: &mut Body, count: usize) -> Vec<Value> {
    let mut text = String::new();
    let data = |text: &str| -> Vec<Value> {
        let complete = text.rsplit_once('\n').map_or("", |(complete, _)| complete);
        let lines = complete.lines().filter_map(|line| line.strip_prefix("data: "));
        lines.map(|line| serde_json::from_str(line).expect("JSON")).collect()
    };
    while data(&text).len() < count {
        match body.frame().await {
            Some(frame) => text.push_str(&String::from_utf8_lossy(&frame.expect("frame").into_data().expect("data"))),
            None => break,
        }
    }
    data(&text)
}

/// Makes and removes something that can never be used, for the event.
async fn remove_a_snapshot(api: &Fixture, tag: &str) {
    let dir = api.dir.path().join("snapshots").join(tag);
    std::fs::create_dir_all(&dir).expect("mkdir");
    std::fs::write(dir.join("snapshot.json"), "{").expect("write");
    assert_eq!(api.call("DELETE", &format!("/v1/snapshots/{tag}")).await.status, 204);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_come_as_they_happen_and_again_from_where_a_client_left_off() {
    let api = fixture().await;
    let follow = async |last: Option<u64>| {
        let mut request = Request::get("/v1/events");
        if let Some(last) = last {
            request = request.header("Last-Event-ID", last.to_string());
        }
        let response = api.router.clone().oneshot(request.body(Body::empty()).expect("request")).await;
        let response = response.expect("infallible");
        assert_eq!(response.headers()[header::CONTENT_TYPE], "text/event-stream");
        response.into_body()
    };
    remove_a_snapshot(&api, "before").await;
    let mut body = follow(None).await;
    for tag in ["one", "two", "three"] {
        remove_a_snapshot(&api, tag).await;
    }
    let events = read(&mut body, 3).await;
    let tags: Vec<_> = events.iter().map(|event| event["snapshot"].as_str().expect("a tag")).collect();
    assert_eq!(tags, ["one", "two", "three"]);
    assert!(events.iter().all(|event| event["event"] == "snapshot.removed"), "{events:?}");
    drop(body);

    remove_a_snapshot(&api, "meanwhile").await;
    let first = events[0]["id"].as_u64().expect("an id");
    let again = read(&mut follow(Some(first)).await, 3).await;
    let tags: Vec<_> = again.iter().map(|event| event["snapshot"].as_str().expect("a tag")).collect();
    assert_eq!(tags, ["two", "three", "meanwhile"]);
    let lost = read(&mut follow(Some(7)).await, 1).await;
    assert_eq!(lost[0]["event"], "events.lost", "an id of long ago");

    assert_eq!(api.call("GET", "/v1/events?sandbox=a%20b").await.status, 400);
    let bad = Request::get("/v1/events").header("Last-Event-ID", "x").body(Body::empty()).expect("request");
    assert_eq!(api.send(bad).await.code(), "bad_event_id");

    // Those who still listen when the daemon stops are given the rest, and let go.
    let mut body = follow(None).await;
    remove_a_snapshot(&api, "last").await;
    api.node.end_listening();
    let rest = read(&mut body, usize::MAX).await;
    assert_eq!(rest.len(), 1);
}
