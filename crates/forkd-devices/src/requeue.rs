//! A descriptor by which a device asks the event loop to call it again, and the error of preparing
//! any descriptor for a device.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::{EventfdFlags, eventfd};

use crate::queue::{Chain, Drained, QueueSet};

/// A descriptor of a device could not be prepared.
#[derive(Debug, thiserror::Error)]
#[error("preparing the {device} device: {action} failed")]
pub struct DescriptorError {
    /// Which device.
    pub device: &'static str,
    /// What was tried.
    pub action: &'static str,
    /// The system's answer.
    pub source: io::Error,
}

/// Readable while work is left over.
///
/// Where no descriptor can be had, nothing is left over: the work is then done at once, however long
/// it takes.
pub(crate) struct Requeue {
    fd: Option<OwnedFd>,
    armed: bool,
}

impl Requeue {
    pub(crate) fn new() -> Self {
        Self { fd: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok(), armed: false }
    }

    /// Serves `queue` until it is empty or, after a fair share of work, asks to be called again.
    pub(crate) fn drain<'m>(
        &mut self,
        queues: &mut QueueSet<'m>,
        queue: usize,
        mut serve: impl FnMut(Chain<'m>) -> u32,
    ) {
        while queues.drain(queue, &mut serve) == Drained::More {
            if self.request() {
                break;
            }
        }
    }

    /// Makes the descriptor readable; false if there is none.
    #[must_use]
    pub(crate) fn request(&mut self) -> bool {
        let Some(fd) = &self.fd else { return false };
        // The write fails only when the counter is full, and then it is readable anyway.
        self.armed = self.armed || rustix::io::write(fd, &1_u64.to_ne_bytes()).is_ok();
        self.armed
    }

    /// Takes the request back; returns whether there was one.
    pub(crate) fn take(&mut self) -> bool {
        if let Some(fd) = &self.fd
            && self.armed
        {
            let _ = rustix::io::read(fd, &mut [0; 8]);
        }
        std::mem::take(&mut self.armed)
    }

    pub(crate) fn raw_fd(&self) -> Option<RawFd> {
        self.fd.as_ref().map(AsRawFd::as_raw_fd)
    }

    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }
}
