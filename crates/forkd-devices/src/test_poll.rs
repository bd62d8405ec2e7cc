//! Polling a descriptor that is known only by number, for tests.
#![allow(unsafe_code)]

use std::os::fd::RawFd;

/// Whether `fd`, which is open, can be read without waiting.
pub(crate) fn readable(fd: RawFd) -> bool {
    let mut entry = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry, which outlives the call.
    let count = unsafe { libc::poll(&raw mut entry, 1, 0) };
    count == 1 && entry.revents & libc::POLLIN != 0
}
