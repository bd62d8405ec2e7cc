//! Network namespaces, and the threads that go into them.
//!
//! A namespace belongs to a thread. Whatever changes one here runs on a thread that was made for it and ends with
//! the work, so that no thread of a pool is ever left in the wrong place.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::mount::UnmountFlags;
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

/// Where a thread's own namespace is found.
const OWN: &str = "/proc/thread-self/ns/net";

/// Runs `work` on a thread of its own, which may go where it likes.
pub(crate) fn in_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("forkd-netns".to_owned()).spawn_scoped(scope, work)?;
        match thread.join() {
            Ok(value) => Ok(value),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// The calling thread's namespace.
pub(crate) fn current() -> io::Result<OwnedFd> {
    open(Path::new(OWN))
}

/// The namespace at `path`.
pub(crate) fn open(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Moves the calling thread into a namespace.
pub(crate) fn enter(namespace: impl AsFd) -> io::Result<()> {
    Ok(rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?)
}

/// Moves the calling thread into a namespace that did not exist.
pub(crate) fn enter_fresh() -> io::Result<()> {
    // SAFETY: what is unsafe about unshare(2) is to part the descriptor tables of threads (CLONE_FILES); only
    // the network namespace changes here.
    Ok(unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?)
}

/// Keeps the calling thread's namespace under `path`, where `ip netns` finds it.
pub(crate) fn pin(path: &Path) -> io::Result<()> {
    OpenOptions::new().write(true).create_new(true).mode(0o444).open(path)?;
    rustix::mount::mount_bind(OWN, path).map_err(|error| {
        let _ = std::fs::remove_file(path);
        error.into()
    })
}

/// Lets go of the namespace under `path`; one that is not there is no error.
pub(crate) fn unpin(path: &Path) -> io::Result<()> {
    match rustix::mount::unmount(path, UnmountFlags::DETACH) {
        // A file that nothing is mounted on: the mount did not come about.
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
