//! One client's connection: a stream socket of any family.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use forkd_proto::agent::{Failure, Response};
use forkd_proto::frame::{Frame, FrameError, Kind};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendFlags, Shutdown};

/// A connected stream socket; reads and writes through a shared reference, so that two threads can
/// each carry one direction.
#[derive(Debug)]
pub struct Connection(OwnedFd);

impl Connection {
    /// Takes over a connected stream socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Sends one answer. An answer too long for a frame is replaced by an error that says so.
    pub fn respond(&self, response: &Response) -> Result<(), FrameError> {
        let frame = match Frame::json(Kind::Response, response) {
            Err(FrameError::TooLong { len }) => Frame::json(
                Kind::Response,
                &Response::Error(crate::failure::internal(format!(
                    "the answer takes {len} bytes, more than one message of {} bytes can hold",
                    forkd_proto::frame::MAX_PAYLOAD
                ))),
            )?,
            other => other?,
        };
        self.send(&frame)
    }

    /// Answers with `failure`.
    pub fn fail(&self, failure: Failure) -> Result<(), FrameError> {
        self.respond(&Response::Error(failure))
    }

    /// Sends one frame.
    pub fn send(&self, frame: &Frame) -> Result<(), FrameError> {
        frame.write_to(&mut &*self)
    }

    /// Receives one frame.
    pub fn receive(&self) -> Result<Frame, FrameError> {
        Frame::read_from(&mut &*self)
    }

    /// Limits how long one read may wait.
    pub fn set_read_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        Ok(set_socket_timeout(&self.0, Timeout::Recv, limit)?)
    }

    /// Makes reads and writes fail with `WouldBlock` instead of waiting.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        Ok(rustix::io::ioctl_fionbio(&self.0, nonblocking)?)
    }

    /// Ends the outgoing direction.
    pub fn finish_sending(&self) {
        let _ = rustix::net::shutdown(&self.0, Shutdown::Write);
    }

    /// Ends both directions, which wakes threads that wait on them.
    pub fn cut(&self) {
        let _ = rustix::net::shutdown(&self.0, Shutdown::Both);
    }

    /// Closes after the client has had time to read what was sent.
    ///
    /// TCP discards sent data when a socket is closed with unread input; where the client may still
    /// be sending, its input is read and dropped for a short while first.
    pub fn close_gently(self) {
        self.finish_sending();
        let deadline = Instant::now() + Duration::from_secs(2);
        if self.set_nonblocking(false).is_err() || self.set_read_timeout(Some(Duration::from_millis(500))).is_err() {
            return;
        }
        let mut scrap = [0; 16 << 10];
        while Instant::now() < deadline {
            match (&self).read(&mut scrap) {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Read for &Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (got, _) = retry(|| rustix::net::recv(&self.0, &mut *buffer, RecvFlags::empty()))?;
        Ok(got)
    }
}

impl Write for &Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        retry(|| rustix::net::send(&self.0, bytes, SendFlags::NOSIGNAL))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}
