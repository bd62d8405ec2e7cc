//! Who is let in to which route, and how often.

use std::path::{Path, PathBuf};

use axum::Router;
use axum::body::Body;
use axum::http::{Request, header};
use axum::response::Response;
use forkd_api::auth::{Guard, Keyring, Peers, Scope, TokensEditor};
use forkd_api::limits::RequestLimits;
use forkd_api::server::{Peer, Remote};
use forkd_api::{Api, router};
use forkd_node::{Node, NodeConfig};
use http_body_util::BodyExt;
use serde_json::Value;
use tower::ServiceExt;

async fn api(dir: &Path) -> Api {
    let config = NodeConfig::new(dir, Path::new("/nonexistent/forkd-vmm")).expect("short path");
    Api::new(Node::start(config).await.expect("an empty node starts"))
}

struct Tokens {
    path: PathBuf,
    keyring: Keyring,
    read: String,
    spawn: String,
    admin: String,
}

fn tokens(dir: &Path) -> Tokens {
    let path = dir.join("tokens.json");
    let mut editor = TokensEditor::open(&path, true).expect("empty");
    let [read, spawn, admin] = [Scope::Read, Scope::Spawn, Scope::Admin]
        .map(|scope| editor.create(&format!("the-{scope}er"), scope).expect("created"));
    let keyring = Keyring::open(None, Some(path.clone())).expect("good");
    Tokens { path, keyring, read, spawn, admin }
}

fn request(method: &str, path: &str, token: &str) -> Request<Body> {
    let request = Request::builder().method(method).uri(path).header(header::CONTENT_TYPE, "application/json");
    request.header(header::AUTHORIZATION, format!("Bearer {token}")).body(Body::empty()).expect("request")
}

async fn ask(router: &Router, request: Request<Body>) -> Response {
    router.clone().oneshot(request).await.expect("infallible")
}

async fn json(response: Response) -> Value {
    let bytes = response.into_body().collect().await.expect("body").to_bytes();
    serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{error}: {bytes:?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn each_route_is_for_its_scope_and_those_above() {
    let dir = tempfile::tempdir().expect("tempdir");
    let tokens = tokens(dir.path());
    let guard = Guard::tokens(tokens.keyring.clone(), RequestLimits::default());
    let router = router(api(dir.path()).await, Some(guard), None);
    let sandbox = "/v1/sandboxes/sb-1-0000";
    for (method, path, needed) in [
        ("GET", "/version".to_owned(), Scope::Read),
        ("HEAD", "/version".to_owned(), Scope::Read),
        ("GET", "/metrics".to_owned(), Scope::Read),
        ("GET", sandbox.to_owned(), Scope::Read),
        ("GET", "/nowhere".to_owned(), Scope::Read),
        ("POST", format!("{sandbox}/ping"), Scope::Read),
        ("POST", "/v1/sandboxes".to_owned(), Scope::Spawn),
        ("POST", format!("{sandbox}/exec"), Scope::Spawn),
        ("POST", format!("{sandbox}/branch"), Scope::Spawn),
        ("GET", format!("{sandbox}/agent"), Scope::Spawn),
        ("GET", format!("{sandbox}/ports/80/healthz"), Scope::Spawn),
        ("DELETE", sandbox.to_owned(), Scope::Spawn),
        ("DELETE", "/v1/snapshots/py".to_owned(), Scope::Admin),
        ("POST", "/v1/bakes".to_owned(), Scope::Admin),
        ("POST", "/v1/packs".to_owned(), Scope::Admin),
    ] {
        for (scope, token) in
            [(Scope::Read, &tokens.read), (Scope::Spawn, &tokens.spawn), (Scope::Admin, &tokens.admin)]
        {
            let response = ask(&router, request(method, &path, token)).await;
            let status = response.status().as_u16();
            if scope >= needed {
                assert!(![401, 403].contains(&status), "{method} {path} with {scope}: {status}");
            } else {
                assert_eq!(status, 403, "{method} {path} with {scope}");
                let body = json(response).await;
                assert_eq!(body["code"], "forbidden_scope");
                let error = body["error"].as_str().expect("text");
                assert!(error.contains(&format!("scope {needed}")) && error.contains("the-"), "{error}");
            }
        }
    }
    assert_eq!(ask(&router, request("GET", "/version", "forkd_0")).await.status(), 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_token_is_refused_after_the_reload() {
    let dir = tempfile::tempdir().expect("tempdir");
    let tokens = tokens(dir.path());
    let guard = Guard::tokens(tokens.keyring.clone(), RequestLimits::default());
    let router = router(api(dir.path()).await, Some(guard), None);
    assert_eq!(ask(&router, request("GET", "/version", &tokens.read)).await.status(), 200);
    TokensEditor::open(&tokens.path, false).expect("there").revoke("the-reader").expect("there");
    tokens.keyring.reload().expect("good");
    let response = ask(&router, request("GET", "/version", &tokens.read)).await;
    assert_eq!(
        (response.status().as_u16(), json(response).await["error"].as_str()),
        (401, Some("invalid bearer token"))
    );
    assert_eq!(ask(&router, request("GET", "/version", &tokens.admin)).await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_need_no_token_and_say_what_is_wrong() {
    let dir = tempfile::tempdir().expect("tempdir");
    let tokens = tokens(dir.path());
    let guard = Guard::tokens(tokens.keyring, RequestLimits::default());
    let router = router(api(dir.path()).await, Some(guard), None);
    let probe = async |path: &str| ask(&router, Request::get(path).body(Body::empty()).expect("request")).await;
    assert_eq!(json(probe("/healthz").await).await["ok"], true);
    let ready = probe("/readyz").await;
    assert_eq!((ready.status().as_u16(), json(ready).await["ok"].as_bool()), (200, Some(true)));
    assert_eq!(probe("/healthz/").await.status(), 404);
    assert_eq!(probe("/readyz/").await.status(), 404);
    assert_eq!(probe("/healthzz").await.status(), 401);
    // Root may write anywhere, but not where there is nothing.
    let incoming: Vec<_> = std::fs::read_dir(dir.path())
        .expect("list")
        .map(|entry| entry.expect("entry"))
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .collect();
    for entry in incoming {
        std::fs::rename(entry.path(), entry.path().with_extension("gone")).expect("rename");
    }
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let ready = probe("/readyz").await;
    assert_eq!(ready.status(), 503);
    assert!(ready.headers().contains_key(header::RETRY_AFTER));
    let body = json(ready).await;
    assert_eq!(body["code"], "not_ready", "{body}");
    assert_eq!(probe("/healthz").await.status(), 200, "it is alive all the same");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_token_has_its_own_rate_and_is_told_when_to_come_again() {
    let dir = tempfile::tempdir().expect("tempdir");
    let tokens = tokens(dir.path());
    let limits = RequestLimits { rate: Some("3/m".parse().expect("rate")), in_flight: None };
    let router = router(api(dir.path()).await, Some(Guard::tokens(tokens.keyring, limits)), None);
    for _ in 0..3 {
        assert_eq!(ask(&router, request("GET", "/version", &tokens.read)).await.status(), 200);
    }
    let refused = ask(&router, request("GET", "/version", &tokens.read)).await;
    assert_eq!(refused.status(), 429);
    let seconds: u64 = refused.headers()[header::RETRY_AFTER].to_str().expect("text").parse().expect("seconds");
    assert!((18..=20).contains(&seconds), "{seconds}");
    let body = json(refused).await;
    assert_eq!(body["code"], "rate_limited");
    assert!(body["error"].as_str().is_some_and(|text| text.contains("the-reader") && text.contains('3')), "{body}");
    assert_eq!(ask(&router, request("GET", "/version", &tokens.admin)).await.status(), 200, "another token");
    assert_eq!(ask(&router, Request::get("/healthz").body(Body::empty()).expect("request")).await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_has_so_many_requests_under_way_until_their_answers_are_sent() {
    let dir = tempfile::tempdir().expect("tempdir");
    let tokens = tokens(dir.path());
    let limits = RequestLimits { rate: None, in_flight: Some(1) };
    let router = router(api(dir.path()).await, Some(Guard::tokens(tokens.keyring, limits)), None);
    // Answered, but not read to its end yet.
    let first = ask(&router, request("GET", "/version", &tokens.read)).await;
    assert_eq!(first.status(), 200);
    let second = ask(&router, request("GET", "/version", &tokens.read)).await;
    assert_eq!(second.status(), 429);
    assert!(second.headers().contains_key(header::RETRY_AFTER));
    assert_eq!(json(second).await["code"], "too_many_in_flight");
    assert_eq!(ask(&router, request("GET", "/version", &tokens.spawn)).await.status(), 200, "another token");
    json(first).await;
    assert_eq!(ask(&router, request("GET", "/version", &tokens.read)).await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_socket_is_for_those_the_kernel_names() {
    let dir = tempfile::tempdir().expect("tempdir");
    let router = router(api(dir.path()).await, Some(Guard::socket(Peers::new(Some(4242)))), None);
    let from = async |remote: Option<Remote>| {
        let mut request = request("GET", "/version", "");
        if let Some(remote) = remote {
            request.extensions_mut().insert(remote);
        }
        ask(&router, request).await
    };
    let peer = |uid, gid| Some(Remote::Unix(Peer { uid, gid, pid: None }));
    let own = rustix::process::geteuid().as_raw();
    for good in [peer(0, 1), peer(own, 1), peer(60_001, 4242)] {
        assert_eq!(from(good.clone()).await.status(), 200, "{good:?}");
    }
    for bad in [peer(60_001, 4243), Some(Remote::Tcp(([127, 0, 0, 1], 1).into())), None] {
        let response = from(bad.clone()).await;
        assert_eq!(response.status(), 403, "{bad:?}");
        assert_eq!(json(response).await["code"], "forbidden_peer");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_counted_by_route_and_status_and_never_by_what_clients_think_up() {
    let dir = tempfile::tempdir().expect("tempdir");
    let router = router(api(dir.path()).await, None, None);
    let get = async |method: &str, path: &str| ask(&router, request(method, path, "")).await;
    get("GET", "/v1/sandboxes/sb-1-0000/console").await;
    get("GET", "/v1/sandboxes/sb-2-0000/console").await;
    for number in 0..5 {
        get("BREW", &format!("/thought/up/{number}")).await;
    }
    let metrics = get("GET", "/metrics").await;
    let bytes = metrics.into_body().collect().await.expect("body").to_bytes();
    let text = String::from_utf8(bytes.to_vec()).expect("text");
    for line in [
        "forkd_http_requests_total{method=\"GET\",route=\"/v1/sandboxes/{id}/console\",status=\"404\"} 2\n",
        "forkd_http_requests_total{method=\"other\",route=\"none\",status=\"404\"} 5\n",
        "forkd_http_request_seconds_bucket{method=\"GET\",route=\"/v1/sandboxes/{id}/console\",le=\"0.1\"}",
        "forkd_branches_in_flight 0\n",
        "forkd_branch_concurrency_cap 4\n",
        "forkd_zygotes 0\n",
        "# TYPE forkd_sandbox_private_bytes gauge\n",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    assert!(!text.contains("thought"), "{text}");
}
