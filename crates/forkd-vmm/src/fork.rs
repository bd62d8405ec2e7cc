//! `fork(2)` of a monitor.
//!
//! The child has one thread, the one that called; guest memory, shared copy-on-write by the kernel;
//! and every descriptor of the parent, of which it closes all that it is not meant to have.
//!
//! A child is born into its control group ([`fork_into`]). One that moved there itself would be charged to its
//! parent's group until then, and to move a process the kernel waits, with all forks of the host held up, until no
//! processor can still be in the middle of one; to be born there costs nothing.
//!
//! The parent's objects still lie in the child's memory, but their descriptors are gone and may be
//! reused: none of them may be dropped there. A child therefore never returns into the code that
//! forked it and ends with [`exit`], which runs no destructors.
#![allow(unsafe_code)]

use std::io::{self, Read};
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

/// [`fork`] into the control group whose directory is `group`, or into that of this process.
///
/// # Errors
/// The kernel's: among them that the group is full, or is gone.
pub fn fork_into(group: Option<&OwnedFd>) -> io::Result<Side> {
    let Some(group) = group else { return fork() };
    match thread_id_place() {
        Some(place) => clone_into(group, place),
        None => fork_and_enter(group),
    }
}

/// `clone3(2)` as the C library's `fork` calls it, and into a group.
///
/// What that function does besides is for processes whose other threads may be anywhere: see [`fork`] for why those of
/// a monitor are not. The bookkeeping of their stacks stays in the child, which costs it address space.
fn clone_into(group: &OwnedFd, thread_id: *mut libc::c_int) -> io::Result<Side> {
    /// Linux 5.7. The C library's constant is cut to 32 bits.
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    // SAFETY: all zero is a `clone_args` that asks for nothing.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = CLONE_INTO_CGROUP | (libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID) as u64;
    arguments.child_tid = thread_id as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    arguments.cgroup = group.as_raw_fd() as u64;
    // SAFETY: without a stack and without CLONE_VM this is fork(2): the child goes on here on a copy of this stack.
    // The requirement on other threads is that of `fork`. The kernel writes the child's thread id to where the
    // C library keeps it, in the child's copy of the memory alone.
    match unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<libc::clone_args>()) } {
        -1 => match io::Error::last_os_error() {
            // A kernel before 5.7, or a filter around this process that does not know the call.
            error if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::E2BIG)) => fork_and_enter(group),
            error => Err(error),
        },
        0 => Ok(Side::Child),
        pid => Ok(Side::Parent(pid as i32)),
    }
}

/// Where the C library keeps the id of this thread, which it must find changed in a child.
fn thread_id_place() -> Option<*mut libc::c_int> {
    let mut place: *mut libc::c_int = std::ptr::null_mut();
    // SAFETY: the kernel writes one pointer to `place`, the one that the C library registered for this thread.
    let asked = unsafe { libc::prctl(libc::PR_GET_TID_ADDRESS, &raw mut place, 0, 0, 0) };
    // A kernel may be built without this call.
    (asked == 0 && !place.is_null()).then_some(place)
}

/// Forks, and lets the child move itself.
fn fork_and_enter(group: &OwnedFd) -> io::Result<Side> {
    let side = fork()?;
    if side == Side::Child
        && let Err(error) = enter(group)
    {
        let complaint = format!("forkd-vmm: cannot enter the control group: {error}\n");
        let _ = rustix::io::write(rustix::stdio::stderr(), complaint.as_bytes());
        exit(1);
    }
    Ok(side)
}

/// Moves this process into a group.
fn enter(group: &OwnedFd) -> io::Result<()> {
    let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC;
    let processes = rustix::fs::openat(group, c"cgroup.procs", flags, rustix::fs::Mode::empty())?;
    rustix::io::write(&processes, b"0")?;
    Ok(())
}

/// What has a child begin only when its parent has done what cannot wait.
///
/// The kernel puts a new process on an idle processor, which is that of a vCPU that stands still for the fork. A
/// child that began at once would keep it for a slice of time, and the vCPU, woken, would wait for that: longer
/// than it stood still for.
#[derive(Debug)]
pub struct Turn {
    waits: io::PipeReader,
    passes: io::PipeWriter,
}

impl Turn {
    /// To be made before the fork.
    pub fn new() -> io::Result<Self> {
        let (waits, passes) = io::pipe()?;
        Ok(Self { waits, passes })
    }

    /// In the child: waits until the parent passes it the turn, or has ended.
    pub fn wait(self) {
        let Self { mut waits, passes } = self;
        // The pipe ends when the parent's end is the last and is closed.
        drop(passes);
        let _ = waits.read(&mut [0]);
    }

    /// In the parent: lets the child begin.
    pub fn pass(self) {}
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
