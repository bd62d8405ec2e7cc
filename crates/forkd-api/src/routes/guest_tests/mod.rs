//! The routes into guests, over sockets, with the real agent standing in for one in a guest.

mod exec;
mod files;
mod ports;

use std::net::SocketAddr;
use std::path::Path;

use axum::body::Body;
use axum::http::{Method, Request, Response};
use forkd_node::{Node, NodeConfig};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::Value;

use crate::guests::stand_in::StandIn;
use crate::{Api, router};

/// A sandbox that there might be.
const BASE: &str = "/v1/sandboxes/sb-1-0000";

/// A server whose sandboxes are all the agent of this process.
struct Server {
    address: SocketAddr,
    /// What tests write to; the node's state too.
    dir: tempfile::TempDir,
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

    /// Status and code of an error.
    fn refusal(&self) -> (u16, String) {
        (self.status, self.json()["code"].as_str().unwrap_or_else(|| panic!("{}", self.text())).to_owned())
    }
}

impl Server {
    async fn start() -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let config = NodeConfig::new(dir.path(), Path::new("/nonexistent/forkd-vmm")).expect("short path");
        let mut api = Api::new(Node::start(config).await.expect("an empty node starts")).with_domain("box.example");
        api.stand_in = Some(StandIn::shared());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        tokio::spawn(async move { axum::serve(listener, router(api, None, None)).await });
        Self { address, dir }
    }

    /// A path in the scratch directory, as text.
    fn at(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().expect("text").to_owned()
    }

    async fn send(&self, request: Request<Body>) -> Response<Incoming> {
        let stream = tokio::net::TcpStream::connect(self.address).await.expect("it listens");
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("handshake");
        tokio::spawn(connection.with_upgrades());
        sender.send_request(request).await.expect("an answer")
    }

    async fn call(&self, method: Method, path: &str, body: impl Into<Body>) -> Answer {
        let request = Request::builder().method(method).uri(path).header("host", "forkd.example");
        let request = request.header("content-type", "application/json");
        collect(self.send(request.body(body.into()).expect("request")).await).await
    }

    async fn get(&self, path: &str) -> Answer {
        self.call(Method::GET, path, Body::empty()).await
    }
}

async fn collect(response: Response<Incoming>) -> Answer {
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let bytes = response.into_body().collect().await.expect("a whole body").to_bytes().to_vec();
    Answer { status, headers, bytes }
}
