//! Starting programs.
//!
//! Every program leads a session (and so a process group) of its own, gets nothing but its standard
//! streams and the descriptors it is meant to have, and is watched by the [`Reaper`].

// `pre_exec` is the only way to run code between fork and exec, and it is unsafe.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;

use forkd_proto::agent::TerminalSize;
use rustix::process::Pid;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use crate::reaper::{ExitWatch, Reaper};
use crate::users::Credentials;

/// What a program's standard streams are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Streams {
    /// Pipes for output; input is a pipe or `/dev/null`.
    Pipes {
        /// Whether input is a pipe.
        input: bool,
    },
    /// A pseudo-terminal of this size.
    Terminal(TerminalSize),
    /// Pipes for input and output; errors go where the agent's go.
    Lines,
    /// The agent's own, with nothing to read.
    Inherited,
}

/// A program to start.
#[derive(Debug)]
pub struct Program {
    /// The executable file.
    pub path: PathBuf,
    /// Arguments, the zeroth included.
    pub args: Vec<String>,
    /// Its whole environment.
    pub environment: BTreeMap<String, String>,
    /// Its working directory.
    pub directory: PathBuf,
    /// Whom it runs as; as the agent when absent.
    pub credentials: Option<Credentials>,
    /// Its standard streams.
    pub streams: Streams,
    /// Descriptors that it keeps, under the same numbers.
    pub keeps: Vec<OwnedFd>,
}

/// The agent's ends of a program's streams.
#[derive(Debug, Default)]
pub struct Ends {
    /// Write here what it reads.
    pub input: Option<OwnedFd>,
    /// Read here what it writes; both output streams for a terminal.
    pub output: Option<OwnedFd>,
    /// Read here what it writes to standard error.
    pub errors: Option<OwnedFd>,
    /// The master side of its terminal, for changing the size; the same file as `input`.
    pub terminal: Option<OwnedFd>,
}

/// Starts `program`.
pub fn start(reaper: &Arc<Reaper>, program: Program) -> io::Result<(ExitWatch, Ends)> {
    let mut command = Command::new(&program.path);
    command.args(program.args.iter().skip(1)).env_clear().envs(&program.environment).current_dir(&program.directory);
    if let Some(name) = program.args.first() {
        command.arg0(name);
    }
    let mut ends = Ends::default();
    match program.streams {
        Streams::Pipes { input } => {
            command.stdin(if input { Stdio::piped() } else { Stdio::null() });
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        Streams::Terminal(size) => {
            let (master, slave) = open_terminal(size)?;
            command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
            ends.input = Some(master.try_clone()?);
            ends.output = Some(master.try_clone()?);
            ends.terminal = Some(master);
        }
        Streams::Lines => {
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        }
        Streams::Inherited => {
            command.stdin(Stdio::null()).stdout(Stdio::inherit()).stderr(Stdio::inherit());
        }
    }
    let on_terminal = matches!(program.streams, Streams::Terminal(_));
    let credentials = program.credentials;
    let keeps: Vec<RawFd> = program.keeps.iter().map(AsRawFd::as_raw_fd).collect();
    // SAFETY: the closure runs in the forked child, which has one thread; it makes system calls only
    // and touches no lock and no allocator (its vectors were filled here).
    unsafe {
        command.pre_exec(move || become_program(on_terminal, credentials.as_ref(), &keeps));
    }
    let (watch, mut child) = reaper.adopt(|| {
        let child = command.spawn()?;
        let pid = Pid::from_raw(child.id() as i32).expect("a started process has a positive id");
        Ok::<_, io::Error>((pid, child))
    })?;
    if let Streams::Pipes { .. } | Streams::Lines = program.streams {
        ends.input = child.stdin.take().map(OwnedFd::from);
        ends.output = child.stdout.take().map(OwnedFd::from);
        ends.errors = child.stderr.take().map(OwnedFd::from);
    }
    Ok((watch, ends))
}

/// The last steps of the forked child before it becomes the program.
fn become_program(on_terminal: bool, credentials: Option<&Credentials>, keeps: &[RawFd]) -> io::Result<()> {
    rustix::process::setsid()?;
    if on_terminal {
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
    }
    // What an agent's parent ignored, as shells do SIGINT for what runs in the background, its programs must not:
    // dispositions other than handlers pass through exec.
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: this thread is alone in its process, which has no handlers of its own that could be missed. Signals
        // that cannot be changed are refused.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    if let Some(credentials) = credentials {
        rustix::thread::set_thread_groups(&credentials.groups)?;
        let (uid, gid) = (credentials.uid, credentials.gid);
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    }
    // Everything of the agent's is close-on-exec; this is for what the agent itself was started with.
    // Kernels before 5.11 refuse the flag, and then those stay open.
    // SAFETY: only flags change; no descriptor is closed before the exec.
    unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int) };
    for &fd in keeps {
        // SAFETY: `fd` is open: the parent holds it in `Program::keeps` until the child has started.
        let fd = unsafe { rustix::fd::BorrowedFd::borrow_raw(fd) };
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
    }
    Ok(())
}

fn open_terminal(size: TerminalSize) -> io::Result<(OwnedFd, OwnedFd)> {
    let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::pty::unlockpt(&master)?;
    resize_terminal(&master, size)?;
    let slave =
        rustix::pty::ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    Ok((master, slave))
}

/// Tells a terminal its size; the foreground process group gets SIGWINCH.
pub fn resize_terminal(master: impl AsFd, size: TerminalSize) -> io::Result<()> {
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(rustix::termios::tcsetwinsize(master, size)?)
}
