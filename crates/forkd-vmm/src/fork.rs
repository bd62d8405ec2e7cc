//! `fork(2)` of a monitor.
//!
//! The child has one thread, the one that called; guest memory, shared copy-on-write by the kernel;
//! and every descriptor of the parent, of which it closes all that it is not meant to have.
//!
//! The parent's objects still lie in the child's memory, but their descriptors are gone and may be
//! reused: none of them may be dropped there. A child therefore never returns into the code that
//! forked it and ends with [`exit`], which runs no destructors.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::event::{PollFd, PollFlags, Timespec};

/// Which process this is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// The one that called, with the child's process id.
    Parent(i32),
    /// The copy.
    Child,
}

/// Forks the process.
///
/// Other threads do not exist in the child. They must not hold any lock that the child takes: a
/// monitor's other threads are its vCPUs', parked in [`Gate`](crate::gate::Gate) when this is called.
/// The allocator's locks are handled by the C library.
pub fn fork() -> io::Result<Side> {
    // SAFETY: the requirement on other threads is above; the caller is the event loop, which parks
    // them first, or a zygote, which has none.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Side::Child),
        pid => Ok(Side::Parent(pid)),
    }
}

/// Closes every descriptor of this process except standard error and those in `keep`.
pub fn close_all_but(keep: &[RawFd]) {
    let mut kept: Vec<u32> = keep.iter().map(|fd| *fd as u32).chain([2]).collect();
    kept.sort_unstable();
    let mut first = 0;
    for fd in kept {
        if first < fd {
            close_range(first, fd - 1);
        }
        first = fd + 1;
    }
    close_range(first, u32::MAX);
}

fn close_range(first: u32, last: u32) {
    // SAFETY: called in a child that owns nothing but the descriptors it keeps (see the module's
    // header): no live object refers to those that are closed.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
}

/// Ends the process at once, running no destructors.
pub fn exit(code: i32) -> ! {
    // SAFETY: always safe; output that matters has been flushed by then.
    unsafe { libc::_exit(code) }
}

/// Lets the kernel reap children that end: nobody waits for them here, the node watches them through
/// descriptors of its own.
pub fn reap_children_automatically() {
    // SAFETY: ignoring a signal has no preconditions.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// Has the kernel end this process when the other end of `connection` closes, whatever it is doing then:
/// nobody is left who would use its work.
///
/// The peer must not write to the connection: that ends this process too. Returns whether the peer is there.
pub fn end_with(connection: &OwnedFd) -> io::Result<bool> {
    let fd = connection.as_raw_fd();
    let set = |command, value: libc::c_int| -> io::Result<()> {
        // SAFETY: the descriptor is open, and neither command takes a pointer.
        if unsafe { libc::fcntl(fd, command, value) } == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SIGIO, which nobody here handles, ends a process. Monitors block no signals.
    set(libc::F_SETOWN, std::process::id() as libc::c_int)?;
    set(libc::F_SETFL, libc::O_ASYNC)?;
    let mut closed = [PollFd::new(connection, PollFlags::RDHUP)];
    rustix::event::poll(&mut closed, Some(&Timespec::default()))?;
    Ok(!closed[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Pid, Signal, WaitOptions, waitpid};
    use std::os::unix::net::UnixStream;

    /// How a child ends that works for ever, when its connection is closed before or after it begins.
    fn ended_by(close_first: bool) -> Option<i32> {
        let (ours, theirs) = UnixStream::pair().expect("socketpair");
        let theirs = OwnedFd::from(theirs);
        let ours = (!close_first).then_some(ours);
        let Side::Parent(pid) = fork().expect("fork") else {
            close_all_but(&[theirs.as_raw_fd()]);
            match end_with(&theirs) {
                Ok(true) => loop {
                    std::hint::spin_loop();
                },
                Ok(false) => exit(7),
                Err(_) => exit(8),
            }
        };
        drop(theirs);
        std::thread::sleep(std::time::Duration::from_millis(50));
        drop(ours);
        let (_, status) = waitpid(Pid::from_raw(pid), WaitOptions::empty()).expect("wait").expect("it has ended");
        status.terminating_signal().or(status.exit_status().map(|code| -code))
    }

    #[test]
    fn a_process_ends_with_its_connection_in_the_middle_of_its_work() {
        assert_eq!(ended_by(false), Some(Signal::IO.as_raw()));
        assert_eq!(ended_by(true), Some(-7));
    }
}
