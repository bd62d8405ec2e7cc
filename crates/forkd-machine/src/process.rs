//! A process that outlives the program that started it, told apart from a later one of the same
//! number by its start time.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// Which process it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct ProcessId {
    pub(crate) pid: u32,
    /// Clock ticks after boot, from `/proc/PID/stat`.
    pub(crate) start_time: u64,
}

/// A hold on a process that cannot slip to another of the same number.
pub(crate) struct Process {
    pidfd: OwnedFd,
}

impl ProcessId {
    /// Identifies the process that has this number now; `None` when there is none.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (state, start_time) = parse_stat(&stat)?;
        // A zombie has ended; only its parent has not looked yet.
        (state != 'Z' && state != 'X').then_some(Self { pid, start_time })
    }

    /// Takes hold of the process; `None` when it has ended.
    pub(crate) fn open(self) -> Option<Process> {
        let pid = Pid::from_raw(i32::try_from(self.pid).ok()?)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // Compared after the hold is taken, so the number cannot be reused in between.
        (Self::of(self.pid) == Some(self)).then_some(Process { pidfd })
    }

    /// Whether it runs.
    pub(crate) fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }
}

impl Process {
    /// Sends SIGKILL; a process that has ended already is no error.
    pub(crate) fn kill(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Waits for the process to end; false when it still runs after `limit`.
    pub(crate) fn wait(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&timeout)) {
                Ok(0) => return false,
                Ok(_) => return true,
                Err(_) if left.is_zero() => return false,
                Err(_) => {}
            }
        }
    }
}

/// State letter and start time (fields 3 and 22). The name before them may hold spaces and parentheses.
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let start_time = fields.nth(18)?.parse().ok()?;
    Some((state, start_time))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn names_that_look_like_fields_do_not_confuse() {
        let stat = "7 (a) S (b) R 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 777 20";
        assert_eq!(parse_stat(stat), Some(('R', 777)));
        assert_eq!(parse_stat("7 (a"), None);
        assert_eq!(parse_stat("7 (a) R 1"), None);
    }

    #[test]
    fn a_process_is_held_killed_and_seen_to_end() {
        let mut child = Command::new("sleep").arg("60").spawn().expect("sleep exists");
        let id = ProcessId::of(child.id()).expect("just started");
        assert!(id.is_alive());
        let process = id.open().expect("runs");
        assert!(!process.wait(Duration::from_millis(20)));
        process.kill();
        assert!(process.wait(Duration::from_secs(5)));
        assert!(!id.is_alive(), "a zombie counts as ended");
        child.wait().expect("reaped");
        assert!(id.open().is_none());
    }

    #[test]
    fn another_process_of_the_same_number_is_not_mistaken() {
        let own = ProcessId::of(std::process::id()).expect("this test runs");
        let stranger = ProcessId { start_time: own.start_time + 1, ..own };
        assert!(stranger.open().is_none() && !stranger.is_alive());
    }
}
