//! What the node itself asks of a guest.

use std::path::PathBuf;
use std::time::Duration;

use forkd_proto::agent::{Eval, Evaluated, Exec, Exited, Identity, Pong, Request, Response};

use super::connection::{CONNECT_LIMIT, GuestConnection};
use super::error::{GuestError, unexpected};
use super::program::ProgramEvent;

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
        let asking = async { self.connect().await?.ask_unbounded(request).await };
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
        let (mut output, mut input) = self.connect().await?.start(exec).await?;
        // Input and output flow at the same time: a program may stop reading until it is read from.
        let feed = async {
            if let Some(text) = stdin {
                input.write(text.as_bytes()).await?;
                input.close().await?;
            }
            Ok::<(), GuestError>(())
        };
        let gather = async {
            let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
            loop {
                match output.next().await? {
                    ProgramEvent::Started { .. } => {}
                    ProgramEvent::Stdout(bytes) => stdout.extend_from_slice(&bytes),
                    ProgramEvent::Stderr(bytes) => stderr.extend_from_slice(&bytes),
                    ProgramEvent::Exited(exited) => return Ok(Collected { stdout, stderr, exited }),
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
                connection.ask_unbounded(&request).await
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::fresh_identity;
    use forkd_proto::frame::{Frame, Kind};
    use forkd_types::SandboxId;
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
}
