//! Programs whose streams are carried while they run.
//!
//! `GET /v1/sandboxes/:id/exec/stream` as a WebSocket:
//!
//! | direction | message | meaning |
//! |---|---|---|
//! | client, first | text: [`ExecStreamRequest`] | what to run |
//! | client | binary: byte 0, then bytes | standard input; byte 0 alone ends it |
//! | client | text: [`ExecStreamControl`] | input as text, its end, a signal, a new size |
//! | daemon | text: [`ExecStreamEvent::Started`] | it runs |
//! | daemon | binary: byte 1, then bytes | standard output, or all that a terminal shows |
//! | daemon | binary: byte 2, then bytes | standard error |
//! | daemon, last | text: [`ExecStreamEvent::Exit`] or [`ExecStreamEvent::Error`] | how it ended; then the socket is closed |
//!
//! `POST` to the same path takes an [`ExecStreamRequest`] and answers every event as one line of JSON, or as
//! server-sent events where the client accepts those; output comes as [`ExecStreamEvent::Stdout`] and
//! [`ExecStreamEvent::Stderr`].

use serde::{Deserialize, Serialize};

/// First byte of a binary message: bytes of standard input, none of which end it.
pub const STDIN_CHANNEL: u8 = 0;

/// First byte of a binary message: bytes of standard output.
pub const STDOUT_CHANNEL: u8 = 1;

/// First byte of a binary message: bytes of standard error.
pub const STDERR_CHANNEL: u8 = 2;

/// What to run, and how.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ExecStreamRequest {
    /// The program and its arguments; no shell.
    pub args: Vec<String>,
    /// Environment added to the agent's, as pairs of name and value.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// Working directory; `/` when absent.
    #[serde(default)]
    pub cwd: Option<String>,
    /// User name or numeric id, `user:group` too; root when absent.
    #[serde(default)]
    pub user: Option<String>,
    /// The process group is killed after this long; no limit when absent.
    #[serde(default)]
    pub timeout_secs: Option<u64>,
    /// Run it on a terminal of this size.
    #[serde(default)]
    pub pty: Option<PtySize>,
    /// Whether standard input follows; otherwise it is empty. Not over `POST`.
    #[serde(default)]
    pub stdin: bool,
    /// Leave it running when the client goes; otherwise its process group is killed.
    #[serde(default)]
    pub detach: bool,
}

/// Size of a terminal in characters.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PtySize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// What a client may say while its program runs.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ExecStreamControl {
    /// Standard input, for clients that send no binary messages.
    Stdin {
        /// The bytes, in base64.
        data: String,
    },
    /// Standard input ends here. A terminal gets the character for it.
    StdinClose,
    /// Send a signal to the process group.
    Signal {
        /// Its number, or its name with or without `SIG`.
        signal: SignalName,
    },
    /// The terminal has a new size.
    Resize(PtySize),
}

/// A signal as clients name it.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum SignalName {
    /// Its number.
    Number(i32),
    /// Its name.
    Name(String),
}

impl SignalName {
    /// Its number on Linux, if it is a signal that programs are commonly sent.
    pub fn number(&self) -> Option<i32> {
        const NAMES: [(&str, i32); 14] = [
            ("HUP", 1),
            ("INT", 2),
            ("QUIT", 3),
            ("ABRT", 6),
            ("KILL", 9),
            ("USR1", 10),
            ("USR2", 12),
            ("PIPE", 13),
            ("ALRM", 14),
            ("TERM", 15),
            ("CONT", 18),
            ("STOP", 19),
            ("TSTP", 20),
            ("WINCH", 28),
        ];
        match self {
            Self::Number(number) => (1..=64).contains(number).then_some(*number),
            Self::Name(name) => {
                let upper = name.to_ascii_uppercase();
                let short = upper.strip_prefix("SIG").unwrap_or(&upper);
                NAMES.iter().find(|(name, _)| *name == short).map(|(_, number)| *number)
            }
        }
    }
}

/// What the daemon tells of a program.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ExecStreamEvent {
    /// It runs.
    Started {
        /// Process id in the guest.
        pid: u32,
    },
    /// It wrote to standard output; not over WebSockets, where this is binary.
    Stdout {
        /// The bytes, in base64.
        data: String,
    },
    /// It wrote to standard error; not over WebSockets.
    Stderr {
        /// The bytes, in base64.
        data: String,
    },
    /// It ended. The last event.
    Exit {
        /// Exit code; negative signal number when a signal ended it.
        code: i32,
        /// The time limit ended it.
        timed_out: bool,
    },
    /// It was not started, or is lost. The last event.
    Error {
        /// What was attempted, and why it failed.
        error: String,
        /// Stable code.
        code: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        let number = |text: &str| serde_json::from_str::<SignalName>(text).expect("either").number();
        assert_eq!(number("15"), Some(15));
        assert_eq!(number("\"SIGTERM\""), Some(15));
        assert_eq!(number("\"int\""), Some(2));
        assert_eq!(number("0"), None);
        assert_eq!(number("\"SIGFOO\""), None);
    }

    #[test]
    fn messages_look_as_documented() {
        let control: ExecStreamControl =
            serde_json::from_str(r#"{"type":"resize","rows":24,"cols":80}"#).expect("documented");
        assert_eq!(control, ExecStreamControl::Resize(PtySize { rows: 24, cols: 80 }));
        let close: ExecStreamControl = serde_json::from_str(r#"{"type":"stdin_close"}"#).expect("documented");
        assert_eq!(close, ExecStreamControl::StdinClose);
        let exit = ExecStreamEvent::Exit { code: -9, timed_out: true };
        assert_eq!(serde_json::to_string(&exit).expect("plain"), r#"{"type":"exit","code":-9,"timed_out":true}"#);
        let least: ExecStreamRequest = serde_json::from_str(r#"{"args":["true"]}"#).expect("defaults");
        assert!(!least.stdin && least.pty.is_none() && least.timeout_secs.is_none());
    }
}
