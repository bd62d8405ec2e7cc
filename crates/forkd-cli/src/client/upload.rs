//! Sending a large sparse file: holes are never read, and cost next to nothing on the wire.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use forkd_types::Digest;
use http::Method;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use rustix::fs::SeekFrom as HoleSeek;
use tokio::sync::mpsc;

use super::exchange::Body;
use super::{Client, ClientError};

/// Bytes handed to the connection at a time.
const CHUNK: usize = 256 << 10;

/// Chunks that may wait for the connection.
const QUEUE: usize = 8;

/// How the bytes travel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Encoding {
    /// As they are: cheapest over a unix socket.
    Raw,
    /// Compressed at zstd's first level: a third of the bytes, and zero runs all but vanish.
    Zstd,
}

impl Client {
    /// Sends the file at `path`, whose content has `digest`. `sent` counts the logical bytes that
    /// have been read so far.
    pub(crate) async fn upload_blob(
        &self,
        digest: &Digest,
        path: &Path,
        encoding: Encoding,
        sent: Arc<AtomicU64>,
    ) -> Result<(), ClientError> {
        let file_error = |source| ClientError::File { path: path.display().to_string(), source };
        let file = File::open(path).map_err(file_error)?;
        let (sender, receiver) = mpsc::channel(QUEUE);
        let reader = tokio::task::spawn_blocking(move || send_file(file, encoding, sender, &sent));
        let stream = futures_util::stream::unfold(receiver, |mut receiver| async {
            receiver.recv().await.map(|chunk: io::Result<Bytes>| (chunk.map(Frame::data), receiver))
        });
        let body = Body {
            content: BodyExt::boxed(StreamBody::new(stream)),
            content_type: Some("application/octet-stream"),
            content_encoding: (encoding == Encoding::Zstd).then_some("zstd"),
        };
        let answered = self.call(Method::PUT, &format!("/v1/blobs/{digest}"), body).await;
        // The daemon's own words are worth more than "broken pipe"; an unreadable file explains both.
        let read = reader.await.expect("the reader does not panic");
        match (answered, read) {
            (Ok(_), Ok(())) => Ok(()),
            (Err(_), Err(Stop::Unreadable(source))) | (Ok(_), Err(Stop::Unreadable(source))) => Err(file_error(source)),
            (Err(error), _) => Err(error),
            // The daemon had seen enough, for example because it has the blob already.
            (Ok(_), Err(Stop::Unwanted)) => Ok(()),
        }
    }
}

/// Why reading ended early.
enum Stop {
    /// The file could not be read.
    Unreadable(io::Error),
    /// The connection takes no more.
    Unwanted,
}

fn send_file(
    file: File,
    encoding: Encoding,
    sender: mpsc::Sender<io::Result<Bytes>>,
    sent: &AtomicU64,
) -> Result<(), Stop> {
    let mut sink = ChunkSink { sender, pending: Vec::with_capacity(CHUNK), closed: false };
    let copied = match encoding {
        Encoding::Raw => copy_sparse(file, &mut sink, sent),
        Encoding::Zstd => zstd::Encoder::new(&mut sink, 1).and_then(|mut encoder| {
            copy_sparse(file, &mut encoder, sent)?;
            encoder.finish().map(drop)
        }),
    };
    let finished = copied.and_then(|()| sink.flush_pending());
    match finished {
        Ok(()) => Ok(()),
        Err(_) if sink.closed => Err(Stop::Unwanted),
        Err(error) => {
            let _ = sink.sender.blocking_send(Err(io::Error::other("the file could not be read")));
            Err(Stop::Unreadable(error))
        }
    }
}

/// Writes the logical content of `file`; holes become zeros without being read.
pub(crate) fn copy_sparse(mut file: File, sink: &mut impl Write, sent: &AtomicU64) -> io::Result<()> {
    let len = file.metadata()?.len();
    let zeros = vec![0; CHUNK];
    let mut buffer = vec![0; CHUNK];
    let mut position = 0;
    while position < len {
        let data = match rustix::fs::seek(&file, HoleSeek::Data(position)) {
            Ok(data) => data.min(len),
            Err(rustix::io::Errno::NXIO) => len,
            Err(_) => position,
        };
        while position < data {
            let count = (data - position).min(CHUNK as u64);
            sink.write_all(&zeros[..count as usize])?;
            position += count;
            sent.store(position, Ordering::Relaxed);
        }
        if position == len {
            break;
        }
        let hole = rustix::fs::seek(&file, HoleSeek::Hole(position)).unwrap_or(len).clamp(position + 1, len);
        file.seek(SeekFrom::Start(position))?;
        while position < hole {
            let count = (hole - position).min(CHUNK as u64) as usize;
            file.read_exact(&mut buffer[..count])?;
            sink.write_all(&buffer[..count])?;
            position += count as u64;
            sent.store(position, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// Collects bytes into chunks for the connection, waiting while it is busy.
struct ChunkSink {
    sender: mpsc::Sender<io::Result<Bytes>>,
    pending: Vec<u8>,
    closed: bool,
}

impl ChunkSink {
    fn flush_pending(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let chunk = std::mem::replace(&mut self.pending, Vec::with_capacity(CHUNK));
        self.sender.blocking_send(Ok(chunk.into())).map_err(|_| {
            self.closed = true;
            io::Error::from(io::ErrorKind::BrokenPipe)
        })
    }
}

impl Write for ChunkSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = CHUNK - self.pending.len();
        let taken = bytes.len().min(room);
        self.pending.extend_from_slice(&bytes[..taken]);
        if self.pending.len() == CHUNK {
            self.flush_pending()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A sparse file: `pieces` of (64 KiB block number, byte) written, the rest holes.
    fn sparse(len: u64, pieces: &[(u64, u8)]) -> (File, Vec<u8>) {
        let mut file = tempfile::tempfile().expect("scratch file");
        file.set_len(len).expect("set length");
        for &(block, byte) in pieces {
            let start = (block << 16).min(len);
            let count = (len - start).min(1 << 16) as usize;
            file.seek(SeekFrom::Start(start)).expect("seek");
            file.write_all(&vec![byte; count]).expect("write");
        }
        let mut content = Vec::new();
        file.rewind().expect("seek");
        file.read_to_end(&mut content).expect("read");
        (file, content)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn the_logical_content_arrives_whatever_the_encoding(
            len in 0u64..3 << 20,
            pieces in proptest::collection::vec((0u64..48, 1u8..), 0..6),
        ) {
            for encoding in [Encoding::Raw, Encoding::Zstd] {
                let (file, content) = sparse(len, &pieces);
                let (sender, mut receiver) = mpsc::channel(QUEUE);
                let sent = AtomicU64::new(0);
                let mut wire = Vec::new();
                std::thread::scope(|scope| {
                    scope.spawn(|| assert!(send_file(file, encoding, sender, &sent).is_ok(), "read failed"));
                    while let Some(chunk) = receiver.blocking_recv() {
                        wire.extend_from_slice(&chunk.expect("no read error"));
                    }
                });
                let arrived = match encoding {
                    Encoding::Raw => wire,
                    Encoding::Zstd => zstd::decode_all(wire.as_slice()).expect("sound zstd"),
                };
                prop_assert!(arrived == content, "content differs");
                prop_assert_eq!(sent.load(Ordering::Relaxed), len);
            }
        }
    }

    #[test]
    fn a_connection_that_takes_no_more_stops_the_reader() {
        let (file, _) = sparse(4 << 20, &[(0, 1)]);
        let (sender, receiver) = mpsc::channel(QUEUE);
        drop(receiver);
        assert!(matches!(send_file(file, Encoding::Raw, sender, &AtomicU64::new(0)), Err(Stop::Unwanted)));
    }
}
