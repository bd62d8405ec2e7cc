//! Uploading kernels, initramfs images and root disks.

use std::io::{self, Write};

use axum::Json as Answer;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use forkd_node::BlobUpload;
use forkd_types::Digest;
use forkd_types::rest::BlobInfo;
use tokio::sync::mpsc;

use crate::error::{ApiError, ApiResult};
use crate::pieces::{self, QUEUED_PIECES};
use crate::router::{Api, Segment};

fn digest_of(segment: &Segment) -> ApiResult<Digest> {
    segment
        .as_str()
        .parse()
        .map_err(|error: forkd_types::DigestError| ApiError::bad_request("bad_digest", error.to_string()))
}

/// `HEAD /v1/blobs/:digest`: 200 with the size as content length, or 404.
pub(crate) async fn head(State(api): State<Api>, segment: Segment) -> ApiResult<Response> {
    let digest = digest_of(&segment)?;
    match api.node.blob_size(&digest).await? {
        Some(size) => Ok([(header::CONTENT_LENGTH, size.to_string())].into_response()),
        None => Err(ApiError::no_such_blob(segment.as_str())),
    }
}

/// How a body is packed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Encoding {
    Plain,
    Zstd,
}

impl Encoding {
    fn of(headers: &HeaderMap) -> ApiResult<Self> {
        match headers.get(header::CONTENT_ENCODING).map(|value| value.to_str().unwrap_or("unreadable")) {
            None | Some("identity") => Ok(Self::Plain),
            Some("zstd") => Ok(Self::Zstd),
            Some(other) => Err(ApiError::unknown_encoding(other)),
        }
    }
}

/// `PUT /v1/blobs/:digest`: the blob's content, plain or zstd-compressed, of any length.
pub(crate) async fn put(
    State(api): State<Api>,
    segment: Segment,
    headers: HeaderMap,
    body: Body,
) -> ApiResult<(StatusCode, Answer<BlobInfo>)> {
    let digest = digest_of(&segment)?;
    let encoding = Encoding::of(&headers)?;
    let node = api.node.clone();
    let (sender, queue) = mpsc::channel::<Bytes>(QUEUED_PIECES);
    let storing = tokio::task::spawn_blocking(move || store(node.upload()?, encoding, queue, digest));
    let received = pieces::forward(body, sender).await;
    let stored = storing.await.map_err(|_| ApiError::broken_body("storing the blob was interrupted"))?;
    // A store that fails stops taking pieces, so its error comes first; a body that broke off makes
    // a digest mismatch, which would only hide that it broke off.
    match (stored, received) {
        (_, Err(error)) => Err(error),
        (Err(error), Ok(())) => Err(error),
        (Ok(bytes), Ok(())) => Ok((StatusCode::CREATED, Answer(BlobInfo { digest, bytes }))),
    }
}

/// Writes the pieces into the store and checks the digest; returns the blob's size.
fn store(upload: BlobUpload, encoding: Encoding, mut pieces: mpsc::Receiver<Bytes>, digest: Digest) -> ApiResult<u64> {
    let mut fill = |sink: &mut dyn Write| -> io::Result<()> {
        while let Some(piece) = pieces.blocking_recv() {
            sink.write_all(&piece)?;
        }
        sink.flush()
    };
    let upload = match encoding {
        Encoding::Plain => {
            let mut upload = upload;
            fill(&mut upload).map_err(|error| not_stored(&error))?;
            upload
        }
        Encoding::Zstd => {
            let mut decoder = zstd::stream::write::Decoder::new(upload).map_err(|error| not_stored(&error))?;
            fill(&mut decoder).map_err(|error| not_stored(&error))?;
            decoder.into_inner()
        }
    };
    let bytes = upload.written();
    upload.finish(digest)?;
    Ok(bytes)
}

/// Running out of space is the host's fault, bytes that are no zstd frame the client's.
fn not_stored(error: &io::Error) -> ApiError {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ApiError::no_space(error),
        _ => ApiError::broken_body(format!("the blob cannot be stored: {error}")),
    }
}
