//! Everything that can go wrong with a machine.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use forkd_proto::agent::Failure;
use forkd_proto::frame::FrameError;

/// Why something could not be done with a machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The name is not one that can be a directory and part of a process name.
    #[error("{name:?} is not a machine name; use 1 to 40 letters, digits, '-' or '_', starting with a letter")]
    BadName {
        /// What was asked for.
        name: String,
    },
    /// A start option cannot work.
    #[error("{option} {value:?} cannot work: {reason}")]
    BadOption {
        /// Which option.
        option: &'static str,
        /// Its value.
        value: String,
        /// Why not, and what would.
        reason: String,
    },
    /// QEMU is not installed.
    #[error("{program} was not found; install it: apt-get install qemu-system-x86")]
    QemuMissing {
        /// What was looked for.
        program: String,
    },
    /// A program of forkd itself that the machine needs is not where it should be.
    #[error("{} does not exist; the machine runs forkd's own programs from that directory, so build or install {program} there", .path.display())]
    ProgramMissing {
        /// Its name.
        program: String,
        /// Where it was looked for.
        path: PathBuf,
    },
    /// Another program that is needed failed or is not there.
    #[error("cannot {attempt}: {reason}")]
    Tool {
        /// What was attempted.
        attempt: String,
        /// What the program said, or how to install it.
        reason: String,
    },
    /// The machine's root disk, kernel or initramfs could not be prepared.
    #[error("cannot prepare the machine's {what}")]
    Image {
        /// Which part.
        what: &'static str,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A file of the machine could not be read or written.
    #[error("cannot {attempt} {}", .path.display())]
    File {
        /// What was attempted.
        attempt: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// `machine.json` is damaged or of a later version.
    #[error("{} is not a machine description that this forkd understands: {reason}; `forkd machine rm` removes the machine", .path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// QEMU refused to start.
    #[error("QEMU did not start: {reason}")]
    Launch {
        /// What QEMU printed.
        reason: String,
    },
    /// The machine did not come up within its time limit.
    #[error("the machine was not ready after {} s; its console ended with:\n{console_tail}", .limit.as_secs())]
    StartTimeout {
        /// The limit.
        limit: Duration,
        /// Last lines of the console.
        console_tail: String,
    },
    /// The machine booted, but its boot script could not finish.
    #[error("the machine could not make itself ready: {reason}; its console ended with:\n{console_tail}")]
    Boot {
        /// What the boot script said.
        reason: String,
        /// Last lines of the console.
        console_tail: String,
    },
    /// The machine is not running.
    #[error("machine {name:?} is not running; start it with `forkd machine start`")]
    NotRunning {
        /// Its name.
        name: String,
    },
    /// The machine ended, crashed or hung while it was being used. Starting it again and repeating
    /// the work is reasonable.
    #[error("the machine died: {cause}; its console ended with:\n{console_tail}")]
    MachineDied {
        /// Ended, panicked or hung, in words.
        cause: String,
        /// Last lines of the console.
        console_tail: String,
    },
    /// The agent answers, but a program that it was asked to run has not begun.
    #[error("the machine answers, but has not begun to run {program:?} within {} s; it may be stuck", .limit.as_secs())]
    NotBegun {
        /// The program.
        program: String,
        /// How long it was waited for.
        limit: Duration,
    },
    /// A program in the machine has outlived its time limit, and the machine has not ended it.
    #[error("{program:?} was to end after {} s, and the machine has not ended it; it may be stuck", .limit.as_secs())]
    NotEnded {
        /// The program.
        program: String,
        /// Its time limit.
        limit: Duration,
    },
    /// The agent in the machine refused a request.
    #[error("the machine's agent answered: {0}")]
    Agent(Failure),
    /// The conversation with the agent broke although the machine lives.
    #[error("the connection to the machine's agent at {address} failed")]
    Connection {
        /// Address of the agent on this host.
        address: std::net::SocketAddr,
        /// Why.
        source: FrameError,
    },
    /// Reading standard input for, or writing output of, a program in the machine failed.
    #[error("cannot pass on the output of a program in the machine")]
    Output(#[source] io::Error),
    /// QEMU's control socket did not answer as it should.
    #[error("QEMU's control socket {}: {reason}", .path.display())]
    Qmp {
        /// The socket.
        path: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// QEMU could not be ended.
    #[error("QEMU process {pid} does not end, even by SIGKILL")]
    Unkillable {
        /// Its process id.
        pid: u32,
    },
}

impl MachineError {
    /// Whether starting the machine again and repeating the work is reasonable.
    pub fn is_machine_death(&self) -> bool {
        matches!(self, Self::MachineDied { .. })
    }

    /// Whether the machine lives and does not do what it is told, so that stopping and starting it is what helps.
    pub fn is_machine_stuck(&self) -> bool {
        matches!(self, Self::NotBegun { .. } | Self::NotEnded { .. })
    }

    pub(crate) fn file(attempt: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { attempt, path, source }
    }
}
