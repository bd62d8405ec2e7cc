//! A pack as it comes from a daemon: signed on the way if asked for, looked through, hashed, written.

use std::io::{self, BufReader, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use bytes::{Buf, Bytes};
use forkd_store::pack::{Manifest, PackError, SigningKey, sign};
use forkd_types::Tag;
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use crate::client::{Client, ClientError, PackQuery};
use crate::progress::Progress;

/// How often a bar is moved.
const REDRAW: Duration = Duration::from_millis(100);

/// Pieces that may wait for the disk.
const QUEUE: usize = 16;

/// What a pack turned out to be.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct PackFacts {
    /// The snapshot.
    pub(crate) tag: Tag,
    /// It and all that it derives from, the base first.
    pub(crate) snapshots: Vec<Tag>,
    /// Kernels, initramfs images and root disks.
    pub(crate) blobs: usize,
    /// What is in it, holes not counted.
    pub(crate) data_bytes: u64,
    /// Length of the file.
    pub(crate) bytes: u64,
    /// SHA-256 of the file, as a registry's index has it.
    pub(crate) sha256: String,
    /// Whether it was signed.
    pub(crate) signed: bool,
}

/// Fetches a pack of `tag` and writes it to `out`.
pub(crate) async fn fetch(
    client: &Client,
    tag: &Tag,
    query: &PackQuery,
    key: Option<SigningKey>,
    out: impl Write + Send + 'static,
    progress: &Progress,
) -> anyhow::Result<PackFacts> {
    let step = progress.step(format!("Packing {tag}"));
    step.detail("the daemon reads it once for its digests");
    let mut incoming = client.pack(tag, query).await.map_err(crate::commands::snapshot_error)?;
    if let Some(bytes) = incoming.archive_bytes() {
        step.set_bytes(bytes);
    }
    let (sender, receiver) = mpsc::channel::<io::Result<Bytes>>(QUEUE);
    let position = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&position);
    let writing = tokio::task::spawn_blocking(move || write(receiver, out, key, seen));
    let mut redraw = tokio::time::interval(REDRAW);
    let broken: Option<ClientError> = loop {
        tokio::select! {
            piece = incoming.next() => match piece {
                Ok(Some(piece)) => {
                    // When nobody takes it any more the writer says why.
                    if sender.send(Ok(piece)).await.is_err() {
                        break None;
                    }
                }
                Ok(None) => break None,
                Err(error) => {
                    let _ = sender.send(Err(io::Error::other("the daemon broke off"))).await;
                    break Some(error);
                }
            },
            _ = redraw.tick() => step.set_position(position.load(Ordering::Relaxed)),
        }
    };
    drop(sender);
    let written = writing.await.context("the background task was cancelled")?;
    if let Some(error) = broken {
        return Err(anyhow::Error::from(error).context(format!("the pack of {tag} did not come to its end")));
    }
    let facts = written?;
    step.done(format_args!(
        "Packed {tag}: {}, {} with {} of data",
        forkd_types::ByteSize(facts.bytes),
        crate::units::count(facts.snapshots.len(), "snapshot"),
        forkd_types::ByteSize(facts.data_bytes)
    ));
    Ok(facts)
}

fn write(
    receiver: mpsc::Receiver<io::Result<Bytes>>,
    out: impl Write,
    key: Option<SigningKey>,
    position: Arc<AtomicU64>,
) -> anyhow::Result<PackFacts> {
    let mut source = BufReader::new(Pieces { receiver, current: Bytes::new() });
    let (meter, looking) = meter(position);
    let mut out = Measured { out, meter: Some(meter), sha256: Sha256::new(), bytes: 0 };
    let copied = match &key {
        Some(key) => sign(&mut source, &mut out, key).map(drop),
        None => io::copy(&mut source, &mut out).and_then(|_| out.flush()).map_err(PackError::Output),
    };
    out.meter = None;
    let manifest = looking.join().map_err(|_| anyhow::anyhow!("the pack could not be looked through"))?;
    copied?;
    let manifest = manifest.context("the pack that came is damaged")?;
    Ok(PackFacts {
        tag: manifest.tag.clone(),
        snapshots: manifest.snapshots.iter().map(|snapshot| snapshot.tag.clone()).collect(),
        blobs: manifest.blobs.len(),
        data_bytes: manifest.data_bytes(),
        bytes: out.bytes,
        sha256: hex(&out.sha256.finalize()),
        signed: key.is_some(),
    })
}

/// Lower-case hex digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Pieces from the network as something to read.
struct Pieces {
    receiver: mpsc::Receiver<io::Result<Bytes>>,
    current: Bytes,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.receiver.blocking_recv() {
                Some(piece) => self.current = piece?,
                None => return Ok(0),
            }
        }
        let len = buffer.len().min(self.current.len());
        self.current.copy_to_slice(&mut buffer[..len]);
        Ok(len)
    }
}

/// Writes, and hands everything to the one who looks through it.
struct Measured<W> {
    out: W,
    meter: Option<SyncSender<Vec<u8>>>,
    sha256: Sha256,
    bytes: u64,
}

impl<W: Write> Write for Measured<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = self.out.write(bytes)?;
        self.sha256.update(&bytes[..len]);
        self.bytes += len as u64;
        // One who stopped looking has found damage, and says so at the end.
        if self.meter.as_ref().is_some_and(|meter| meter.send(bytes[..len].to_vec()).is_err()) {
            self.meter = None;
        }
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// A thread that decompresses what it is sent: how far it has come is the only measure of progress there is, and
/// what it cannot read is no pack.
fn meter(position: Arc<AtomicU64>) -> (SyncSender<Vec<u8>>, JoinHandle<Result<Manifest, PackError>>) {
    let (sender, receiver) = sync_channel(QUEUE);
    let looking = std::thread::spawn(move || {
        let mut source = BufReader::new(Sent { receiver, current: Bytes::new() });
        let manifest = Manifest::of_pack(&mut source)?;
        let damaged = |source| PackError::Undecodable { at: position.load(Ordering::Relaxed), source };
        let mut decoder = zstd::Decoder::with_buffer(source).map_err(damaged)?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            let len = decoder.read(&mut buffer).map_err(damaged)?;
            if len == 0 {
                return Ok(manifest);
            }
            position.fetch_add(len as u64, Ordering::Relaxed);
        }
    });
    (sender, looking)
}

struct Sent {
    receiver: Receiver<Vec<u8>>,
    current: Bytes,
}

impl Read for Sent {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.receiver.recv() {
                Ok(piece) => self.current = piece.into(),
                Err(_) => return Ok(0),
            }
        }
        let len = buffer.len().min(self.current.len());
        self.current.copy_to_slice(&mut buffer[..len]);
        Ok(len)
    }
}
