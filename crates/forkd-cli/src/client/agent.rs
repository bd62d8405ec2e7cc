//! A connection to the agent in a sandbox: one request, then whatever it calls for.

use std::io;
use std::time::Duration;

use forkd_proto::agent::{Eval, Evaluated, FileInfo, Request, Response};
use forkd_proto::frame::{Frame, FrameError, HEADER_LEN, Header, Kind};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};

use super::ClientError;

/// How much longer than its own time limit a request may take before the agent counts as silent: the daemon gives
/// up first, and says more.
pub(crate) const GRACE: Duration = Duration::from_secs(10);

/// How long the agent may take to answer a request that is no work.
pub(crate) const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// A fresh connection; it serves one request.
pub(crate) struct AgentConnection<S = TokioIo<Upgraded>> {
    reader: FrameReader<S>,
    writer: FrameWriter<S>,
}

/// Receives frames.
pub(crate) struct FrameReader<S>(ReadHalf<S>);

/// Sends frames.
pub(crate) struct FrameWriter<S>(WriteHalf<S>);

impl<S: AsyncRead + AsyncWrite> AgentConnection<S> {
    /// Wraps a stream that ends at an agent.
    pub(crate) fn new(stream: S) -> Self {
        let (reader, writer) = tokio::io::split(stream);
        Self { reader: FrameReader(reader), writer: FrameWriter(writer) }
    }

    /// Sends `request` and hands out both directions for what follows.
    pub(crate) async fn begin(mut self, request: &Request) -> Result<(FrameReader<S>, FrameWriter<S>), ClientError> {
        self.writer.json(request).await?;
        Ok((self.reader, self.writer))
    }

    /// Sends a request that has one answer.
    async fn ask(mut self, request: &Request) -> Result<Response, ClientError> {
        self.writer.json(request).await?;
        self.reader.answer().await
    }

    /// Connects to a TCP port on the guest's loopback. Both directions then carry `Data` frames, of which an empty
    /// one is a half-close.
    pub(crate) async fn tunnel(self, port: u16) -> Result<(FrameReader<S>, FrameWriter<S>), ClientError> {
        self.begin_stream(&Request::Tunnel { port }, "connect to the port").await
    }

    /// Sends a request that is answered by `Done` before its bytes flow. `what` is what it asks, as a verb phrase.
    pub(crate) async fn begin_stream(
        self,
        request: &Request,
        what: &'static str,
    ) -> Result<(FrameReader<S>, FrameWriter<S>), ClientError> {
        let beginning = async {
            let (mut reader, writer) = self.begin(request).await?;
            match reader.answer().await? {
                Response::Done => Ok((reader, writer)),
                other => Err(out_of_turn("done", &other)),
            }
        };
        within(ANSWER_LIMIT, what, beginning).await
    }

    /// Describes a file, not following a final symbolic link.
    pub(crate) async fn stat(self, path: &str) -> Result<FileInfo, ClientError> {
        let request = Request::Stat { path: path.to_owned() };
        match within(ANSWER_LIMIT, "describe a file", self.ask(&request)).await? {
            Response::Stat(info) => Ok(info),
            other => Err(out_of_turn("stat", &other)),
        }
    }

    /// Runs source text in a warm runtime. Its time limit bounds the wait too: a guest may be past keeping it.
    pub(crate) async fn eval(self, eval: Eval) -> Result<Evaluated, ClientError> {
        let limit = eval.timeout_ms.map(|limit| Duration::from_millis(limit).saturating_add(GRACE));
        let request = Request::Eval(eval);
        let asking = self.ask(&request);
        let answer = match limit {
            Some(limit) => within(limit, "finish the evaluation, nor stop it at its time limit,", asking).await?,
            None => asking.await?,
        };
        match answer {
            Response::Evaluated(evaluated) => Ok(evaluated),
            other => Err(out_of_turn("evaluated", &other)),
        }
    }
}

impl<S: AsyncRead + AsyncWrite> FrameReader<S> {
    /// The next frame; [`FrameError::Closed`] at a clean end.
    ///
    /// Not cancel safe: a dropped future may have consumed part of a frame.
    pub(crate) async fn next(&mut self) -> Result<Frame, ClientError> {
        let mut header = [0; HEADER_LEN];
        if self.0.read(&mut header[..1]).await.map_err(FrameError::from)? == 0 {
            return Err(FrameError::Closed.into());
        }
        self.fill(&mut header[1..]).await?;
        let header = Header::decode(header)?;
        let mut payload = vec![0; header.len];
        self.fill(&mut payload).await?;
        Ok(Frame { kind: header.kind, payload })
    }

    /// The next frame, which must be an answer; one that says no is an error.
    pub(crate) async fn answer(&mut self) -> Result<Response, ClientError> {
        match self.next().await?.parse(Kind::Response)? {
            Response::Error(failure) => Err(failure.into()),
            response => Ok(response),
        }
    }

    /// The next bytes of a file or a tar stream; none at its end. An error amid them is one.
    pub(crate) async fn data(&mut self) -> Result<Option<Vec<u8>>, ClientError> {
        let frame = self.next().await?;
        match frame.kind {
            Kind::Data => Ok((!frame.payload.is_empty()).then_some(frame.payload)),
            _ => match frame.parse(Kind::Response)? {
                Response::Error(failure) => Err(failure.into()),
                other => Err(out_of_turn("data", &other)),
            },
        }
    }

    async fn fill(&mut self, buffer: &mut [u8]) -> Result<(), ClientError> {
        self.0.read_exact(buffer).await.map_err(FrameError::from)?;
        Ok(())
    }
}

impl<S: AsyncRead + AsyncWrite> FrameWriter<S> {
    /// Sends `message` as a request frame.
    pub(crate) async fn json(&mut self, message: &impl Serialize) -> Result<(), ClientError> {
        self.frame(&Frame::json(Kind::Request, message)?).await
    }

    /// Sends one frame.
    pub(crate) async fn frame(&mut self, frame: &Frame) -> Result<(), ClientError> {
        let write = async {
            self.0.write_all(&frame.encode()).await?;
            self.0.flush().await
        };
        write.await.map_err(|error: io::Error| FrameError::from(error).into())
    }
}

/// The outcome of `work`, unless it takes longer than `limit`.
pub(crate) async fn within<T>(
    limit: Duration,
    what: &'static str,
    work: impl Future<Output = Result<T, ClientError>>,
) -> Result<T, ClientError> {
    let late = |_| ClientError::Late { what, seconds: limit.as_secs() };
    tokio::time::timeout(limit, work).await.map_err(late)?
}

/// The error for an answer that was not due.
pub(crate) fn out_of_turn(expected: &'static str, got: &Response) -> ClientError {
    let text = serde_json::to_value(got).ok();
    let op = text.as_ref().and_then(|value| value.get("op")).and_then(|op| op.as_str()).unwrap_or("nothing known");
    ClientError::OutOfTurn { expected, got: op.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_proto::agent::{Failure, FailureCode};
    use tokio::io::DuplexStream;

    async fn answer(mut far: DuplexStream, response: Frame) -> Request {
        let mut header = [0; HEADER_LEN];
        far.read_exact(&mut header).await.expect("header");
        let header = Header::decode(header).expect("sound");
        let mut payload = vec![0; header.len];
        far.read_exact(&mut payload).await.expect("payload");
        far.write_all(&response.encode()).await.expect("answer");
        Frame { kind: header.kind, payload }.parse(Kind::Request).expect("a request")
    }

    #[tokio::test]
    async fn answers_failures_and_surprises_are_told_apart() {
        let failure = Failure { code: FailureCode::NotFound, message: "no python3 in PATH".into() };
        let evaluated = Evaluated { result: Some("3".into()), ..Evaluated::default() };
        for (response, expected) in [
            (Response::Evaluated(evaluated), "Ok(3)"),
            (Response::Error(failure), "Err(no python3 in PATH)"),
            (Response::Done, "Err(the sandbox's agent answered done where evaluated was due)"),
        ] {
            let (near, far) = tokio::io::duplex(64);
            let frame = Frame::json(Kind::Response, &response).expect("small");
            let eval = Eval { language: None, code: "1+2".into(), timeout_ms: None };
            let asked = tokio::spawn(AgentConnection::new(near).eval(eval.clone()));
            assert_eq!(answer(far, frame).await, Request::Eval(eval));
            let got = match asked.await.expect("no panic") {
                Ok(evaluated) => format!("Ok({})", evaluated.result.unwrap_or_default()),
                Err(error) => format!("Err({error})"),
            };
            assert_eq!(got, expected);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_says_nothing_is_given_up_after_the_time_limit() {
        let (near, _far) = tokio::io::duplex(1024);
        let eval = Eval { language: None, code: "1".into(), timeout_ms: Some(120_000) };
        let began = tokio::time::Instant::now();
        let error = AgentConnection::new(near).eval(eval).await.expect_err("silence");
        assert!(matches!(error, ClientError::Late { seconds: 130, .. }), "{error}");
        assert_eq!(began.elapsed().as_secs(), 130);
    }

    #[tokio::test]
    async fn an_agent_that_goes_away_is_an_error() {
        let (near, far) = tokio::io::duplex(1024);
        drop(far);
        let eval = Eval { language: None, code: "1".into(), timeout_ms: None };
        assert!(AgentConnection::new(near).eval(eval).await.is_err());
    }
}
