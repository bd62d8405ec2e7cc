//! One running program: its streams, its signals, its end.
//!
//! ```text
//!  stdin thread ──┐
//!  signals ───────┼─► queue ─► writer task ─► agent
//!  window size ───┘                             │
//!  stdout, stderr ◄──────────── this task ◄─────┘
//! ```
//!
//! On a terminal, keys reach the program as bytes; SIGHUP and SIGTERM are then meant for this program: it ends, and
//! with its connection the program in the sandbox.
//!
//! The queue is short: a program that does not read its input holds up the stdin thread, and output
//! that is not taken holds up the agent, so neither is ever buffered whole.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use forkd_proto::agent::{Exec, ExecControl, Request, Response};
use forkd_proto::frame::{Frame, Kind};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::{FORWARDED, FORWARDED_ON_TERMINAL, exit_code, timed_out};
use crate::client::{ANSWER_LIMIT, AgentConnection, ClientError, FrameReader, GRACE, within};
use crate::interrupt::Interrupts;
use crate::terminal::{self, RawMode};

/// Bytes of standard input in one frame.
const INPUT_CHUNK: usize = 64 << 10;

/// Frames that may wait for the connection.
const QUEUE: usize = 4;

/// Runs `exec` on a fresh connection with this program's own streams; the value is the exit code.
pub(in crate::commands) async fn run<S>(connection: AgentConnection<S>, exec: &Exec) -> anyhow::Result<u8>
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let request = Request::Exec(exec.clone());
    let (reader, mut writer) = connection.begin(&request).await?;
    let mut end = Interrupts::catch_end()?;
    let raw_mode = if exec.terminal.is_some() && exec.stdin { RawMode::enter()? } else { None };
    let (queue, mut queued) = mpsc::channel::<Frame>(QUEUE);
    if exec.stdin {
        std::thread::spawn({
            let queue = queue.clone();
            move || send_input(&queue)
        });
    }
    forward_signals(&queue, exec.terminal.is_some())?;
    // Keeps the connection open for writing until the program has ended.
    let sending = tokio::spawn(async move {
        while let Some(frame) = queued.recv().await {
            if writer.frame(&frame).await.is_err() {
                break;
            }
        }
        writer
    });
    let ended = if exec.terminal.is_some() {
        tokio::select! {
            ended = receive(reader, exec) => ended,
            interrupted = end.next() => Err(interrupted.into()),
        }
    } else {
        receive(reader, exec).await
    };
    drop(raw_mode);
    sending.abort();
    ended
}

/// Copies output until the program ends.
async fn receive<S: AsyncRead + AsyncWrite>(mut reader: FrameReader<S>, exec: &Exec) -> anyhow::Result<u8> {
    let began = Instant::now();
    let limit = exec.timeout_ms.map(|limit| Duration::from_millis(limit).saturating_add(GRACE));
    let mut started = false;
    let mut stdout = unbuffered(io::stdout())?;
    let mut stderr = unbuffered(io::stderr())?;
    loop {
        let frame = match (started, limit) {
            (false, _) => within(ANSWER_LIMIT, "start the program", reader.next()).await,
            (true, None) => reader.next().await,
            (true, Some(limit)) => {
                let left = limit.saturating_sub(began.elapsed());
                let late =
                    |_| ClientError::Late { what: "stop the program at its time limit", seconds: limit.as_secs() };
                tokio::time::timeout(left, reader.next()).await.map_err(late)?
            }
        };
        let frame = frame?;
        started = true;
        match frame.kind {
            Kind::Stdout => tokio::task::block_in_place(|| stdout.write_all(&frame.payload))?,
            Kind::Stderr => tokio::task::block_in_place(|| stderr.write_all(&frame.payload))?,
            _ => match frame.parse(Kind::Response).map_err(ClientError::from)? {
                Response::Started { .. } if exec.detach => return Ok(0),
                Response::Started { .. } => {}
                Response::Exited(exited) if exited.timed_out => return Err(timed_out(&exec.args[0])),
                Response::Exited(exited) => return Ok(exit_code(exited.code.into())),
                Response::Error(failure) => return Err(ClientError::from(failure).into()),
                other => return Err(crate::client::out_of_turn("exited", &other).into()),
            },
        }
    }
}

/// `stream` without the line buffering of the standard library, which splits large writes.
fn unbuffered(stream: impl AsFd) -> io::Result<File> {
    Ok(stream.as_fd().try_clone_to_owned()?.into())
}

/// Sends standard input frame by frame, then the empty frame that ends it.
fn send_input(queue: &mpsc::Sender<Frame>) {
    let mut stdin = io::stdin().lock();
    let mut buffer = vec![0; INPUT_CHUNK];
    loop {
        let count = match stdin.read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => 0,
            Ok(count) => count,
        };
        let sent = queue.blocking_send(Frame::bytes(Kind::Stdin, &buffer[..count]));
        if count == 0 || sent.is_err() {
            return;
        }
    }
}

/// Passes signals and, for a terminal, its changes of size on to the program.
fn forward_signals(queue: &mpsc::Sender<Frame>, terminal: bool) -> io::Result<()> {
    let forwarded: &[i32] = if terminal { &FORWARDED_ON_TERMINAL } else { &FORWARDED };
    for &number in forwarded {
        let control = move || ExecControl::Signal { signal: number };
        forward(SignalKind::from_raw(number), queue.clone(), control)?;
    }
    if terminal {
        forward(SignalKind::window_change(), queue.clone(), || ExecControl::Resize(terminal::size()))?;
    }
    Ok(())
}

fn forward(
    kind: SignalKind,
    queue: mpsc::Sender<Frame>,
    control: impl Fn() -> ExecControl + Send + 'static,
) -> io::Result<()> {
    let mut signals = signal(kind)?;
    tokio::spawn(async move {
        while signals.recv().await.is_some() {
            let Ok(frame) = Frame::json(Kind::Request, &control()) else { return };
            if queue.send(frame).await.is_err() {
                return;
            }
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_proto::agent::{Exited, Failure, FailureCode};
    use tokio::io::AsyncWriteExt;

    async fn ending_with(response: Response) -> anyhow::Result<u8> {
        let (near, mut far) = tokio::io::duplex(4096);
        let frame = Frame::json(Kind::Response, &response).expect("small");
        let agent = tokio::spawn(async move {
            far.write_all(&Frame::bytes(Kind::Stdout, *b"").encode()).await.expect("write");
            far.write_all(&frame.encode()).await.expect("write");
            far
        });
        let exec = Exec { args: vec!["true".into()], ..Exec::default() };
        let ended = run(AgentConnection::new(near), &exec).await;
        agent.await.expect("no panic");
        ended
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_program_decides_the_exit_code() {
        let exited = |code, timed_out| Response::Exited(Exited { code, timed_out });
        assert_eq!(ending_with(exited(3, false)).await.expect("it ran"), 3);
        assert_eq!(ending_with(exited(-15, false)).await.expect("it ran"), 143);
        let error = ending_with(exited(-9, true)).await.expect_err("too long");
        assert!(error.to_string().contains("time limit"), "{error}");
        let failure = Failure { code: FailureCode::NotFound, message: "no program \"x\" in PATH".into() };
        let error = ending_with(Response::Error(failure)).await.expect_err("it never ran");
        assert!(error.to_string().contains("no program"), "{error}");
    }
}
