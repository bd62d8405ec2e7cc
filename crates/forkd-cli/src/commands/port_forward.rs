//! `port-forward`: a TCP port of a sandbox's guest, on this host.
//!
//! Every connection is carried by the agent to the guest's loopback, so it needs no network in the guest. It
//! belongs to the sandbox it was made to: a copy does not have it, and the sandbox keeps it while it is branched.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use clap::Args;
use forkd_proto::frame::{Frame, FrameError, Kind};
use forkd_types::SandboxId;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::{Context, sandbox_error};
use crate::client::{AgentConnection, Client, ClientError, FrameReader, FrameWriter};
use crate::failure::advised;
use crate::interrupt::Interrupts;
use crate::output;
use crate::progress::Progress;

/// Bytes in one frame.
const CHUNK: usize = 64 << 10;

/// Arguments of `forkd port-forward`.
#[derive(Args, Debug)]
pub(crate) struct PortForwardArgs {
    /// The sandbox
    sandbox: SandboxId,
    /// A port of the guest, after another one of this host if it shall not be the same; 0 there is any free one
    #[arg(value_name = "[HERE:]PORT")]
    ports: Ports,
}

/// Which port here, and which in the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Ports {
    here: u16,
    guest: u16,
}

impl std::str::FromStr for Ports {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let expected = "expected a port, or two with a colon between them, such as 8080:80";
        let (here, guest) = text.split_once(':').unwrap_or((text, text));
        let port = |text: &str| text.parse::<u16>().map_err(|_| expected);
        match (port(here)?, port(guest)?) {
            (_, 0) => Err("port 0 of a guest cannot be reached"),
            (here, guest) => Ok(Self { here, guest }),
        }
    }
}

impl PortForwardArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let mut interrupts = Interrupts::catch()?;
        let client = context.client().await?;
        // A sandbox that is not there is better known now than at the first connection.
        client.quiet_agent(&self.sandbox).await.map_err(sandbox_error)?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.ports.here));
        let listener = TcpListener::bind(address).await.map_err(|error| {
            let advice = format!("forkd port-forward {} 0:{}", self.sandbox, self.ports.guest);
            advised(anyhow::Error::from(error).context(format!("could not listen on {address}")), advice)
        })?;
        output::line(listener.local_addr()?)?;
        let note = format!("carries connections to port {} of {}; interrupt it to end", self.ports.guest, self.sandbox);
        context.progress.say(note);
        let serving = serve(&listener, &client, &self.sandbox, self.ports.guest, &context.progress);
        interrupts.guard(serving).await
    }
}

/// Carries every connection that comes.
pub(super) async fn serve(
    listener: &TcpListener,
    client: &Client,
    sandbox: &SandboxId,
    port: u16,
    progress: &Progress,
) -> anyhow::Result<u8> {
    loop {
        let (stream, peer) = listener.accept().await?;
        let (client, sandbox, progress) = (client.clone(), sandbox.clone(), progress.clone());
        tokio::spawn(async move {
            let carried = async {
                stream.set_nodelay(true).map_err(local)?;
                carry(stream, client.quiet_agent(&sandbox).await?, port).await
            };
            if let Err(error) = carried.await {
                progress.warn(format_args!("connection of {peer} to port {port} of {sandbox}: {error}"));
            }
        });
    }
}

/// Carries one connection until both directions have ended, or resets it when the guest's side broke.
async fn carry<S>(mut stream: TcpStream, connection: AgentConnection<S>, port: u16) -> Result<(), ClientError>
where
    S: AsyncRead + AsyncWrite,
{
    // Closed with this set, a connection is reset: one that broke must not look finished.
    set_reset(&stream, true)?;
    let (mut reader, mut writer) = connection.tunnel(port).await?;
    let (mut received, mut to_client) = stream.split();
    tokio::try_join!(send(&mut received, &mut writer), receive(&mut reader, &mut to_client))?;
    set_reset(&stream, false)
}

fn set_reset(stream: &TcpStream, on: bool) -> Result<(), ClientError> {
    let linger = on.then_some(Duration::ZERO);
    rustix::net::sockopt::set_socket_linger(stream, linger).map_err(|error| local(error.into()))
}

/// Client to guest, until the client half-closes.
async fn send<S>(client: &mut (impl AsyncRead + Unpin), guest: &mut FrameWriter<S>) -> Result<(), ClientError>
where
    S: AsyncRead + AsyncWrite,
{
    let mut buffer = vec![0; CHUNK];
    loop {
        let got = client.read(&mut buffer).await.map_err(local)?;
        guest.frame(&Frame::bytes(Kind::Data, &buffer[..got])).await?;
        if got == 0 {
            return Ok(());
        }
    }
}

/// Guest to client, until the guest half-closes.
async fn receive<S>(guest: &mut FrameReader<S>, client: &mut (impl AsyncWrite + Unpin)) -> Result<(), ClientError>
where
    S: AsyncRead + AsyncWrite,
{
    loop {
        let frame = guest.next().await?;
        if frame.kind != Kind::Data {
            return Err(FrameError::Unexpected { expected: Kind::Data, got: frame.kind }.into());
        }
        if frame.payload.is_empty() {
            return client.shutdown().await.map_err(local);
        }
        client.write_all(&frame.payload).await.map_err(local)?;
    }
}

/// The error for the client's side.
fn local(error: std::io::Error) -> ClientError {
    FrameError::from(error).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_proto::agent::{Request, Response};
    use forkd_proto::frame::{HEADER_LEN, Header};
    use tokio::io::DuplexStream;

    async fn next(far: &mut DuplexStream) -> Frame {
        let mut header = [0; HEADER_LEN];
        far.read_exact(&mut header).await.expect("header");
        let header = Header::decode(header).expect("sound");
        let mut payload = vec![0; header.len];
        far.read_exact(&mut payload).await.expect("payload");
        Frame { kind: header.kind, payload }
    }

    async fn say(far: &mut DuplexStream, frame: Frame) {
        far.write_all(&frame.encode()).await.expect("somebody listens");
    }

    /// A client, the carrying of its connection, and the agent's end with the tunnel accepted.
    async fn carried() -> (TcpStream, tokio::task::JoinHandle<Result<(), ClientError>>, DuplexStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let client = TcpStream::connect(listener.local_addr().expect("bound")).await.expect("it listens");
        let (stream, _) = listener.accept().await.expect("it connected");
        let (near, mut far) = tokio::io::duplex(4096);
        let carrying = tokio::spawn(carry(stream, AgentConnection::new(near), 80));
        assert_eq!(next(&mut far).await.parse::<Request>(Kind::Request).expect("one"), Request::Tunnel { port: 80 });
        say(&mut far, Frame::json(Kind::Response, &Response::Done).expect("small")).await;
        (client, carrying, far)
    }

    #[tokio::test]
    async fn both_directions_end_by_themselves() {
        let (mut client, carrying, mut far) = carried().await;
        client.write_all(b"ask").await.expect("open");
        assert_eq!(next(&mut far).await, Frame::bytes(Kind::Data, *b"ask"));
        client.shutdown().await.expect("open");
        assert_eq!(next(&mut far).await, Frame::bytes(Kind::Data, *b""));
        say(&mut far, Frame::bytes(Kind::Data, *b"answer")).await;
        say(&mut far, Frame::bytes(Kind::Data, *b"")).await;
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.expect("a clean end");
        assert_eq!(answer, "answer");
        carrying.await.expect("no panic").expect("carried");
    }

    #[tokio::test]
    async fn a_guest_that_breaks_off_resets_the_client() {
        let (mut client, carrying, mut far) = carried().await;
        say(&mut far, Frame::bytes(Kind::Data, *b"half")).await;
        let mut half = [0; 4];
        client.read_exact(&mut half).await.expect("open");
        drop(far);
        let error = client.read(&mut half).await.expect_err("not a clean end");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        assert!(matches!(carrying.await.expect("no panic"), Err(ClientError::Frame(FrameError::Closed))));
    }

    #[test]
    fn ports_are_one_or_two() {
        assert_eq!("80".parse(), Ok(Ports { here: 80, guest: 80 }));
        assert_eq!("0:80".parse(), Ok(Ports { here: 0, guest: 80 }));
        for wrong in ["", "80:", ":80", "http", "1:2:3", "65536", "80:0"] {
            assert!(wrong.parse::<Ports>().is_err(), "{wrong}");
        }
    }
}
