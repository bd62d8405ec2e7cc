//! SIGINT and SIGTERM as something to wait for, so that what was started is also ended.

use std::future::Future;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The user or the system asked to stop.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub(crate) struct Interrupted {
    /// The signal's number.
    signal: u8,
}

impl Interrupted {
    /// What a shell reports for a program that a signal ended.
    pub(crate) fn exit_code(&self) -> u8 {
        128 + self.signal
    }
}

/// SIGINT and SIGTERM, caught from its making until the program ends.
pub(crate) struct Interrupts {
    interrupt: Signal,
    /// Its number.
    number: u8,
    terminate: Signal,
}

impl Interrupts {
    /// Catches the signals from here on; their default action is gone for good.
    pub(crate) fn catch() -> std::io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, number: 2, terminate: signal(SignalKind::terminate())? })
    }

    /// Catches SIGHUP in place of SIGINT, for who reads keys from a terminal: its interrupt key is not for us.
    pub(crate) fn catch_end() -> std::io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::hangup())?, number: 1, terminate: signal(SignalKind::terminate())? })
    }

    /// Waits for the next one.
    pub(crate) async fn next(&mut self) -> Interrupted {
        tokio::select! {
            _ = self.interrupt.recv() => Interrupted { signal: self.number },
            _ = self.terminate.recv() => Interrupted { signal: 15 },
        }
    }

    /// Runs `work` until it ends or a signal comes.
    pub(crate) async fn guard<T>(&mut self, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
        tokio::select! {
            done = work => done,
            interrupted = self.next() => Err(interrupted.into()),
        }
    }
}
