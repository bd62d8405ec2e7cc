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
use std::os::fd::RawFd;

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
