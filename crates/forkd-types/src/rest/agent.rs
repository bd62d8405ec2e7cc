//! Programs and code run in a sandbox.

use serde::{Deserialize, Serialize};

/// `POST /v1/sandboxes/:id/exec`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ExecRequest {
    /// The program and its arguments; no shell.
    pub args: Vec<String>,
    /// The process group is killed after this long.
    #[serde(default = "thirty")]
    pub timeout_secs: u64,
    /// Environment added to the agent's.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// Working directory.
    #[serde(default)]
    pub cwd: Option<String>,
    /// User name or numeric id.
    #[serde(default)]
    pub user: Option<String>,
    /// Text for standard input; without it standard input is empty.
    #[serde(default)]
    pub stdin: Option<String>,
}

/// Answer of `exec`. Output that is not UTF-8 has its bad bytes replaced.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ExecResponse {
    /// Standard output.
    pub stdout: String,
    /// Standard error; also says why a program could not be started.
    pub stderr: String,
    /// Exit code; negative signal number when killed by a signal; 1 when it could not be started.
    pub exit_code: i32,
    /// Set when the time limit ended it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub timed_out: bool,
}

/// `POST /v1/sandboxes/:id/eval`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EvalRequest {
    /// Source text.
    pub code: String,
    /// `python` or `node`; the guest's default when absent.
    #[serde(default)]
    pub language: Option<String>,
    /// The evaluation is abandoned after this long.
    #[serde(default = "thirty")]
    pub timeout_secs: u64,
}

/// Answer of `eval`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EvalResponse {
    /// `repr` of the value (Python) or its JSON text (Node).
    pub result: Option<String>,
    /// The error with its traceback.
    pub error: Option<String>,
    /// 0, or 1 on error.
    pub exit_code: i32,
    /// What the code printed.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub stdout: String,
}

/// Answer of `POST /v1/sandboxes/:id/ping`: the keys that clients of the older agent read, and what this agent tells
/// besides.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PingAnswer {
    /// Always true.
    pub pong: bool,
    /// Version of numpy in the warm Python, or `not-installed`.
    pub numpy_version: String,
    /// The agent's process id in the guest.
    pub pid: u32,
    /// The language that `eval` takes when none is named.
    pub agent_lang: String,
    /// Always true: an agent answers only when what was to be warmed is warm.
    pub warmup_ready: bool,
    /// Version of the agent's protocol.
    pub protocol: u32,
    /// Version of the agent.
    pub agent: String,
    /// Release of the guest's kernel.
    pub kernel: String,
    /// Languages whose runtime is warm.
    pub warm: Vec<String>,
    /// Who the guest was told that it is.
    pub sandbox_id: String,
    /// Nanoseconds since the guest booted.
    pub uptime_ns: u64,
    /// How long the agent took to answer the daemon.
    pub round_trip_us: u64,
}

fn thirty() -> u64 {
    30
}
