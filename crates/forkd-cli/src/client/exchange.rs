//! One HTTP exchange over one connection.

use std::io;

use bytes::{Bytes, BytesMut};
use http::header::{AUTHORIZATION, CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Address, ClientError};

/// The longest line of a streamed answer.
const LINE_LIMIT: usize = 4 << 20;

/// What a request carries.
pub(super) struct Body {
    pub(super) content: BoxBody<Bytes, io::Error>,
    pub(super) content_type: Option<&'static str>,
    pub(super) content_encoding: Option<&'static str>,
}

/// A successful answer whose body is still to be read.
pub(super) type Answer = Response<Incoming>;

/// No body and no content type.
pub(super) fn empty() -> Body {
    let content = Empty::new().map_err(|never| match never {}).boxed();
    Body { content, content_type: None, content_encoding: None }
}

/// `value` as a JSON body for `path`.
pub(super) fn json(path: &str, value: &impl Serialize) -> Result<Body, ClientError> {
    let bytes = serde_json::to_vec(value).map_err(|source| ClientError::Malformed { path: path.to_owned(), source })?;
    let content = Full::new(Bytes::from(bytes)).map_err(|never| match never {}).boxed();
    Ok(Body { content, content_type: Some("application/json"), content_encoding: None })
}

/// Sends a request; an answer outside 2xx becomes an error.
pub(super) async fn send(
    address: &Address,
    token: Option<&str>,
    method: Method,
    path: &str,
    body: Body,
) -> Result<Answer, ClientError> {
    let mut request = request(address, token, method, path)?;
    if let Some(content_type) = body.content_type {
        request = request.header(CONTENT_TYPE, content_type);
    }
    if let Some(encoding) = body.content_encoding {
        request = request.header(http::header::CONTENT_ENCODING, encoding);
    }
    let request = finish(path, request, body.content)?;
    let response = exchange(address, path, request).await?;
    if response.status().is_success() { Ok(response) } else { Err(refusal(path, response).await) }
}

/// Turns a connection into a raw byte stream of `protocol`.
pub(super) async fn upgrade(
    address: &Address,
    token: Option<&str>,
    path: &str,
    protocol: &'static str,
) -> Result<TokioIo<Upgraded>, ClientError> {
    let request = request(address, token, Method::GET, path)?.header(CONNECTION, "Upgrade").header(UPGRADE, protocol);
    let request = finish(path, request, empty().content)?;
    let response = exchange(address, path, request).await?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(refusal(path, response).await);
    }
    let upgraded = hyper::upgrade::on(response).await.map_err(|source| broken(path, source))?;
    Ok(TokioIo::new(upgraded))
}

/// Reads a whole body.
pub(super) async fn collect(path: &str, response: Answer) -> Result<Vec<u8>, ClientError> {
    let body = response.into_body().collect().await.map_err(|source| broken(path, source))?;
    Ok(body.to_bytes().into())
}

/// Reads a body piece by piece as it comes.
pub(super) async fn each_piece(
    path: &str,
    response: Answer,
    mut piece: impl FnMut(&[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut body = response.into_body();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame.map_err(|source| broken(path, source))?.into_data() {
            piece(&data)?;
        }
    }
    Ok(())
}

/// Reads a body of JSON lines as they come.
pub(super) async fn each_line<T: DeserializeOwned>(
    path: &str,
    response: Answer,
    mut event: impl FnMut(T) -> Result<(), ClientError>,
) -> Result<(), ClientError> {
    let mut body = response.into_body();
    let mut pending = BytesMut::new();
    let mut parse = |line: &[u8]| {
        if line.trim_ascii().is_empty() {
            return Ok(());
        }
        let value =
            serde_json::from_slice(line).map_err(|source| ClientError::Malformed { path: path.to_owned(), source })?;
        event(value)
    };
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|source| broken(path, source))?.into_data() else { continue };
        pending.extend_from_slice(&data);
        while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
            parse(&pending.split_to(end + 1))?;
        }
        if pending.len() > LINE_LIMIT {
            let error = format!("the daemon's answer to {path} has a line of more than {LINE_LIMIT} bytes");
            return Err(ClientError::Failed(error));
        }
    }
    parse(&pending)
}

fn request(
    address: &Address,
    token: Option<&str>,
    method: Method,
    path: &str,
) -> Result<http::request::Builder, ClientError> {
    let request = Request::builder().method(method).uri(path).header(HOST, address.authority());
    Ok(match token {
        Some(token) => request.header(AUTHORIZATION, format!("Bearer {}", token.trim())),
        None => request,
    })
}

fn finish(
    path: &str,
    request: http::request::Builder,
    body: BoxBody<Bytes, io::Error>,
) -> Result<Request<BoxBody<Bytes, io::Error>>, ClientError> {
    request.body(body).map_err(|source| ClientError::Request { path: path.to_owned(), source })
}

async fn exchange(
    address: &Address,
    path: &str,
    request: Request<BoxBody<Bytes, io::Error>>,
) -> Result<Answer, ClientError> {
    let unreachable = |source| ClientError::Unreachable { address: address.to_string(), source };
    let stream = address.connect().await.map_err(unreachable)?;
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|source| broken(path, source))?;
    tokio::spawn(connection.with_upgrades());
    sender.send_request(request).await.map_err(|source| broken(path, source))
}

async fn refusal(path: &str, response: Answer) -> ClientError {
    let status = response.status();
    match collect(path, response).await {
        Ok(body) => ClientError::refused(status, &body),
        Err(error) => error,
    }
}

pub(super) fn broken(path: &str, source: hyper::Error) -> ClientError {
    ClientError::Broken { path: path.to_owned(), source }
}
