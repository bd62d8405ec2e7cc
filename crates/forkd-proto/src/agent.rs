//! Messages between a host program and the agent in a guest.
//!
//! One connection serves one request. The client sends a [`Request`] frame; what follows depends
//! on it:
//!
//! | request | client sends on | agent answers |
//! |---|---|---|
//! | `Exec` | `Stdin` frames (an empty one ends the input), [`ExecControl`] as `Request` frames | `Stdout`/`Stderr` frames, then `Response` [`Response::Exited`] |
//! | `WriteFile` | `Data` frames, an empty one ends the file | `Response` |
//! | `ReadFile`, `ReadRange` | | `Response` [`Response::File`], `Data` frames, an empty one ends the file |
//! | `Archive` | | `Response` [`Response::Done`], `Data` frames of a tar stream, an empty one ends it; or amid them an error |
//! | `Extract` | `Data` frames of a tar stream, an empty one ends it | `Response` |
//! | `List` with `pages` | | `Response` [`Response::Listing`] again and again, one without entries ends it |
//! | `Watch` | | `Response` [`Response::Done`], then [`Response::Changed`] until the client closes |
//! | `Tunnel` | after the answer: `Data` frames, an empty one is a half-close | `Response`, then `Data` frames |
//! | all others | | one `Response` |
//!
//! When the client closes the connection of an `Exec` early, the process group is killed, unless it
//! asked for `detach`.

use serde::{Deserialize, Serialize};

/// The vsock port that the agent listens on.
pub const AGENT_PORT: u32 = 1024;

/// The version of this protocol; agents report it in [`Pong`].
pub const PROTOCOL_VERSION: u32 = 1;

/// What a client asks.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// First frame of a connection to an agent that wants a token (TCP); answered by `Done`, after
    /// which the connection's one request follows. Agents without a token answer `Done` too.
    Hello {
        /// The shared secret.
        token: String,
    },
    /// Is the agent there, and what is in the guest?
    Ping,
    /// Take on the identity of a fresh copy; the first request after every fork.
    Identify(Identity),
    /// Run a program.
    Exec(Exec),
    /// Run source text in a warm runtime, starting the runtime if need be.
    Eval(Eval),
    /// Send a file to the client.
    ReadFile {
        /// Absolute path in the guest.
        path: String,
    },
    /// Send part of a file to the client.
    ReadRange {
        /// Absolute path in the guest.
        path: String,
        /// The first byte; when negative, counted from the end, and no further back than the start.
        offset: i64,
        /// How many bytes at most; to the end when absent.
        #[serde(default)]
        length: Option<u64>,
    },
    /// Create or replace a file with what follows.
    WriteFile {
        /// Absolute path in the guest.
        path: String,
        /// Permission bits of a new file.
        mode: u32,
        /// Create missing parent directories.
        #[serde(default)]
        parents: bool,
    },
    /// List a directory.
    List {
        /// Absolute path in the guest.
        path: String,
        /// Answer in as many listings as it takes. Without it one must hold all; agents that do not know it
        /// answer one and close.
        #[serde(default)]
        pages: bool,
    },
    /// Describe one file, not following a final symbolic link.
    Stat {
        /// Absolute path in the guest.
        path: String,
    },
    /// Remove a file or, with `recursive`, a tree.
    Remove {
        /// Absolute path in the guest.
        path: String,
        /// Remove directories with their contents.
        #[serde(default)]
        recursive: bool,
    },
    /// Make a directory and its parents.
    MakeDir {
        /// Absolute path in the guest.
        path: String,
    },
    /// Rename within one file system.
    Rename {
        /// Absolute path in the guest.
        from: String,
        /// Absolute path in the guest.
        to: String,
    },
    /// Send a file or a tree as a tar stream whose entries start with its own name.
    Archive {
        /// Absolute path in the guest.
        path: String,
    },
    /// Unpack the tar stream that follows, keeping modes and times, and owners too if asked to.
    Extract {
        /// Absolute path in the guest of a directory that is there.
        path: String,
        /// Give files the owners that the stream names; otherwise they belong to the agent's user.
        #[serde(default)]
        owners: bool,
    },
    /// Tell of changes to a file, or of what is in a directory.
    Watch {
        /// Absolute path in the guest.
        path: String,
        /// Also of what is in the directories below it, those included that come later.
        #[serde(default)]
        recursive: bool,
    },
    /// Connect to a TCP port on the guest's loopback, or on its own address where nobody listens on the
    /// loopback, and carry bytes.
    Tunnel {
        /// TCP port.
        port: u16,
    },
    /// Flush all file systems to their disks.
    Sync,
    /// Flush, stop every process and power the guest off.
    Shutdown,
}

/// Who a copy is, and the randomness it starts from.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Identity {
    /// The sandbox's id, shown inside as `/run/forkd/sandbox-id` and `FORKD_SANDBOX_ID`.
    pub sandbox_id: String,
    /// New host name.
    pub hostname: String,
    /// New `/etc/machine-id`, 32 lower-case hex digits.
    pub machine_id: String,
    /// 64 bytes from the host's generator, hex. Credited to the kernel's pool; a derived value
    /// reseeds each warm runtime.
    pub seed: String,
    /// Wall-clock time to set, nanoseconds since the Unix epoch.
    pub wall_clock_ns: u64,
}

/// A program to run.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Exec {
    /// Program and arguments; looked up in `PATH` when it holds no slash.
    pub args: Vec<String>,
    /// Variables added to the agent's environment.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// Working directory; `/` when absent.
    #[serde(default)]
    pub cwd: Option<String>,
    /// User name or numeric id; root when absent.
    #[serde(default)]
    pub user: Option<String>,
    /// The process group gets SIGKILL after this long; no limit when absent.
    #[serde(default)]
    pub timeout_ms: Option<u64>,
    /// Whether the client will send standard input; otherwise it is `/dev/null`.
    #[serde(default)]
    pub stdin: bool,
    /// Run on a pseudo-terminal of this size; output then comes as `Stdout` only.
    #[serde(default)]
    pub terminal: Option<TerminalSize>,
    /// Leave the process running when the client goes; its output is then discarded.
    #[serde(default)]
    pub detach: bool,
}

/// Size of a pseudo-terminal in characters.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// What a client may say while its program runs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum ExecControl {
    /// Send a signal to the process group.
    Signal {
        /// Signal number.
        signal: i32,
    },
    /// Tell the pseudo-terminal its new size.
    Resize(TerminalSize),
}

/// Source text for a warm runtime.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Eval {
    /// `python` or `node`; the first that the image has when absent.
    #[serde(default)]
    pub language: Option<String>,
    /// Source. The value of a final expression is the result.
    pub code: String,
    /// The runtime is killed, and its state lost, when the code runs longer; no limit when absent.
    #[serde(default)]
    pub timeout_ms: Option<u64>,
}

/// What the agent answers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Response {
    /// Done; nothing to say.
    Done,
    /// To `Ping`.
    Pong(Pong),
    /// To `Identify`.
    Identified {
        /// What could not be done, in words; the copy is usable all the same.
        warnings: Vec<String>,
    },
    /// To `Exec`: the program started.
    Started {
        /// Process id in the guest.
        pid: u32,
    },
    /// To `Exec`: the program ended.
    Exited(Exited),
    /// To `Eval`.
    Evaluated(Evaluated),
    /// To `ReadFile`; the contents follow.
    File(FileInfo),
    /// To `Stat`.
    Stat(FileInfo),
    /// To `List`.
    Listing {
        /// Entries in name order, without `.` and `..`.
        entries: Vec<FileInfo>,
    },
    /// To `Watch`: something changed.
    Changed(FileChange),
    /// The request could not be carried out.
    Error(Failure),
}

/// To `Ping`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Pong {
    /// [`PROTOCOL_VERSION`] of the agent.
    pub protocol: u32,
    /// Version of the agent program.
    pub agent: String,
    /// Release of the guest kernel.
    pub kernel: String,
    /// Languages whose runtime is running, warm.
    pub warm: Vec<String>,
    /// The identity last taken on, empty before the first.
    pub sandbox_id: String,
    /// Version of numpy in the warm Python runtime, if it is imported there.
    #[serde(default)]
    pub numpy_version: Option<String>,
    /// Nanoseconds since the guest booted.
    pub uptime_ns: u64,
}

/// How a program ended.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Exited {
    /// Exit code; negative signal number when a signal ended it.
    pub code: i32,
    /// The time limit ended it.
    #[serde(default)]
    pub timed_out: bool,
}

/// Outcome of an evaluation.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Evaluated {
    /// `repr` of the value (Python) or its JSON text (Node); absent when the code ended in a
    /// statement or failed.
    #[serde(default)]
    pub result: Option<String>,
    /// The error with its traceback, when it failed.
    #[serde(default)]
    pub error: Option<String>,
    /// What the code wrote to standard output.
    #[serde(default)]
    pub stdout: String,
    /// What the code wrote to standard error.
    #[serde(default)]
    pub stderr: String,
}

/// What kind of file it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileType {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Device, socket or FIFO.
    Other,
}

/// One file.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FileInfo {
    /// Name without its directory in a listing, else the path as asked.
    pub name: String,
    /// What it is.
    pub file_type: FileType,
    /// Size in bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, seconds since the Unix epoch.
    pub modified_unix: i64,
    /// Target of a symbolic link.
    #[serde(default)]
    pub target: Option<String>,
}

/// One change to a watched file or directory.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FileChange {
    /// What happened.
    pub change: ChangeKind,
    /// The file, absolute.
    pub path: String,
    /// Where it was before, when it was moved within what is watched.
    #[serde(default)]
    pub from: Option<String>,
    /// Whether it is a directory.
    #[serde(default)]
    pub directory: bool,
}

/// What happened to a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChangeKind {
    /// It came to be, or was moved in from elsewhere.
    Created,
    /// Its content changed; several changes in quick succession may be told as one.
    Modified,
    /// Whoever wrote it closed it.
    Written,
    /// Its mode, owner or times changed.
    Attributes,
    /// It was removed, or moved elsewhere.
    Removed,
    /// It has another name.
    Moved,
    /// More happened than could be told; look at everything anew.
    Missed,
    /// Something that this version does not know.
    #[serde(other)]
    Other,
}

/// Why a request could not be carried out.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What kind of failure it is.
    pub code: FailureCode,
    /// What was attempted on which object, and why it failed.
    pub message: String,
}

/// Kinds of failure that a client may want to tell apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    /// No such program, file, user, runtime or port.
    NotFound,
    /// Not allowed.
    Denied,
    /// The request itself is wrong.
    Invalid,
    /// What is there stands in the way: a directory that is not empty, a file where a directory should be.
    Conflict,
    /// The file system is full.
    NoSpace,
    /// It took longer than the request allowed.
    TimedOut,
    /// Anything else.
    #[serde(other)]
    Internal,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_and_changes_of_later_versions_are_still_understood() {
        let failure: Failure = serde_json::from_str(r#"{"code":"sunspots","message":"m"}"#).expect("known shape");
        assert_eq!(failure.code, FailureCode::Internal);
        let change: FileChange = serde_json::from_str(r#"{"change":"folded","path":"/a"}"#).expect("known shape");
        assert_eq!((change.change, change.directory), (ChangeKind::Other, false));
        let list: Request = serde_json::from_str(r#"{"op":"list","path":"/"}"#).expect("as older clients ask");
        assert_eq!(list, Request::List { path: "/".into(), pages: false });
    }

    #[test]
    fn messages_look_on_the_wire_as_older_agents_know_them() {
        let exec = Request::Exec(Exec { args: vec!["true".into()], ..Exec::default() });
        let wire = r#"{"op":"exec","args":["true"],"env":[],"cwd":null,"user":null,"timeout_ms":null,"stdin":false,"terminal":null,"detach":false}"#;
        assert_eq!(serde_json::to_string(&exec).expect("plain data"), wire);
        let least: Request = serde_json::from_str(r#"{"op":"exec","args":["true"],"later":1}"#).expect("defaults");
        assert_eq!(least, exec);
        assert_eq!(serde_json::from_str::<Request>(r#"{"op":"ping"}"#).expect("unit"), Request::Ping);
        assert_eq!(
            serde_json::to_string(&Response::Exited(Exited { code: -9, timed_out: true })).expect("plain data"),
            r#"{"op":"exited","code":-9,"timed_out":true}"#
        );
    }
}
