//! The meter in a guest, from outside.
//!
//! It is the guest's own agent program, run once more. One `exec` lasts as long as the measurement: its input
//! carries orders, its output the answers, one JSON object a line.

use anyhow::{Context as _, bail};
use forkd_proto::agent::{Exec, Request, Response};
use forkd_proto::frame::{Frame, Kind};
use forkd_proto::meter::{Greeting, Order, PROGRAM, Stretch, VERB};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::client::{AgentConnection, ClientError, FrameReader, FrameWriter};

/// A meter that measures.
pub(super) struct Meter<S = TokioIo<Upgraded>> {
    orders: FrameWriter<S>,
    said: FrameReader<S>,
    /// What of its output is not yet a whole line.
    pending: Vec<u8>,
    complaint: String,
    /// Where the guest sends back what it is sent.
    pub(super) echo_port: u16,
}

/// What came of starting a meter.
pub(super) enum Started<S = TokioIo<Upgraded>> {
    Measuring(Meter<S>),
    /// It may hold so much memory at most.
    NoRoom(u64),
}

impl<S: AsyncRead + AsyncWrite> Meter<S> {
    /// Starts one that holds `mib` of memory.
    pub(super) async fn start(connection: AgentConnection<S>, mib: u64) -> anyhow::Result<Started<S>> {
        let args = [PROGRAM, VERB, &mib.to_string()].map(str::to_owned).to_vec();
        let (said, orders) = connection.begin(&Request::Exec(Exec { args, stdin: true, ..Exec::default() })).await?;
        let mut meter = Self { orders, said, pending: Vec::new(), complaint: String::new(), echo_port: 0 };
        match meter.answer().await.context("the guest cannot measure")? {
            Greeting::Ready { echo_port } => Ok(Started::Measuring(Self { echo_port, ..meter })),
            Greeting::NoRoom { room_mib } => Ok(Started::NoRoom(room_mib)),
        }
    }

    /// Ends the stretch that is being measured; the next one begins.
    pub(super) async fn mark(&mut self) -> anyhow::Result<Stretch> {
        self.order(&Order::Mark).await
    }

    /// Gives an order.
    pub(super) async fn order(&mut self, order: &Order) -> anyhow::Result<Stretch> {
        let line = format!("{}\n", serde_json::to_string(order)?);
        self.orders.frame(&Frame::bytes(Kind::Stdin, line)).await?;
        self.answer().await.context("the guest's meter does not answer")
    }

    /// Its next line.
    async fn answer<T: DeserializeOwned>(&mut self) -> anyhow::Result<T> {
        loop {
            if let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                return serde_json::from_slice(&line)
                    .with_context(|| format!("it said {:?}", String::from_utf8_lossy(&line).trim_end()));
            }
            let frame = self.said.next().await?;
            match frame.kind {
                Kind::Stdout => self.pending.extend(frame.payload),
                Kind::Stderr => self.complaint.push_str(&String::from_utf8_lossy(&frame.payload)),
                _ => match frame.parse(Kind::Response).map_err(ClientError::from)? {
                    Response::Started { .. } => {}
                    Response::Exited(exited) => bail!("it ended with {}: {}", exited.code, self.complaint.trim_end()),
                    Response::Error(failure) => return Err(ClientError::from(failure).into()),
                    other => return Err(crate::client::out_of_turn("exited", &other).into()),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_proto::agent::Exited;
    use tokio::io::{AsyncWriteExt, DuplexStream};

    async fn say(far: &mut DuplexStream, frame: Frame) {
        far.write_all(&frame.encode()).await.expect("somebody listens");
    }

    fn response(response: &Response) -> Frame {
        Frame::json(Kind::Response, response).expect("small")
    }

    fn out(text: &str) -> Frame {
        Frame::bytes(Kind::Stdout, text)
    }

    #[tokio::test]
    async fn lines_are_put_together_and_the_last_words_are_passed_on() {
        let (near, mut far) = tokio::io::duplex(4096);
        say(&mut far, response(&Response::Started { pid: 7 })).await;
        say(&mut far, out("{\"op\":\"ready\",")).await;
        say(&mut far, out("\"echo_port\":4000}\n{\"us\":5,\"ticks\":1,\"longest_gap_us\":3,\"dirtied_pages\":0}\n"))
            .await;
        let started = Meter::start(AgentConnection::new(near), 8).await.expect("it greets");
        let Started::Measuring(mut meter) = started else { panic!("there is room") };
        assert_eq!(meter.echo_port, 4000);
        assert_eq!(meter.mark().await.expect("an answer").longest_gap_us, 3);

        say(&mut far, Frame::bytes(Kind::Stderr, "out of\n")).await;
        say(&mut far, Frame::bytes(Kind::Stderr, "breath\n")).await;
        say(&mut far, response(&Response::Exited(Exited { code: 1, timed_out: false }))).await;
        let error = format!("{:#}", meter.mark().await.expect_err("it ended"));
        assert_eq!(error, "the guest's meter does not answer: it ended with 1: out of\nbreath");
    }

    #[tokio::test]
    async fn a_guest_that_is_too_small_says_so() {
        let (near, mut far) = tokio::io::duplex(4096);
        say(&mut far, out("{\"op\":\"no_room\",\"room_mib\":300}\n")).await;
        let started = Meter::start(AgentConnection::new(near), 4096).await.expect("it greets");
        assert!(matches!(started, Started::NoRoom(300)));
    }
}
