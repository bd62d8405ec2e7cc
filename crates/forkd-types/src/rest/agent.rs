//! Programs and code run in a sandbox.

use serde::{Deserialize, Serialize};

/// `POST /v1/sandboxes/:id/exec`.
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

fn thirty() -> u64 {
    30
}
