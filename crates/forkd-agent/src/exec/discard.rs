//! Reads and drops what nobody wants, so that the writer neither blocks nor dies.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use crate::poison;

/// A thread that drains abandoned output streams until they end.
#[derive(Debug)]
pub struct Discarder {
    handed_over: Mutex<Vec<OwnedFd>>,
    wake: OwnedFd,
}

impl Discarder {
    /// Starts the thread.
    pub fn start() -> io::Result<Arc<Self>> {
        let discarder = Arc::new(Self {
            handed_over: Mutex::default(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        });
        let working = Arc::clone(&discarder);
        std::thread::Builder::new().name("discard".into()).stack_size(128 << 10).spawn(move || working.run())?;
        Ok(discarder)
    }

    /// Takes over a non-blocking stream.
    pub fn take(&self, stream: OwnedFd) {
        poison::lock(&self.handed_over).push(stream);
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn run(&self) {
        let mut streams: Vec<OwnedFd> = Vec::new();
        let mut scrap = vec![0; 64 << 10];
        loop {
            let mut fds: Vec<_> = streams.iter().map(|stream| PollFd::new(stream, PollFlags::IN)).collect();
            fds.push(PollFd::new(&self.wake, PollFlags::IN));
            if poll(&mut fds, None).is_err() {
                continue;
            }
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            let mut at = 0;
            streams.retain(|stream| {
                at += 1;
                !ready[at - 1] || !ended(rustix::io::read(stream, &mut scrap))
            });
            if ready.last().is_some_and(|woken| *woken) {
                let _ = rustix::io::read(&self.wake, &mut [0; 8]);
                streams.append(&mut poison::lock(&self.handed_over));
            }
        }
    }
}

/// Whether a read says that a stream will bring nothing more. A terminal whose last user left says `EIO`.
pub(super) fn ended(read: rustix::io::Result<usize>) -> bool {
    !matches!(read, Ok(1..) | Err(Errno::AGAIN | Errno::INTR))
}
