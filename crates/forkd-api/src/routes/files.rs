//! Files of a sandbox's guest.
//!
//! A written file replaces the old one whole or not at all: the agent writes it beside the old one and renames it.
//! It keeps the owner and the mode of the file that it replaces; a new one belongs to root and has the mode that
//! was asked for. Paths are absolute, and a final symbolic link is followed when contents are read or written.

use std::convert::Infallible;

use axum::Json as Answer;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use forkd_node::{FileContent, GuestConnection, GuestError, Upload};
use forkd_proto::agent::{ChangeKind, FileChange, FileInfo, FileType};
use forkd_types::SandboxId;
use forkd_types::rest::{
    FileEntry, FileEvent, FileEventKind, FileKind, MakeDirectoryRequest, MoveFileRequest, WrittenFile,
};
use futures_util::{Stream, StreamExt};
use serde::Deserialize;

use crate::byte_range::RequestedRange;
use crate::error::{ApiError, ApiResult};
use crate::extract::{Json, Query};
use crate::pieces;
use crate::router::{Api, Segment};

/// Permission bits of a new file for which none were asked.
const DEFAULT_MODE: u32 = 0o644;

/// Names a file.
#[derive(Deserialize)]
pub(crate) struct PathQuery {
    /// Absolute path in the guest.
    path: String,
}

/// Names a file to be written.
#[derive(Deserialize)]
pub(crate) struct WriteQuery {
    /// Absolute path in the guest.
    path: String,
    /// Permission bits of a new file, in octal.
    mode: Option<String>,
    /// Make missing parent directories.
    #[serde(default)]
    parents: bool,
}

/// Names a file or a tree.
#[derive(Deserialize)]
pub(crate) struct TreeQuery {
    /// Absolute path in the guest.
    path: String,
    /// Also what is below it.
    #[serde(default)]
    recursive: bool,
}

/// Names a directory to unpack into.
#[derive(Deserialize)]
pub(crate) struct ExtractQuery {
    /// Absolute path in the guest of a directory that is there.
    path: String,
    /// Give files the owners that the stream names; otherwise they belong to root.
    #[serde(default)]
    owners: bool,
}

/// A connection to the agent of the sandbox that the path names.
async fn connect(api: &Api, segment: &Segment) -> ApiResult<(SandboxId, GuestConnection)> {
    let id = segment.sandbox()?;
    let connection = api.agent(&id, false).await?;
    Ok((id, connection))
}

/// `GET /v1/sandboxes/:id/files?path=`: the file's bytes, or the range of them that the client asks for.
pub(crate) async fn read(
    State(api): State<Api>,
    segment: Segment,
    Query(query): Query<PathQuery>,
    headers: HeaderMap,
) -> ApiResult<Response> {
    let (id, connection) = connect(&api, &segment).await?;
    let wanted = RequestedRange::of(&headers);
    let range = wanted.map(RequestedRange::for_guest);
    let (info, content) = match connection.read_file(query.path, range).await {
        Ok(read) => read,
        Err(error) => return Err(api.guest_error(&id, "read a file", error).await),
    };
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::ACCEPT_RANGES, header::HeaderValue::from_static("bytes"));
    let Some(wanted) = wanted else {
        // Files of /proc claim to be empty; their end is where it comes.
        let length = (info.size > 0).then_some(info.size);
        if let Some(length) = length {
            headers.insert(header::CONTENT_LENGTH, length.into());
        }
        return Ok((headers, Body::from_stream(bytes(content, length))).into_response());
    };
    let Some((first, length)) = wanted.within(info.size) else {
        return Err(ApiError::range_not_satisfiable(info.size));
    };
    headers.insert(header::CONTENT_LENGTH, length.into());
    let range = format!("bytes {first}-{}/{}", first + length - 1, info.size);
    headers.insert(header::CONTENT_RANGE, range.parse().expect("digits, a dash and a slash are legal in a header"));
    Ok((StatusCode::PARTIAL_CONTENT, headers, Body::from_stream(bytes(content, Some(length)))).into_response())
}

/// The bytes of a file as a body: exactly `length`, if it is known. A file that became shorter breaks the body off,
/// one that became longer is cut.
fn bytes(content: FileContent, length: Option<u64>) -> impl Stream<Item = Result<Bytes, GuestError>> + Send {
    futures_util::stream::try_unfold((content, length), |(mut content, left)| async move {
        if left == Some(0) {
            return Ok(None);
        }
        let Some(mut piece) = content.next().await? else { return Ok(None) };
        let left = left.map(|left| {
            piece.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            left - piece.len() as u64
        });
        Ok(Some((piece, (content, left))))
    })
}

/// `PUT /v1/sandboxes/:id/files?path=&mode=&parents=`: the body, of any length, becomes the file.
pub(crate) async fn write(
    State(api): State<Api>,
    segment: Segment,
    Query(query): Query<WriteQuery>,
    body: Body,
) -> ApiResult<Answer<WrittenFile>> {
    let mode = query.mode.as_deref().map_or(Ok(DEFAULT_MODE), octal)?;
    let (id, connection) = connect(&api, &segment).await?;
    let upload = connection.write_file(query.path.clone(), mode, query.parents).await;
    let size = send(&api, &id, "write a file", upload, body).await?;
    Ok(Answer(WrittenFile { path: query.path, size }))
}

/// Permission bits in octal.
fn octal(text: &str) -> ApiResult<u32> {
    let bits = u32::from_str_radix(text, 8).ok().filter(|bits| *bits <= 0o7777);
    bits.ok_or_else(|| {
        ApiError::bad_request("bad_field", format!("mode is {text:?}; give permission bits in octal, such as 644"))
    })
}

/// Hands a body on to the guest and returns its length.
async fn send(
    api: &Api,
    id: &SandboxId,
    what: &'static str,
    upload: Result<Upload, GuestError>,
    body: Body,
) -> ApiResult<u64> {
    let mut body = body.into_data_stream();
    let sending = async {
        let mut upload = upload?;
        let mut size = 0;
        while let Some(piece) = body.next().await {
            let piece = match piece {
                Ok(piece) => piece,
                // Dropped unfinished, the upload changes nothing.
                Err(error) => return Ok(Err(ApiError::broken_body(format!("the body broke off: {error}")))),
            };
            upload.write(&piece).await?;
            size += piece.len() as u64;
        }
        upload.finish().await?;
        Ok::<_, GuestError>(Ok(size))
    };
    match sending.await {
        Ok(outcome) => outcome,
        Err(error) => {
            pieces::linger(body);
            Err(api.guest_error(id, what, error).await)
        }
    }
}

/// `GET /v1/sandboxes/:id/files/archive?path=`: a file or a tree as a tar stream whose entries start with its name.
pub(crate) async fn archive(
    State(api): State<Api>,
    segment: Segment,
    Query(query): Query<PathQuery>,
) -> ApiResult<Response> {
    let (id, connection) = connect(&api, &segment).await?;
    match connection.archive(query.path).await {
        Ok(content) => {
            let headers = [(header::CONTENT_TYPE, "application/x-tar")];
            Ok((headers, Body::from_stream(bytes(content, None))).into_response())
        }
        Err(error) => Err(api.guest_error(&id, "pack files", error).await),
    }
}

/// `PUT /v1/sandboxes/:id/files/archive?path=&owners=`: unpacks a tar stream into a directory.
pub(crate) async fn extract(
    State(api): State<Api>,
    segment: Segment,
    Query(query): Query<ExtractQuery>,
    body: Body,
) -> ApiResult<StatusCode> {
    let (id, connection) = connect(&api, &segment).await?;
    let upload = connection.extract(query.path, query.owners).await;
    send(&api, &id, "unpack files", upload, body).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `GET /v1/sandboxes/:id/files/list?path=`: what is in a directory, in the order of names.
pub(crate) async fn list(
    State(api): State<Api>,
    segment: Segment,
    Query(query): Query<PathQuery>,
) -> ApiResult<Answer<Vec<FileEntry>>> {
    let (id, connection) = connect(&api, &segment).await?;
    match connection.list(query.path.clone()).await {
        Ok(all) => {
            let directory = query.path.trim_end_matches('/');
            let entry = |info: FileInfo| {
                let path = format!("{directory}/{}", info.name);
                entry_of(info, path)
            };
            Ok(Answer(all.into_iter().map(entry).collect()))
        }
        Err(error) => Err(api.guest_error(&id, "list a directory", error).await),
    }
}

/// `GET /v1/sandboxes/:id/files/stat?path=`: one file; a symbolic link is described, not followed.
pub(crate) async fn stat(
    State(api): State<Api>,
    segment: Segment,
    Query(query): Query<PathQuery>,
) -> ApiResult<Answer<FileEntry>> {
    let (id, connection) = connect(&api, &segment).await?;
    match connection.stat(query.path.clone()).await {
        Ok(info) => Ok(Answer(entry_of(info, query.path))),
        Err(error) => Err(api.guest_error(&id, "describe a file", error).await),
    }
}

fn entry_of(info: FileInfo, path: String) -> FileEntry {
    let kind = match info.file_type {
        FileType::File => FileKind::File,
        FileType::Directory => FileKind::Directory,
        FileType::Symlink => FileKind::Symlink,
        FileType::Other => FileKind::Other,
    };
    let FileInfo { size, mode, uid, gid, modified_unix, target, .. } = info;
    let name = path.trim_end_matches('/').rsplit('/').next().filter(|name| !name.is_empty()).unwrap_or("/").to_owned();
    FileEntry { name, path, kind, size, mode: format!("{mode:04o}"), uid, gid, modified_unix, target }
}

/// `POST /v1/sandboxes/:id/files/mkdir`.
pub(crate) async fn make_directory(
    State(api): State<Api>,
    segment: Segment,
    Json(request): Json<MakeDirectoryRequest>,
) -> ApiResult<StatusCode> {
    let (id, connection) = connect(&api, &segment).await?;
    match connection.make_directory(request.path).await {
        Ok(()) => Ok(StatusCode::NO_CONTENT),
        Err(error) => Err(api.guest_error(&id, "make a directory", error).await),
    }
}

/// `POST /v1/sandboxes/:id/files/move`.
pub(crate) async fn rename(
    State(api): State<Api>,
    segment: Segment,
    Json(request): Json<MoveFileRequest>,
) -> ApiResult<StatusCode> {
    let (id, connection) = connect(&api, &segment).await?;
    match connection.rename(request.from, request.to).await {
        Ok(()) => Ok(StatusCode::NO_CONTENT),
        Err(error) => Err(api.guest_error(&id, "move a file", error).await),
    }
}

/// `DELETE /v1/sandboxes/:id/files?path=&recursive=`.
pub(crate) async fn remove(
    State(api): State<Api>,
    segment: Segment,
    Query(query): Query<TreeQuery>,
) -> ApiResult<StatusCode> {
    let (id, connection) = connect(&api, &segment).await?;
    match connection.remove(query.path, query.recursive).await {
        Ok(()) => Ok(StatusCode::NO_CONTENT),
        Err(error) => Err(api.guest_error(&id, "remove a file", error).await),
    }
}

/// `GET /v1/sandboxes/:id/files/watch?path=&recursive=`: changes as server-sent events, until the client goes or
/// what is watched is gone, which an `error` event tells.
pub(crate) async fn watch(
    State(api): State<Api>,
    segment: Segment,
    Query(query): Query<TreeQuery>,
) -> ApiResult<Response> {
    let (id, connection) = connect(&api, &segment).await?;
    let changes = match connection.watch(query.path, query.recursive).await {
        Ok(changes) => changes,
        Err(error) => return Err(api.guest_error(&id, "watch files", error).await),
    };
    let events = futures_util::stream::unfold(Some(changes), move |changes| {
        let (api, id) = (api.clone(), id.clone());
        async move {
            let mut changes = changes?;
            match changes.next().await {
                Ok(Some(change)) => Some((change_event(change), Some(changes))),
                Ok(None) => None,
                Err(error) => Some((api.guest_error(&id, "watch files", error).await.into_event(), None)),
            }
        }
    });
    let events = events.map(Ok::<_, Infallible>);
    Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response())
}

fn change_event(change: FileChange) -> Event {
    let (kind, name) = match change.change {
        ChangeKind::Created => (FileEventKind::Created, "created"),
        ChangeKind::Modified => (FileEventKind::Modified, "modified"),
        ChangeKind::Written => (FileEventKind::Written, "written"),
        ChangeKind::Attributes => (FileEventKind::Attributes, "attributes"),
        ChangeKind::Removed => (FileEventKind::Removed, "removed"),
        ChangeKind::Moved => (FileEventKind::Moved, "moved"),
        ChangeKind::Missed => (FileEventKind::Missed, "missed"),
        ChangeKind::Other => (FileEventKind::Other, "other"),
    };
    let FileChange { path, from, directory, .. } = change;
    let event = FileEvent { kind, path, from, directory };
    Event::default().event(name).data(crate::json_lines::text(&event))
}
