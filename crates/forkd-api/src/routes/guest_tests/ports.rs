use axum::Router;
use axum::body::Body;
use axum::extract::{Request, WebSocketUpgrade};
use axum::http::Method;
use axum::response::Response;
use axum::routing::{any, get};
use futures_util::{SinkExt, StreamExt};
use http_body_util::BodyExt;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use super::{BASE, Server};

/// A server as it might run in a guest; its port.
async fn guest_server() -> u16 {
    let routes = Router::new()
        .route("/socket", get(|upgrade: WebSocketUpgrade| async { upgrade.on_upgrade(echo) }))
        .route("/moved", get(|| async { axum::response::Redirect::to("/elsewhere") }))
        .fallback(any(reflect))
        .layer(axum::extract::DefaultBodyLimit::disable());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move { axum::serve(listener, routes).await });
    port
}

async fn echo(mut socket: axum::extract::ws::WebSocket) {
    while let Some(Ok(message)) = socket.recv().await {
        if socket.send(message).await.is_err() {
            return;
        }
    }
}

/// Answers with the body that it was sent, and in headers with what it saw.
async fn reflect(request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let mut response = Response::new(body);
    let header = |name: &str| parts.headers.get(name).cloned();
    response.headers_mut().insert("saw", format!("{} {}", parts.method, parts.uri).parse().expect("header"));
    for (name, of) in [("saw-host", "host"), ("saw-prefix", "x-forwarded-prefix"), ("saw-original", "x-forwarded-host")]
    {
        if let Some(value) = header(of) {
            response.headers_mut().insert(name, value);
        }
    }
    response
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_reach_a_server_in_the_guest_by_path_and_by_name() {
    let server = Server::start().await;
    let port = guest_server().await;
    let prefix = format!("{BASE}/ports/{port}");
    let content = vec![7; 5 << 20];
    let answer = server.call(Method::PATCH, &format!("{prefix}/a/b%20c?d=e"), content.clone()).await;
    let saw = |name: &str| answer.headers.get(name).map(|value| value.to_str().expect("text").to_owned());
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(saw("saw").as_deref(), Some("PATCH /a/b%20c?d=e"));
    assert_eq!(saw("saw-host"), Some(format!("localhost:{port}")));
    assert_eq!(saw("saw-prefix").as_deref(), Some(&*prefix));
    assert_eq!(saw("saw-original").as_deref(), Some("forkd.example"));
    assert!(answer.bytes == content);
    assert_eq!(server.get(&prefix).await.headers["saw"], "GET /");
    assert_eq!(server.get(&format!("{prefix}/moved")).await.headers["location"], format!("{prefix}/elsewhere"));

    let host = format!("{port}-sb-1-0000.box.example");
    let request = Request::get("/v1/sandboxes").header("host", &host).body(Body::empty()).expect("request");
    let named = server.send(request).await;
    assert_eq!(
        (&named.headers()["saw"], &named.headers()["saw-host"]),
        (&"GET /v1/sandboxes".parse().expect("h"), &host.parse().expect("h"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_without_an_end_flows() {
    let server = Server::start().await;
    let port = guest_server().await;
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<bytes::Bytes, std::io::Error>>(1);
    let body = Body::from_stream(tokio_stream::wrappers::ReceiverStream::new(receiver));
    let request = Request::post(format!("{BASE}/ports/{port}/")).header("host", "x").body(body).expect("request");
    let sending = server.send(request);
    sender.send(Ok("one".into())).await.expect("open");
    let mut back = sending.await.into_body();
    for piece in ["one", "two", "three"] {
        if piece != "one" {
            sender.send(Ok(piece.into())).await.expect("open");
        }
        let frame = back.frame().await.expect("no end").expect("no error");
        assert_eq!(frame.into_data().expect("data"), piece);
    }
    drop(sender);
    assert!(back.frame().await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn websockets_are_carried() {
    let server = Server::start().await;
    let port = guest_server().await;
    for (path, host) in [
        (format!("{BASE}/ports/{port}/socket"), server.address.to_string()),
        ("/socket".to_owned(), format!("{port}-sb-1-0000.box.example")),
    ] {
        let stream = tokio::net::TcpStream::connect(server.address).await.expect("it listens");
        let mut request = format!("ws://{}{path}", server.address).into_client_request().expect("request");
        request.headers_mut().insert("host", host.parse().expect("header"));
        let (mut socket, _) = tokio_tungstenite::client_async(request, stream).await.expect("upgraded");
        let big = Message::binary(vec![3; 3 << 20]);
        for message in [Message::text("hello"), big] {
            socket.send(message.clone()).await.expect("open");
            assert!(socket.next().await.expect("open").expect("sound") == message);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_where_nobody_listens_is_a_bad_gateway() {
    let server = Server::start().await;
    let unused = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("bound").port();
    let answer = server.get(&format!("{BASE}/ports/{unused}/")).await;
    assert_eq!(answer.refusal(), (502, "port_closed".into()));
    assert!(answer.text().contains(&unused.to_string()), "{}", answer.text());
    assert_eq!(server.get(&format!("{BASE}/ports/70000/")).await.refusal(), (400, "bad_port".into()));
    assert_eq!(server.get("/v1/sandboxes/no%20id/ports/80/").await.refusal(), (404, "sandbox_not_found".into()));

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            drop(stream);
        }
    });
    let broken = server.get(&format!("{BASE}/ports/{port}/")).await;
    assert_eq!(broken.refusal(), (502, "port_broken".into()));
}
