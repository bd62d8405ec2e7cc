//! A TCP peer outside the guest, which notes the longest time between two echoes.
//!
//! It speaks through a tunnel to a port of the guest, from a thread of its own: the runtime's timers are as coarse
//! as the pauses that are looked for.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use forkd_proto::frame::{Frame, Kind};
use forkd_proto::meter::TICK_US;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::client::{AgentConnection, FrameReader, FrameWriter};

/// A peer that keeps asking; it ends with this.
pub(super) struct Echo {
    marks: mpsc::Sender<oneshot::Sender<anyhow::Result<Duration>>>,
}

/// The peer's side of the connection.
struct Peer<S = TokioIo<Upgraded>> {
    reader: FrameReader<S>,
    writer: FrameWriter<S>,
    sent: u64,
}

impl Echo {
    /// Connects to `port` of the guest and begins.
    pub(super) async fn start<S>(connection: AgentConnection<S>, port: u16) -> anyhow::Result<Self>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (reader, writer) = connection.tunnel(port).await?;
        let mut peer = Peer { reader, writer, sent: 0 };
        let (marks, marked) = mpsc::channel();
        let runtime = Handle::current();
        std::thread::Builder::new().name("echo".into()).spawn(move || {
            let Err(error) = peer.ask_for_ever(&runtime, &marked) else { return };
            let why = format!("{error:#}");
            while let Ok(reply) = marked.recv() {
                let _ = reply.send(Err(anyhow::anyhow!("the TCP connection to the guest broke: {why}")));
            }
        })?;
        Ok(Self { marks })
    }

    /// The longest time between two echoes since the last mark; ends at an echo.
    pub(super) async fn mark(&self) -> anyhow::Result<Duration> {
        let (reply, longest) = oneshot::channel();
        // The thread serves marks until this is dropped, also when its connection broke.
        let ended = "the echo's thread ended";
        self.marks.send(reply).ok().context(ended)?;
        longest.await.context(ended)?
    }
}

impl<S: AsyncRead + AsyncWrite> Peer<S> {
    /// Asks once a millisecond until nobody can mark any more.
    fn ask_for_ever(
        &mut self,
        runtime: &Handle,
        marks: &mpsc::Receiver<oneshot::Sender<anyhow::Result<Duration>>>,
    ) -> anyhow::Result<()> {
        let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
        loop {
            runtime.block_on(self.ask())?;
            let now = Instant::now();
            longest = longest.max(now - last);
            last = now;
            match marks.try_recv() {
                Ok(reply) => drop(reply.send(Ok(std::mem::take(&mut longest)))),
                Err(mpsc::TryRecvError::Empty) => {}
                Err(mpsc::TryRecvError::Disconnected) => return Ok(()),
            }
            std::thread::sleep(Duration::from_micros(TICK_US));
        }
    }

    /// Sends a number and waits until it is back.
    async fn ask(&mut self) -> anyhow::Result<()> {
        self.sent += 1;
        let sent = self.sent.to_le_bytes();
        self.writer.frame(&Frame::bytes(Kind::Data, sent)).await?;
        let mut got = Vec::new();
        while got.len() < sent.len() {
            let frame = self.reader.next().await?;
            if frame.kind != Kind::Data || frame.payload.is_empty() {
                bail!("the guest closed it");
            }
            got.extend(frame.payload);
        }
        if got != sent {
            bail!("{sent:?} was sent and {got:?} came back");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_proto::agent::Response;
    use forkd_proto::frame::{HEADER_LEN, Header};
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    /// Answers the request for a tunnel, then sends back `echoes` times, the last time after `pause`.
    async fn guest(mut far: DuplexStream, echoes: u32, pause: Duration, lie: bool) {
        for number in 0..=echoes {
            let mut header = [0; HEADER_LEN];
            if far.read_exact(&mut header).await.is_err() {
                return;
            }
            let header = Header::decode(header).expect("sound");
            let mut payload = vec![0; header.len];
            far.read_exact(&mut payload).await.expect("whole");
            let frame = match number {
                0 => Frame::json(Kind::Response, &Response::Done).expect("small"),
                _ => {
                    if number == echoes {
                        tokio::time::sleep(pause).await;
                        payload[0] ^= u8::from(lie);
                    }
                    Frame::bytes(Kind::Data, payload)
                }
            };
            far.write_all(&frame.encode()).await.expect("somebody listens");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_standstill_is_seen_and_so_is_an_end() {
        let (near, far) = tokio::io::duplex(4096);
        let standstill = Duration::from_millis(60);
        let guest = tokio::spawn(guest(far, 3, standstill, false));
        let echo = Echo::start(AgentConnection::new(near), 7).await.expect("a tunnel");
        let mut longest = Duration::ZERO;
        let error = loop {
            match echo.mark().await {
                Ok(gap) => longest = longest.max(gap),
                Err(error) => break error.to_string(),
            }
        };
        guest.await.expect("no panic");
        assert!(longest >= standstill, "{longest:?}");
        assert!(error.starts_with("the TCP connection to the guest broke"), "{error}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_comes_back_must_be_what_was_sent() {
        let (near, far) = tokio::io::duplex(4096);
        tokio::spawn(guest(far, 2, Duration::ZERO, true));
        let echo = Echo::start(AgentConnection::new(near), 7).await.expect("a tunnel");
        let error = loop {
            if let Err(error) = echo.mark().await {
                break error.to_string();
            }
        };
        assert!(error.contains("came back"), "{error}");
    }
}
