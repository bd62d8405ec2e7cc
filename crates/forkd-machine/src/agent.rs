//! A connection to the agent in the machine: TCP to a forwarded port, a token, one request.

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use forkd_proto::agent::{Pong, Request, Response};
use forkd_proto::frame::{Frame, FrameError, Kind};

/// One connection, past the greeting and ready for its one request.
///
/// QEMU accepts connections to a forwarded port by itself, whether or not anything listens in the
/// machine yet; so only an answered greeting proves that the agent is there.
#[derive(Debug)]
pub struct AgentConnection {
    stream: TcpStream,
    address: SocketAddr,
}

impl AgentConnection {
    /// Connects and greets. `limit` bounds each step, and every later answer until
    /// [`Self::wait_for_ever`].
    pub fn open(address: SocketAddr, token: &str, limit: Duration) -> Result<Self, FrameError> {
        let stream = TcpStream::connect_timeout(&address, limit)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        let mut connection = Self { stream, address };
        match connection.ask(&Request::Hello { token: token.to_owned() })? {
            Response::Done => Ok(connection),
            Response::Error(failure) => Err(refused(&failure.message)),
            other => Err(refused(&format!("an unexpected answer: {other:?}"))),
        }
    }

    /// Lifts the time limits: from here on a silent agent is waited for.
    pub fn wait_for_ever(&self) -> Result<(), FrameError> {
        self.stream.set_read_timeout(None)?;
        Ok(self.stream.set_write_timeout(None)?)
    }

    /// Bounds each later answer by `limit`.
    pub(crate) fn wait_for(&self, limit: Duration) -> Result<(), FrameError> {
        Ok(self.stream.set_read_timeout(Some(limit))?)
    }

    /// Sends a request and reads one answer.
    pub fn ask(&mut self, request: &Request) -> Result<Response, FrameError> {
        self.send(&Frame::json(Kind::Request, request)?)?;
        self.receive()?.parse(Kind::Response)
    }

    /// Sends one frame.
    pub fn send(&mut self, frame: &Frame) -> Result<(), FrameError> {
        frame.write_to(&mut self.stream)
    }

    /// Reads one frame.
    pub fn receive(&mut self) -> Result<Frame, FrameError> {
        Frame::read_from(&mut self.stream)
    }

    /// A second handle on the same connection, so that one thread may send while another receives.
    pub fn try_clone(&self) -> Result<Self, FrameError> {
        Ok(Self { stream: self.stream.try_clone()?, address: self.address })
    }

    /// Ends the connection for every handle on it.
    pub fn close(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// The forwarded port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Asks the agent whether it is there.
pub(crate) fn ping(address: SocketAddr, token: &str, limit: Duration) -> Result<Pong, FrameError> {
    match AgentConnection::open(address, token, limit)?.ask(&Request::Ping)? {
        Response::Pong(pong) => Ok(pong),
        other => Err(refused(&format!("an unexpected answer: {other:?}"))),
    }
}

fn refused(message: &str) -> FrameError {
    FrameError::Io(std::io::Error::new(
        std::io::ErrorKind::ConnectionRefused,
        format!("the agent answered with {message}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    use forkd_proto::agent::{Failure, FailureCode};

    #[test]
    fn a_wrong_token_is_told_in_the_agents_words() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("free port");
        let address = listener.local_addr().expect("bound");
        let agent = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("client comes");
            let hello: Request = Frame::read_from(&mut stream).expect("frame").parse(Kind::Request).expect("request");
            let failure = Failure { code: FailureCode::Denied, message: "the token is wrong".into() };
            let answer = Frame::json(Kind::Response, &Response::Error(failure)).expect("plain data");
            answer.write_to(&mut stream).expect("client waits");
            hello
        });
        let error = AgentConnection::open(address, "guess", Duration::from_secs(5)).expect_err("refused");
        assert!(error.to_string().contains("the token is wrong"), "{error}");
        assert_eq!(agent.join().expect("agent ends"), Request::Hello { token: "guess".into() });
    }

    #[test]
    fn an_agent_that_never_answers_costs_no_more_than_the_limit() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("free port");
        let address = listener.local_addr().expect("bound");
        let started = std::time::Instant::now();
        assert!(ping(address, "token", Duration::from_millis(100)).is_err());
        assert!(started.elapsed() < Duration::from_secs(2));
        drop(listener);
    }
}
