//! Packs, out of and into the store.

use std::io;

use axum::Json as Answer;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use forkd_node::{DEFAULT_LEVEL, PackOptions, UnpackOptions, VerifyingKey};
use forkd_types::Tag;
use forkd_types::rest::{UnpackFate, UnpackReport};
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::error::{ApiError, ApiResult};
use crate::extract::Query;
use crate::pieces::{self, PieceReader, PieceWriter, QUEUED_PIECES};
use crate::router::{Api, Segment};

/// How long the pack is once decompressed, so that a client can tell how far it has come.
const ARCHIVE_BYTES: HeaderName = HeaderName::from_static("forkd-archive-bytes");

#[derive(Deserialize)]
pub(crate) struct PackQuery {
    level: Option<i32>,
    description: Option<String>,
    base_image: Option<String>,
}

/// `GET /v1/snapshots/:tag/pack`: the pack, as it is made. An answer that breaks off is no pack.
pub(crate) async fn pack(
    State(api): State<Api>,
    segment: Segment,
    Query(query): Query<PackQuery>,
) -> ApiResult<Response> {
    let tag = segment.tag()?;
    let PackQuery { level, description, base_image } = query;
    let level = level.unwrap_or(DEFAULT_LEVEL);
    let pack = api.node.pack(&tag, PackOptions { description, base_image, level, threads: None }).await?;
    let archive_bytes = pack.archive_bytes().map_err(forkd_node::NodeError::from)?;

    let (sender, receiver) = mpsc::channel::<io::Result<Bytes>>(QUEUED_PIECES);
    let name = format!("attachment; filename=\"{tag}.forkd-snapshot.tar.zst\"");
    tokio::task::spawn_blocking(move || {
        if let Err(error) = pack.write(PieceWriter::new(sender.clone()), |_| ()) {
            tracing::warn!(%tag, error = %forkd_node::NodeError::from(error).message(), "a pack was not sent to its end");
            // Without this the body would end as if it were whole.
            let _ = sender.blocking_send(Err(io::Error::other("the pack was not written to its end")));
        }
    });
    let headers = [
        (header::CONTENT_TYPE, "application/zstd".to_owned()),
        (header::CONTENT_DISPOSITION, name),
        (ARCHIVE_BYTES, archive_bytes.to_string()),
    ];
    Ok((headers, Body::from_stream(ReceiverStream::new(receiver))).into_response())
}

#[derive(Deserialize)]
pub(crate) struct UnpackQuery {
    tag: Option<String>,
    #[serde(default)]
    force: bool,
    verify_key: Option<String>,
}

/// `POST /v1/packs`: a pack as body, of any length. 201 when something of it is new, 200 when all was there.
pub(crate) async fn unpack(
    State(api): State<Api>,
    Query(query): Query<UnpackQuery>,
    body: Body,
) -> ApiResult<(StatusCode, Answer<UnpackReport>)> {
    let rename = query.tag.map(|tag| tag.parse::<Tag>()).transpose().map_err(forkd_node::NodeError::from)?;
    let verify_key = query.verify_key.map(|hex| VerifyingKey::from_hex(&hex)).transpose();
    let verify_key = verify_key.map_err(|error| ApiError::bad_request("bad_key", error.to_string()))?;
    let options = UnpackOptions { rename, replace: query.force, verify_key };
    let (sender, queue) = mpsc::channel::<Bytes>(QUEUED_PIECES);
    let (unpacked, received) =
        tokio::join!(api.node.unpack(PieceReader::new(queue), options), pieces::forward(body, sender));
    // A pack that is refused is not read to its end, so its error comes first; a body that broke off makes a
    // pack that is cut off, which would only hide that it broke off.
    received?;
    let report = unpacked?;
    let is_new = report.snapshots.iter().any(|snapshot| snapshot.fate != UnpackFate::Reused);
    Ok((if is_new { StatusCode::CREATED } else { StatusCode::OK }, Answer(report)))
}
