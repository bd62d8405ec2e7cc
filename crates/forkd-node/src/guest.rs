//! Requests to the agent in a guest.
//!
//! A connection starts on the sandbox's vsock socket with `CONNECT <port>` and the monitor's
//! `OK <port>`; then it carries one request of [`forkd_proto::agent`].

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use forkd_proto::agent::{
    AGENT_PORT, Eval, Evaluated, Exec, Exited, Failure, FailureCode, Identity, Pong, Request, Response,
};
use forkd_proto::frame::{Frame, FrameError, HEADER_LEN, Header, Kind};
use forkd_types::SandboxId;
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Why a request to an agent brought no answer of the expected kind.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The monitor's socket cannot be reached.
    #[error("cannot reach the monitor through {}: {source}", path.display())]
    Monitor {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The monitor has no agent to connect to: it does not listen yet, or has gone.
    #[error("the guest's agent does not accept connections{}", detail(answer))]
    NotListening {
        /// What the monitor said instead of `OK`, if anything.
        answer: String,
    },
    /// The connection broke.
    #[error("the connection to the guest's agent failed: {0}")]
    Connection(#[from] FrameError),
    /// No answer in time.
    #[error("the guest's agent did not {what} within {} s", limit.as_secs_f32())]
    TimedOut {
        /// What was waited for, as a verb phrase.
        what: &'static str,
        /// How long.
        limit: Duration,
    },
    /// The agent refused or failed.
    #[error("{0}")]
    Refused(Failure),
    /// The agent answered something else than the request calls for.
    #[error("the guest's agent answered {got} where {wanted} was expected")]
    Unexpected {
        /// What the request calls for.
        wanted: &'static str,
        /// What came.
        got: String,
    },
    /// A program wrote more than is collected in memory.
    #[error(
        "the program wrote more than {limit} bytes, the most that is collected; stream its output, or send it to a file and read that"
    )]
    OutputTooLarge {
        /// The limit.
        limit: usize,
    },
}

fn detail(answer: &str) -> String {
    if answer.is_empty() { String::new() } else { format!(": the monitor answered {answer:?}") }
}

impl GuestError {
    /// Whether a new connection may succeed where this one failed.
    pub(crate) fn is_transient(&self) -> bool {
        matches!(self, Self::NotListening { .. } | Self::Connection(FrameError::Closed | FrameError::Io(_)))
    }

    /// Whether it may have come from the end of the machine.
    pub(crate) fn is_loss(&self) -> bool {
        self.is_transient() || matches!(self, Self::Monitor { .. })
    }
}

/// How long the monitor and the guest's kernel may take to set a connection up.
const CONNECT_LIMIT: Duration = Duration::from_secs(20);

/// A connection to an agent, before or amid its one request.
#[derive(Debug)]
pub struct GuestConnection {
    stream: UnixStream,
}

impl GuestConnection {
    /// Connects to the agent behind the vsock socket at `path`.
    pub(crate) async fn open(path: &Path) -> Result<Self, GuestError> {
        let connecting = async {
            let stream = UnixStream::connect(path)
                .await
                .map_err(|source| GuestError::Monitor { path: path.to_owned(), source })?;
            Self::greet(stream).await
        };
        let late = |_| GuestError::TimedOut { what: "accept a connection", limit: CONNECT_LIMIT };
        tokio::time::timeout(CONNECT_LIMIT, connecting).await.map_err(late)?
    }

    async fn greet(mut stream: UnixStream) -> Result<Self, GuestError> {
        let broken = |error: io::Error| GuestError::Connection(error.into());
        stream.write_all(format!("CONNECT {AGENT_PORT}\n").as_bytes()).await.map_err(broken)?;
        // Byte by byte: what follows the line is already the agent's.
        let mut line = Vec::with_capacity(32);
        while line.last() != Some(&b'\n') && line.len() < 64 {
            match stream.read_u8().await {
                Ok(byte) => line.push(byte),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                Err(error) => return Err(broken(error)),
            }
        }
        let line = String::from_utf8_lossy(&line);
        match line.strip_suffix('\n').and_then(|line| line.strip_prefix("OK ")) {
            Some(port) if port.parse::<u32>().is_ok() => Ok(Self { stream }),
            _ => Err(GuestError::NotListening { answer: line.trim_end().to_owned() }),
        }
    }

    /// The bare stream, for a client that speaks the agent's protocol itself.
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }

    async fn send(&mut self, kind: Kind, message: &impl Serialize) -> Result<(), GuestError> {
        self.send_frame(&Frame::json(kind, message)?).await
    }

    async fn send_frame(&mut self, frame: &Frame) -> Result<(), GuestError> {
        Ok(self.stream.write_all(&frame.encode()).await.map_err(FrameError::from)?)
    }

    async fn receive(&mut self) -> Result<Frame, GuestError> {
        read_frame(&mut self.stream).await.map_err(GuestError::from)
    }

    async fn response(&mut self) -> Result<Response, GuestError> {
        match self.receive().await?.parse(Kind::Response)? {
            Response::Error(failure) => Err(GuestError::Refused(failure)),
            response => Ok(response),
        }
    }

    async fn ask(mut self, request: &Request) -> Result<Response, GuestError> {
        self.send(Kind::Request, request).await?;
        self.response().await
    }
}

async fn read_frame(reader: &mut (impl AsyncReadExt + Unpin)) -> Result<Frame, FrameError> {
    let mut header = [0; HEADER_LEN];
    let mut filled = 0;
    while filled < HEADER_LEN {
        match reader.read(&mut header[filled..]).await? {
            0 if filled == 0 => return Err(FrameError::Closed),
            0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            n => filled += n,
        }
    }
    let header = Header::decode(header)?;
    let mut payload = vec![0; header.len];
    reader.read_exact(&mut payload).await?;
    Ok(Frame { kind: header.kind, payload })
}

/// What a program wrote and how it ended.
#[derive(Debug)]
pub(crate) struct Collected {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) exited: Exited,
}

/// The agent of one guest, by its monitor's vsock socket.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    vsock: PathBuf,
}

impl Guest {
    /// The agent behind the vsock socket at `path`.
    pub(crate) fn behind(path: PathBuf) -> Self {
        Self { vsock: path }
    }

    /// A fresh connection.
    pub(crate) async fn connect(&self) -> Result<GuestConnection, GuestError> {
        GuestConnection::open(&self.vsock).await
    }

    async fn ask(&self, request: &Request, what: &'static str, limit: Duration) -> Result<Response, GuestError> {
        let asking = async { self.connect().await?.ask(request).await };
        tokio::time::timeout(limit, asking).await.map_err(|_| GuestError::TimedOut { what, limit })?
    }

    /// Is the agent there?
    pub(crate) async fn ping(&self, limit: Duration) -> Result<Pong, GuestError> {
        match self.ask(&Request::Ping, "answer a ping", limit).await? {
            Response::Pong(pong) => Ok(pong),
            other => Err(unexpected("Pong", &other)),
        }
    }

    /// Pings until the agent answers or fails for good. The caller sets the deadline.
    pub(crate) async fn await_agent(&self) -> Result<Pong, GuestError> {
        const PAUSE: Duration = Duration::from_millis(50);
        loop {
            match self.ping(CONNECT_LIMIT).await {
                Err(error) if error.is_transient() || matches!(error, GuestError::TimedOut { .. }) => {
                    tokio::time::sleep(PAUSE).await;
                }
                result => return result,
            }
        }
    }

    /// Flushes the guest's file systems.
    pub(crate) async fn sync(&self, limit: Duration) -> Result<(), GuestError> {
        match self.ask(&Request::Sync, "flush its disks", limit).await? {
            Response::Done => Ok(()),
            other => Err(unexpected("Done", &other)),
        }
    }

    /// Runs source text in a warm runtime.
    pub(crate) async fn eval(&self, eval: Eval, limit: Duration) -> Result<Evaluated, GuestError> {
        match self.ask(&Request::Eval(eval), "finish the evaluation", limit).await? {
            Response::Evaluated(evaluated) => Ok(evaluated),
            other => Err(unexpected("Evaluated", &other)),
        }
    }

    /// Runs a program and collects at most `output_limit` bytes of what it writes.
    pub(crate) async fn exec(
        &self,
        exec: Exec,
        stdin: Option<&str>,
        output_limit: usize,
        limit: Duration,
    ) -> Result<Collected, GuestError> {
        let running = self.collect(exec, stdin, output_limit);
        tokio::time::timeout(limit, running)
            .await
            .map_err(|_| GuestError::TimedOut { what: "report the end of the program", limit })?
    }

    async fn collect(&self, mut exec: Exec, stdin: Option<&str>, limit: usize) -> Result<Collected, GuestError> {
        exec.stdin = stdin.is_some();
        let mut connection = self.connect().await?;
        connection.send(Kind::Request, &Request::Exec(exec)).await?;
        let (mut reader, mut writer) = connection.stream.split();
        // Input and output flow at the same time: a program may stop reading until it is read from.
        let feed = async {
            if let Some(text) = stdin {
                for piece in text.as_bytes().chunks(64 << 10) {
                    writer.write_all(&Frame::bytes(Kind::Stdin, piece).encode()).await?;
                }
                writer.write_all(&Frame::bytes(Kind::Stdin, Vec::new()).encode()).await?;
            }
            Ok::<(), io::Error>(())
        };
        let gather = async {
            let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
            loop {
                let frame = read_frame(&mut reader).await?;
                match frame.kind {
                    Kind::Stdout => stdout.extend_from_slice(&frame.payload),
                    Kind::Stderr => stderr.extend_from_slice(&frame.payload),
                    _ => match frame.parse(Kind::Response)? {
                        Response::Started { .. } => {}
                        Response::Exited(exited) => return Ok(Collected { stdout, stderr, exited }),
                        Response::Error(failure) => return Err(GuestError::Refused(failure)),
                        other => return Err(unexpected("Exited", &other)),
                    },
                }
                if stdout.len() + stderr.len() > limit {
                    return Err(GuestError::OutputTooLarge { limit });
                }
            }
        };
        tokio::pin!(gather);
        tokio::select! {
            collected = &mut gather => return collected,
            // A program that does not read its input closes it; what counts is how it ends.
            _fed = feed => {}
        }
        gather.await
    }

    /// Makes the guest a copy of its own, trying again while the connection fails. The caller sets
    /// the deadline.
    pub(crate) async fn identify(
        &self,
        connection: GuestConnection,
        who: &Identity,
    ) -> Result<Vec<String>, GuestError> {
        let request = Request::Identify(who.clone());
        let mut connection = Some(connection);
        loop {
            let attempt = async {
                let connection = match connection.take() {
                    Some(connection) => connection,
                    None => self.connect().await?,
                };
                connection.ask(&request).await
            };
            match attempt.await {
                Ok(Response::Identified { warnings }) => return Ok(warnings),
                Ok(other) => return Err(unexpected("Identified", &other)),
                Err(error) if error.is_transient() => tokio::time::sleep(RETRY_PAUSE).await,
                Err(error) => return Err(error),
            }
        }
    }

    /// Connects, trying again while the guest's side is not ready or is slow. The caller sets the
    /// deadline.
    pub(crate) async fn connect_patiently(&self) -> Result<GuestConnection, GuestError> {
        loop {
            match self.connect().await {
                Err(error) if error.is_transient() => tokio::time::sleep(RETRY_PAUSE).await,
                // The request may have been lost in a guest that was just restored.
                Err(GuestError::TimedOut { .. }) => {}
                result => return result,
            }
        }
    }
}

/// A guest that was just forked is ready within microseconds natively, within milliseconds emulated.
const RETRY_PAUSE: Duration = Duration::from_millis(2);

fn unexpected(wanted: &'static str, got: &Response) -> GuestError {
    GuestError::Unexpected { wanted, got: format!("{got:?}") }
}

/// A fresh identity for the copy called `id`, of the present moment.
pub(crate) fn fresh_identity(id: &SandboxId) -> io::Result<Identity> {
    let mut machine_id: [u8; 16] = random()?;
    // The form of a random UUID, which systemd's own machine ids have.
    machine_id[6] = machine_id[6] & 0x0f | 0x40;
    machine_id[8] = machine_id[8] & 0x3f | 0x80;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Ok(Identity {
        sandbox_id: id.to_string(),
        hostname: id.to_string(),
        machine_id: hex(&machine_id),
        seed: hex(&random::<64>()?),
        wall_clock_ns: now.as_nanos() as u64,
    })
}

fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => filled += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether the agent's failure means that the thing asked for is not there.
pub(crate) fn is_not_found(failure: &Failure) -> bool {
    failure.code == FailureCode::NotFound
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream as BlockingStream};

    /// Serves each connection with the next of `steps` on a thread.
    fn monitor(steps: Vec<fn(BufReader<BlockingStream>)>) -> (tempfile::TempDir, Guest) {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("v");
        let listener = UnixListener::bind(&path).expect("bind");
        std::thread::spawn(move || {
            for step in steps {
                let (stream, _) = listener.accept().expect("accept");
                let mut reader = BufReader::new(stream);
                let mut line = String::new();
                reader.read_line(&mut line).expect("greeting");
                assert_eq!(line, "CONNECT 1024\n");
                step(reader);
            }
        });
        (dir, Guest::behind(path))
    }

    fn ok(reader: &mut BufReader<BlockingStream>) {
        reader.get_mut().write_all(b"OK 1073741824\n").expect("greet");
    }

    fn answer(reader: &mut BufReader<BlockingStream>, response: &Response) {
        let frame = Frame::json(Kind::Response, response).expect("json");
        reader.get_mut().write_all(&frame.encode()).expect("answer");
    }

    fn identity() -> Identity {
        fresh_identity(&SandboxId::new(1, 2)).expect("random")
    }

    #[tokio::test]
    async fn identify_survives_connections_that_are_reset() {
        let (_dir, guest) = monitor(vec![
            |_| {},
            |mut reader| {
                ok(&mut reader);
                Frame::read_from(&mut reader).expect("request");
            },
            |mut reader| {
                ok(&mut reader);
                let request = Frame::read_from(&mut reader).expect("request").parse(Kind::Request).expect("json");
                assert!(matches!(request, Request::Identify(who) if who.hostname == "sb-1-0002"));
                answer(&mut reader, &Response::Identified { warnings: vec!["no clock".to_owned()] });
            },
        ]);
        let connection = guest.connect_patiently().await.expect("second connection");
        assert_eq!(guest.identify(connection, &identity()).await.expect("third"), ["no clock"]);
    }

    #[tokio::test]
    async fn exec_feeds_input_while_output_flows() {
        let (_dir, guest) = monitor(vec![|mut reader| {
            ok(&mut reader);
            Frame::read_from(&mut reader).expect("request");
            answer(&mut reader, &Response::Started { pid: 9 });
            // `cat`: echoes frame by frame, so neither side may wait for the other to finish.
            loop {
                let frame = Frame::read_from(&mut reader).expect("stdin");
                assert_eq!(frame.kind, Kind::Stdin);
                if frame.payload.is_empty() {
                    break;
                }
                reader.get_mut().write_all(&Frame::bytes(Kind::Stdout, frame.payload).encode()).expect("echo");
            }
            answer(&mut reader, &Response::Exited(Exited { code: 3, timed_out: false }));
        }]);
        let text = "x".repeat(3 << 20);
        let limit = Duration::from_secs(20);
        let got = guest.exec(Exec::default(), Some(&text), 16 << 20, limit).await.expect("cat");
        assert!(got.stdout == text.as_bytes() && got.stderr.is_empty());
        assert_eq!(got.exited.code, 3);
    }

    #[tokio::test]
    async fn output_beyond_the_limit_and_silence_beyond_the_deadline_are_errors() {
        let (_dir, guest) = monitor(vec![
            |mut reader| {
                ok(&mut reader);
                let _ = reader.get_mut().write_all(&Frame::bytes(Kind::Stderr, vec![0; 2000]).encode());
                let _ = reader.read_to_end(&mut Vec::new());
            },
            |mut reader| {
                ok(&mut reader);
                let _ = reader.read_to_end(&mut Vec::new());
            },
        ]);
        let limit = Duration::from_secs(20);
        let error = guest.exec(Exec::default(), None, 1999, limit).await.expect_err("too much");
        assert!(matches!(error, GuestError::OutputTooLarge { limit: 1999 }), "{error}");
        let error = guest.ping(Duration::from_millis(50)).await.expect_err("silence");
        assert!(error.to_string().contains("answer a ping within 0.05 s"), "{error}");
    }

    #[test]
    fn identities_are_fresh_and_well_formed() {
        let (one, two) = (identity(), identity());
        assert_eq!((one.machine_id.len(), one.seed.len()), (32, 128));
        assert_eq!(&one.machine_id[12..13], "4");
        assert!(one.machine_id != two.machine_id && one.seed != two.seed);
    }
}
