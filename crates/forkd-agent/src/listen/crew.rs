//! The threads that accept and serve the connections of one listener.
//!
//! ```text
//!           connection                   served
//! Waiting ─────────────► Serving ──────────────────────► Waiting, or the thread ends
//!                          │ nobody else waits: a thread is started
//! ```
//!
//! Whoever accepts a connection also serves it, and a few threads always wait. A copy of this machine is
//! therefore told who it is by a thread that it was born with, and that has served before: starting one
//! would cost every copy a hundred kilobytes of stacks and kernel structures, and time.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::SocketFlags;

use crate::console;

/// Threads at the start: one for the next connection and one for whoever comes meanwhile.
const FIRST: usize = 2;
/// Threads that go on waiting after a rush. More than at first, or each of two clients that take turns would
/// cost a thread.
const KEPT: usize = 4;
/// Enough for JSON of the depth that the parser allows.
const STACK: usize = 512 << 10;

struct Crew<H> {
    listener: OwnedFd,
    /// Watches the listener for whoever waited last, one connection a turn: of several waiting threads one
    /// is woken, and the others keep their memory clean.
    turn: OwnedFd,
    /// What connections come in on, for messages.
    name: String,
    waiting: AtomicUsize,
    handler: H,
}

/// Serves every connection to `listener` with `handler`, on threads of its own.
pub(super) fn start(
    listener: OwnedFd,
    name: String,
    handler: impl Fn(OwnedFd) + Send + Sync + 'static,
) -> io::Result<()> {
    // A connection may be gone again before it is accepted.
    rustix::io::ioctl_fionbio(&listener, true)?;
    let turn = epoll::create(CreateFlags::CLOEXEC)?;
    epoll::add(&turn, &listener, EventData::new_u64(0), EventFlags::IN | EventFlags::ONESHOT)?;
    let crew = Crew { listener, turn, name, waiting: AtomicUsize::new(0), handler };
    let crew = Arc::new(crew);
    (0..FIRST).try_for_each(|_| crew.grow())
}

impl<H: Fn(OwnedFd) + Send + Sync + 'static> Crew<H> {
    /// Starts a thread, which counts as waiting at once.
    fn grow(self: &Arc<Self>) -> io::Result<()> {
        let crew = Arc::clone(self);
        self.waiting.fetch_add(1, Ordering::AcqRel);
        let started =
            std::thread::Builder::new().name("connection".into()).stack_size(STACK).spawn(move || crew.work());
        if started.is_err() {
            self.waiting.fetch_sub(1, Ordering::AcqRel);
        }
        started.map(drop)
    }

    /// The life of one thread.
    fn work(self: &Arc<Self>) {
        loop {
            let socket = self.accept();
            // Someone must be left to accept the next one, which may come while this one is served.
            if self.waiting.fetch_sub(1, Ordering::AcqRel) == 1
                && let Err(error) = self.grow()
            {
                console::error(&format!("connections on {} wait for one to end: no thread: {error}", self.name));
            }
            if catch_unwind(AssertUnwindSafe(|| (self.handler)(socket))).is_err() {
                console::error(&format!("a connection on {} was given up", self.name));
            }
            if self.waiting.fetch_add(1, Ordering::AcqRel) >= KEPT {
                self.waiting.fetch_sub(1, Ordering::AcqRel);
                return;
            }
        }
    }

    /// Waits for this thread's turn and takes one connection.
    fn accept(&self) -> OwnedFd {
        loop {
            let mut event = Vec::with_capacity(1);
            match epoll::wait(&self.turn, spare_capacity(&mut event), None) {
                Ok(0) | Err(Errno::INTR) => continue,
                Ok(_) => {}
                Err(error) => self.pause("wait for", error),
            }
            let accepted = rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC);
            if let Err(error) = accepted
                && ![Errno::AGAIN, Errno::INTR, Errno::CONNABORTED].contains(&error)
            {
                self.pause("accept", error);
            }
            let rearmed = epoll::modify(
                &self.turn,
                self.listener.as_fd(),
                EventData::new_u64(0),
                EventFlags::IN | EventFlags::ONESHOT,
            );
            if let Err(error) = rearmed {
                console::error(&format!("connections on {} are not heard of any more: {error}", self.name));
            }
            if let Ok(socket) = accepted {
                return socket;
            }
        }
    }

    /// Out of descriptors or memory, most likely; both come back.
    fn pause(&self, attempt: &str, error: Errno) {
        console::error(&format!("cannot {attempt} connections on {}: {error}", self.name));
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::poison;
    use std::collections::HashSet;
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::sync::Mutex;
    use std::thread::ThreadId;

    /// A crew that answers every byte with it until the connection ends, and panics at `!`.
    fn echo() -> (SocketAddr, Arc<Mutex<HashSet<ThreadId>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address");
        let threads = Arc::new(Mutex::new(HashSet::new()));
        let seen = Arc::clone(&threads);
        start(listener.into(), "test".to_owned(), move |socket| {
            poison::lock(&seen).insert(std::thread::current().id());
            let mut stream = TcpStream::from(socket);
            let mut byte = [0];
            while stream.read(&mut byte).is_ok_and(|got| got == 1) {
                assert_ne!(&byte, b"!", "asked for");
                stream.write_all(&byte).expect("written");
            }
        })
        .expect("started");
        (address, threads)
    }

    fn connect(address: SocketAddr) -> TcpStream {
        let stream = TcpStream::connect(address).expect("connected");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("limit");
        stream
    }

    fn ask(stream: &mut TcpStream) {
        stream.write_all(b"x").expect("written");
        stream.read_exact(&mut [0]).expect("answered");
    }

    #[test]
    fn connections_do_not_wait_for_each_other() {
        let (address, threads) = echo();
        let mut open: Vec<TcpStream> = (0..40).map(|_| connect(address)).collect();
        open.iter_mut().rev().for_each(ask);
        assert_eq!(poison::lock(&threads).len(), 40);
    }

    #[test]
    fn one_connection_after_the_other_needs_few_threads() {
        let (address, threads) = echo();
        for _ in 0..50 {
            ask(&mut connect(address));
        }
        // A thread that has not seen the end of its connection yet is not there for the next one.
        assert!(poison::lock(&threads).len() < 25, "{threads:?}");
    }

    #[test]
    fn a_panic_ends_a_connection_and_nothing_else() {
        let (address, _) = echo();
        for _ in 0..3 * KEPT {
            let mut spoilt = connect(address);
            spoilt.write_all(b"!").expect("written");
            assert_eq!(spoilt.read(&mut [0]).expect("closed"), 0);
        }
        ask(&mut connect(address));
    }
}
