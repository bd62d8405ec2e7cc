//! A connection to the agent in a sandbox: one request, then whatever it calls for.

use std::io;

use forkd_proto::agent::{Eval, Evaluated, Request, Response};
use forkd_proto::frame::{Frame, FrameError, HEADER_LEN, Header, Kind};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};

use super::ClientError;

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
        match self.reader.next().await?.parse(Kind::Response)? {
            Response::Error(failure) => Err(failure.into()),
            response => Ok(response),
        }
    }

    /// Connects to a TCP port on the guest's loopback. Both directions then carry `Data` frames, of which an empty
    /// one is a half-close.
    pub(crate) async fn tunnel(mut self, port: u16) -> Result<(FrameReader<S>, FrameWriter<S>), ClientError> {
        self.writer.json(&Request::Tunnel { port }).await?;
        match self.reader.next().await?.parse(Kind::Response)? {
            Response::Done => Ok((self.reader, self.writer)),
            Response::Error(failure) => Err(failure.into()),
            other => Err(out_of_turn("done", &other)),
        }
    }

    /// Runs source text in a warm runtime.
    pub(crate) async fn eval(self, eval: Eval) -> Result<Evaluated, ClientError> {
        match self.ask(&Request::Eval(eval)).await? {
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

    #[tokio::test]
    async fn an_agent_that_goes_away_is_an_error() {
        let (near, far) = tokio::io::duplex(1024);
        drop(far);
        let eval = Eval { language: None, code: "1".into(), timeout_ms: None };
        assert!(AgentConnection::new(near).eval(eval).await.is_err());
    }
}
