//! Packs from and to a daemon, of any length.

use std::io::{self, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use forkd_types::Tag;
use forkd_types::rest::UnpackReport;
use http::Method;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use tokio::sync::mpsc;
use url::form_urlencoded::Serializer;

use super::exchange::{Answer, Body, empty};
use super::{Client, ClientError};

/// Bytes handed to the connection at a time.
const CHUNK: usize = 256 << 10;

/// Chunks that may wait for the connection.
const QUEUE: usize = 8;

/// What a pack is to be like.
#[derive(Clone, Debug, Default)]
pub(crate) struct PackQuery {
    /// What to say about the snapshot.
    pub(crate) description: Option<String>,
    /// What to say it was baked from.
    pub(crate) base_image: Option<String>,
    /// Compression level; the daemon's own choice when absent.
    pub(crate) level: Option<i32>,
}

/// How a pack is taken in.
#[derive(Clone, Debug, Default)]
pub(crate) struct UnpackQuery {
    /// Another name for the snapshot.
    pub(crate) tag: Option<Tag>,
    /// Replace others of the same names.
    pub(crate) force: bool,
    /// The public key that must have signed it, in hex.
    pub(crate) verify_key: Option<String>,
}

/// A pack on its way here.
pub(crate) struct IncomingPack {
    path: String,
    answer: Answer,
}

impl IncomingPack {
    /// How long it is once decompressed.
    pub(crate) fn archive_bytes(&self) -> Option<u64> {
        self.answer.headers().get("forkd-archive-bytes")?.to_str().ok()?.parse().ok()
    }

    /// The next piece; none at the end. A pack that breaks off is an error.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        while let Some(frame) = self.answer.body_mut().frame().await {
            let frame = frame.map_err(|source| ClientError::Broken { path: self.path.clone(), source })?;
            if let Ok(data) = frame.into_data() {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }
}

impl Client {
    /// Asks for a pack of a snapshot. The answer comes when the daemon has read all of it once.
    pub(crate) async fn pack(&self, tag: &Tag, query: &PackQuery) -> Result<IncomingPack, ClientError> {
        let level = query.level.map(|level| level.to_string());
        let pairs = [("description", &query.description), ("base_image", &query.base_image), ("level", &level)];
        let path = with_query(&format!("/v1/snapshots/{tag}/pack"), pairs);
        let answer = self.call(Method::GET, &path, empty()).await?;
        Ok(IncomingPack { path, answer })
    }

    /// Sends a pack. `sent` counts the bytes that were read from `pack` so far.
    pub(crate) async fn unpack(
        &self,
        query: &UnpackQuery,
        pack: impl Read + Send + 'static,
        sent: Arc<AtomicU64>,
    ) -> Result<UnpackReport, ClientError> {
        let (tag, force) = (query.tag.as_ref().map(Tag::to_string), query.force.then(|| "true".to_owned()));
        let path = with_query("/v1/packs", [("tag", &tag), ("force", &force), ("verify_key", &query.verify_key)]);
        let (sender, receiver) = mpsc::channel(QUEUE);
        let unreadable = Arc::new(Mutex::new(None));
        let noted = Arc::clone(&unreadable);
        tokio::task::spawn_blocking(move || {
            if let Err(error) = send_all(pack, &sender, &sent) {
                *noted.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                let _ = sender.blocking_send(Err(io::Error::other("the pack could not be read")));
            }
        });
        let stream = futures_util::stream::unfold(receiver, |mut receiver| async {
            receiver.recv().await.map(|chunk: io::Result<Bytes>| (chunk.map(Frame::data), receiver))
        });
        let content = BodyExt::boxed(StreamBody::new(stream));
        let body = Body { content, content_type: Some("application/zstd"), content_encoding: None };
        let answer = match self.call(Method::POST, &path, body).await {
            Ok(answer) => answer,
            Err(error) => {
                // What could not be read explains a connection that was given up.
                let source = unreadable.lock().unwrap_or_else(PoisonError::into_inner).take();
                return Err(match source {
                    Some(source) => ClientError::File { path: "the pack".to_owned(), source },
                    None => error,
                });
            }
        };
        self.parse(&path, answer).await
    }
}

/// Hands `pack` on in chunks until its end or until nobody takes them any more.
fn send_all(mut pack: impl Read, sender: &mpsc::Sender<io::Result<Bytes>>, sent: &AtomicU64) -> io::Result<()> {
    loop {
        let mut chunk = Vec::with_capacity(CHUNK);
        (&mut pack).take(CHUNK as u64).read_to_end(&mut chunk)?;
        let len = chunk.len();
        if len == 0 || sender.blocking_send(Ok(chunk.into())).is_err() {
            return Ok(());
        }
        sent.fetch_add(len as u64, Ordering::Relaxed);
    }
}

fn with_query<const N: usize>(path: &str, pairs: [(&str, &Option<String>); N]) -> String {
    let mut query = Serializer::new(String::new());
    for (key, value) in pairs {
        if let Some(value) = value {
            query.append_pair(key, value);
        }
    }
    let query = query.finish();
    if query.is_empty() { path.to_owned() } else { format!("{path}?{query}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_hold_what_was_given_and_nothing_else() {
        let (text, none) = (Some("a b&c=ü".to_owned()), None);
        assert_eq!(with_query("/p", [("x", &none), ("y", &none)]), "/p");
        assert_eq!(with_query("/p", [("x", &none), ("y", &text)]), "/p?y=a+b%26c%3D%C3%BC");
    }
}
