//! One process, held so that its number can never come to mean another process.
//!
//! A pid alone may be reused. A [`Process`] is a pidfd together with the start time that
//! `/proc/<pid>/stat` shows; the pair is written to the database and checked again after a restart.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::io::unix::AsyncFd;

/// A process by number and start time, as it is written to the database.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ProcessKey {
    /// Process id.
    pub(crate) pid: i32,
    /// Start time in clock ticks since the host booted.
    pub(crate) started: u64,
}

/// A live or just ended process.
#[derive(Debug)]
pub(crate) struct Process {
    key: ProcessKey,
    pidfd: AsyncFd<OwnedFd>,
}

impl Process {
    /// Holds the running process that `pid` names now.
    pub(crate) fn open(pid: i32) -> io::Result<Self> {
        let process = Self::child(pid)?;
        if has_exited(process.pidfd.get_ref())? {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("process {pid} has ended")));
        }
        Ok(process)
    }

    /// Holds a child of this process that was not waited for; it may have ended already.
    pub(crate) fn child(pid: i32) -> io::Result<Self> {
        let number = Pid::from_raw(pid)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, format!("{pid} is not a process id")))?;
        // The pidfd comes first: if the pid is reused afterwards, the start time read is that of a
        // process the pidfd does not hold, and looking whether that one has ended tells.
        let pidfd = rustix::process::pidfd_open(number, PidfdFlags::empty())?;
        let started = start_time(pid)?;
        Ok(Self { key: ProcessKey { pid, started }, pidfd: watchable(pidfd)? })
    }

    /// Holds the process of `key`, if it still runs.
    pub(crate) fn find(key: ProcessKey) -> io::Result<Self> {
        let process = Self::open(key.pid)?;
        if process.key.started != key.started {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("process {} is another one now: its number was reused", key.pid),
            ));
        }
        Ok(process)
    }

    /// Number and start time.
    pub(crate) fn key(&self) -> ProcessKey {
        self.key
    }

    /// What stands for the process.
    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.get_ref().as_fd()
    }

    /// Ends the process at once. Ending one that has ended already is no error.
    pub(crate) fn kill(&self) {
        match rustix::process::pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => tracing::error!(pid = self.key.pid, %error, "cannot end monitor"),
        }
    }

    /// Makes the process stand still, all of its threads.
    pub(crate) fn hold(&self) -> io::Result<()> {
        Ok(rustix::process::pidfd_send_signal(self.pidfd.get_ref(), Signal::STOP)?)
    }

    /// Lets the process go on, whether it stood still or not.
    pub(crate) fn let_go(&self) {
        match rustix::process::pidfd_send_signal(self.pidfd.get_ref(), Signal::CONT) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => tracing::error!(pid = self.key.pid, %error, "cannot let a monitor go on"),
        }
    }

    /// Returns when the process has ended.
    pub(crate) async fn exited(&self) {
        // A pidfd stays readable once its process has ended, so readiness is never cleared.
        if let Err(error) = self.pidfd.readable().await {
            tracing::error!(pid = self.key.pid, %error, "cannot watch monitor");
        }
    }
}

/// Registers a pidfd with the runtime's event loop.
#[allow(unsafe_code)]
fn watchable(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the registration must not outlive the descriptor nor see it change. An `OwnedFd` names
    // one descriptor until it is dropped, and the `AsyncFd` drops it after deregistering.
    Ok(unsafe { AsyncFd::register_with_interest(pidfd, tokio::io::Interest::READABLE) }?)
}

/// Whether the process behind `pidfd` has ended (a zombie counts as ended).
fn has_exited(pidfd: &OwnedFd) -> io::Result<bool> {
    let mut poll = [rustix::event::PollFd::new(pidfd, rustix::event::PollFlags::IN)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    Ok(rustix::event::poll(&mut poll, Some(&now))? > 0)
}

/// Start time of a process in clock ticks since boot: field 22 of `/proc/<pid>/stat`.
fn start_time(pid: i32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_start_time(&stat).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat has no start time in field 22: {stat:?}"))
    })
}

/// The command name, field 2, may itself hold spaces and parentheses; fields are counted from the
/// last closing one.
fn parse_start_time(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(") ")?;
    after_name.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_text_is_parsed_without_panic_and_names_never_mislead(name in "\\PC{0,15}", started: u64) {
            let stat = format!("7 ({name}) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 {started} 20");
            prop_assert_eq!(parse_start_time(&stat), Some(started));
            let _ = parse_start_time(&name);
        }
    }

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20 21";
        for name in ["forkd-vmm", "a b", ") R 9 9", "(", ""] {
            assert_eq!(parse_start_time(&format!("77 ({name}) {tail}\n")), Some(4242), "{name:?}");
        }
        assert_eq!(parse_start_time("77 (x) S 1 2"), None);
        assert_eq!(parse_start_time(""), None);
    }

    #[tokio::test]
    async fn a_process_is_watched_ended_and_not_found_again() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().expect("sleep");
        let process = Process::open(child.id() as i32).expect("open");
        let key = process.key();
        Process::find(key).expect("the same process");
        let other = ProcessKey { started: key.started + 1, ..key };
        assert_eq!(Process::find(other).expect_err("another start time").kind(), io::ErrorKind::NotFound);
        process.kill();
        process.exited().await;
        assert!(Process::find(key).is_err(), "a zombie is not a running process");
        child.wait().expect("reap");
        process.kill();
        assert!(Process::find(key).is_err());
    }
}
