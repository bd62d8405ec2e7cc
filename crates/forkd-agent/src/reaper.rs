//! The one place where processes are waited for.
//!
//! As PID 1 the agent inherits every orphan of the guest and must reap it; at the same time it wants
//! the exit status of the programs it started itself. One thread waits for everything:
//!
//! 1. it blocks until *some* child is dead, without reaping it (`WNOWAIT`);
//! 2. it takes the registry for writing, reaps all that are dead, hands the status of registered
//!    processes to their [`ExitWatch`] and drops the others (orphans).
//!
//! A program is started and registered while the registry is held for reading ([`Reaper::adopt`]), so a
//! process that dies before it is registered waits as a zombie until it is. The same lock makes
//! signals safe: a registered process is not yet reaped, so its number cannot be another's.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, OnceLock, RwLock};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitOptions, WaitStatus};

use crate::{console, poison};

/// How a process ended: its exit code, or the negated number of the signal that ended it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExitCode(pub i32);

impl ExitCode {
    fn from_status(status: WaitStatus) -> Self {
        Self(status.exit_status().unwrap_or_else(|| -status.terminating_signal().unwrap_or(0)))
    }
}

impl std::fmt::Display for ExitCode {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            code @ 0.. => write!(formatter, "exit code {code}"),
            signal => write!(formatter, "signal {}", -signal),
        }
    }
}

#[derive(Debug)]
struct Slot {
    code: OnceLock<ExitCode>,
    /// Readable for ever once `code` is set.
    ended: OwnedFd,
}

/// Waits for all children of this process.
#[derive(Debug, Default)]
pub struct Reaper {
    registry: RwLock<Registry>,
    /// Set when a child was started; the reaper waits on it while it has none.
    started: (Mutex<bool>, Condvar),
}

#[derive(Debug, Default)]
struct Registry {
    // Spawners hold the outer lock for reading, so the map has a lock of its own.
    slots: Mutex<HashMap<i32, Arc<Slot>>>,
}

impl Reaper {
    /// Starts the waiting thread.
    pub fn start() -> io::Result<Arc<Self>> {
        let reaper = Arc::new(Self::default());
        let waiting = Arc::clone(&reaper);
        std::thread::Builder::new().name("reaper".into()).stack_size(128 << 10).spawn(move || waiting.run())?;
        Ok(reaper)
    }

    /// Starts a process with `start`, which returns its id, and watches it. The process must lead a
    /// process group of its own.
    pub fn adopt<T, E: From<io::Error>>(
        self: &Arc<Self>,
        start: impl FnOnce() -> Result<(Pid, T), E>,
    ) -> Result<(ExitWatch, T), E> {
        let slot = Arc::new(Slot {
            code: OnceLock::new(),
            ended: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(io::Error::from)?,
        });
        let registry = poison::read(&self.registry);
        let (pid, rest) = start()?;
        poison::lock(&registry.slots).insert(pid.as_raw_pid(), Arc::clone(&slot));
        drop(registry);
        *poison::lock(&self.started.0) = true;
        self.started.1.notify_one();
        Ok((ExitWatch { pid, slot, reaper: Arc::clone(self) }, rest))
    }

    fn run(&self) {
        loop {
            match rustix::process::waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {
                Ok(_) => self.reap(),
                Err(Errno::INTR) => {}
                Err(Errno::CHILD) => self.wait_for_children(),
                Err(error) => {
                    console::error(&format!("cannot wait for processes: {error}"));
                    std::thread::sleep(Duration::from_secs(1));
                }
            }
        }
    }

    fn wait_for_children(&self) {
        // The time limit is for children that were not started here: the kernel gives orphans of its
        // own helpers to PID 1.
        let guard = poison::lock(&self.started.0);
        let waited = self.started.1.wait_timeout_while(guard, Duration::from_secs(30), |started| !*started);
        *waited.unwrap_or_else(std::sync::PoisonError::into_inner).0 = false;
    }

    fn reap(&self) {
        let registry = poison::write(&self.registry);
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let slot = poison::lock(&registry.slots).remove(&pid.as_raw_pid());
            if let Some(slot) = slot {
                let _ = slot.code.set(ExitCode::from_status(status));
                let _ = rustix::io::write(&slot.ended, &1u64.to_ne_bytes());
            }
        }
    }
}

/// A process that was started here.
#[derive(Debug)]
pub struct ExitWatch {
    pid: Pid,
    slot: Arc<Slot>,
    reaper: Arc<Reaper>,
}

impl ExitWatch {
    /// Its process id, which is also its process group's.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// How it ended, if it has.
    pub fn code(&self) -> Option<ExitCode> {
        self.slot.code.get().copied()
    }

    /// Waits for its end until `deadline`, for ever without one.
    pub fn wait(&self, deadline: Option<Instant>) -> Option<ExitCode> {
        loop {
            if let Some(code) = self.code() {
                return Some(code);
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return None;
            }
            let mut fds = [PollFd::new(&self.slot.ended, PollFlags::IN)];
            let _ = rustix::event::poll(&mut fds, left.and_then(|left| left.try_into().ok()).as_ref());
        }
    }

    /// Sends `signal` to its process group; false when it has ended.
    pub fn signal_group(&self, signal: Signal) -> bool {
        let _not_reaped_meanwhile = poison::read(&self.reaper.registry);
        self.code().is_none() && rustix::process::kill_process_group(self.pid, signal).is_ok()
    }
}

impl AsFd for ExitWatch {
    /// Readable once the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.slot.ended.as_fd()
    }
}

impl Drop for ExitWatch {
    fn drop(&mut self) {
        // A process that nobody watches any more is reaped like an orphan.
        let registry = poison::read(&self.reaper.registry);
        let mut slots = poison::lock(&registry.slots);
        if slots.get(&self.pid.as_raw_pid()).is_some_and(|slot| Arc::ptr_eq(slot, &self.slot)) {
            slots.remove(&self.pid.as_raw_pid());
        }
    }
}
