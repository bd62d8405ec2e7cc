//! An agent that is reached over TCP without a daemon: one JSON line out, one JSON line back.
//!
//! This is how older scripts talk to a guest (`--target`, `--child`). A child in a network
//! namespace of its own is reached from a thread that has entered it.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use forkd_types::rest::GUEST_ADDR;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;

use crate::failure::Advise;

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long an agent at the usual address may take to accept a connection that nobody asked for by name.
const USUAL_TIMEOUT: Duration = Duration::from_secs(1);

/// How much longer than the request itself an answer may take.
const GRACE: Duration = Duration::from_secs(5);

/// The longest answer.
const ANSWER_LIMIT: u64 = 256 << 20;

/// Options that name an agent directly.
#[derive(Args, Debug, Clone)]
pub(crate) struct DirectArgs {
    /// Talk to the agent at this address instead of asking a daemon
    #[arg(long, value_name = "HOST:PORT", help_heading = "Without a daemon")]
    target: Option<String>,
    /// Talk to the agent in this network namespace, or in that of the child of this number (needs root)
    #[arg(long, value_name = "NETNS", help_heading = "Without a daemon")]
    child: Option<String>,
}

impl DirectArgs {
    /// The agent they name, if any.
    pub(crate) fn agent(&self) -> Option<DirectAgent> {
        if self.target.is_none() && self.child.is_none() {
            return None;
        }
        let target = self.target.clone().unwrap_or_else(|| GUEST_ADDR.to_owned());
        let numbered = |child: &String| match child.parse::<u32>() {
            Ok(number) => format!("forkd-child-{number}"),
            Err(_) => child.clone(),
        };
        Some(DirectAgent { target, netns: self.child.as_ref().map(numbered) })
    }
}

/// An agent at a TCP address.
#[derive(Debug, Clone)]
pub(crate) struct DirectAgent {
    target: String,
    netns: Option<String>,
}

impl DirectAgent {
    /// The agent at the usual address, if one answers there. Whoever else has that address is none.
    pub(crate) async fn usual() -> Option<Self> {
        let agent = Self { target: GUEST_ADDR.to_owned(), netns: None };
        let connecting = tokio::net::TcpStream::connect(GUEST_ADDR);
        tokio::time::timeout(USUAL_TIMEOUT, connecting).await.ok()?.ok()?;
        let asking = agent.clone().ask(serde_json::json!({ "action": "ping" }), None);
        let pong = tokio::time::timeout(USUAL_TIMEOUT, asking).await.ok()?.ok()?;
        (pong.get("pong") == Some(&Value::Bool(true))).then_some(agent)
    }

    /// Sends one request and waits for the answer; `work` is how long the request itself may take.
    pub(crate) async fn ask(self, request: Value, work: Option<Duration>) -> anyhow::Result<Value> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        // A thread of its own: entering a namespace changes the whole thread for good.
        std::thread::spawn(move || {
            let _ = sender.send(self.exchange(&request, work));
        });
        receiver.await.context("the thread that talks to the agent is gone")?
    }

    fn exchange(&self, request: &Value, work: Option<Duration>) -> anyhow::Result<Value> {
        if let Some(netns) = &self.netns {
            enter(netns)?;
        }
        let target = &self.target;
        let address = target
            .to_socket_addrs()
            .ok()
            .and_then(|mut found| found.next())
            .with_context(|| format!("{target:?} is not an address; write HOST:PORT"))?;
        let mut stream = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT)
            .with_context(|| format!("could not connect to the agent at {target}"))
            .advise("forkd ls   (then name a sandbox instead of --target)")?;
        stream.set_read_timeout(Some(work.unwrap_or_default() + GRACE))?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        let mut answer = Vec::new();
        stream
            .write_all(&line)
            .and_then(|()| stream.shutdown(Shutdown::Write))
            .and_then(|()| (&stream).take(ANSWER_LIMIT).read_to_end(&mut answer))
            .with_context(|| format!("the agent at {target} did not answer"))?;
        serde_json::from_slice(&answer).with_context(|| format!("the agent at {target} answered something odd"))
    }
}

/// Moves this thread into the network namespace called `name`.
fn enter(name: &str) -> anyhow::Result<()> {
    let path = format!("/run/netns/{name}");
    let file = File::open(&path)
        .with_context(|| format!("there is no network namespace {path}"))
        .advise("ip netns   (lists them)")?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("could not enter the network namespace {name}"))
        .advise("run it as root: sudo forkd …")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;

    #[tokio::test]
    async fn one_line_each_way_and_the_request_is_half_closed() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let target = listener.local_addr().expect("bound").to_string();
        let agent = std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("a connection");
            let mut lines = BufReader::new(&stream).lines();
            let request = lines.next().expect("a line").expect("readable");
            assert!(lines.next().is_none(), "the client must close its half");
            (&stream).write_all(b"{\"pong\":true}\n").expect("answer");
            request
        });
        let asked = DirectAgent { target, netns: None }.ask(json!({ "action": "ping" }), None).await;
        assert_eq!(asked.expect("an answer"), json!({ "pong": true }));
        assert_eq!(agent.join().expect("no panic"), r#"{"action":"ping"}"#);
    }

    #[tokio::test]
    async fn nobody_there_is_said() {
        let free = TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("bound");
        let error = DirectAgent { target: free.to_string(), netns: None }.ask(json!({}), None).await;
        assert!(error.expect_err("nobody listens").to_string().contains("could not connect to the agent"));
    }
}
