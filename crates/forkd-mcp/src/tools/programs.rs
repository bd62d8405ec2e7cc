//! Programs and code in a sandbox.

use std::time::{Duration, Instant};

use rmcp::handler::server::wrapper::Parameters;
use rmcp::model::CallToolResult;
use rmcp::{tool, tool_router};
use serde_json::{Value, json};

use crate::arguments::{EvalCode, ExecCommand, WaitForText};
use crate::daemon::sandbox;
use crate::reply::{failure, json_body, value_result};
use crate::{Body, CallError, Request, Server};

/// Prints the end of the file that its first argument names; nothing when it is not there yet.
const LAST_PART: &str = "tail -c 4096 -- \"$1\" 2>/dev/null || true";

/// How much of the file's end is shown, in characters.
const EXCERPT: usize = 256;

/// The longest that can be waited for a text. Clients give up much earlier.
const LONGEST_WAIT: Duration = Duration::from_secs(24 * 3600);

#[tool_router(router = program_tools, vis = "pub(crate)")]
impl Server {
    #[tool(
        description = "Run a program in a sandbox to its end and return its stdout, stderr and exit_code (negative: \
                       the signal that killed it). A failing program is a result, not an error of this tool."
    )]
    async fn exec_command(&self, Parameters(arguments): Parameters<ExecCommand>) -> CallToolResult {
        let path = sandbox(&arguments.sandbox_id, "/exec");
        self.pass(Request::post(path, json_body(&arguments))).await
    }

    #[tool(description = "Evaluate source text in the sandbox's warm interpreter (Python, or Node where there is no \
                       Python), where the snapshot's imports and variables are there already; faster than \
                       exec_command by the start of an interpreter. Returns result (the value's repr, or JSON text \
                       from Node), error (a traceback, or null) and what was printed.")]
    async fn eval_code(&self, Parameters(arguments): Parameters<EvalCode>) -> CallToolResult {
        let path = sandbox(&arguments.sandbox_id, "/eval");
        self.pass(Request::post(path, json_body(&arguments))).await
    }

    #[tool(
        description = "Wait until a file in a sandbox contains a text, for example until a server's log says that it \
                       is ready. Returns found, elapsed_ms and last_excerpt, the end of the file; found is false when \
                       the time is over.",
        annotations(read_only_hint = true)
    )]
    async fn wait_for_text(&self, Parameters(arguments): Parameters<WaitForText>) -> CallToolResult {
        let started = Instant::now();
        let limit = Duration::try_from_secs_f64(arguments.timeout_secs.max(0.0)).unwrap_or(LONGEST_WAIT);
        let pause = Duration::from_millis(arguments.poll_interval_ms.max(1));
        loop {
            let text = match self.last_part(&arguments.sandbox_id, &arguments.path).await {
                Ok(text) => text,
                Err(error) => return failure(&error),
            };
            let found = text.contains(&arguments.marker);
            let elapsed = started.elapsed();
            if found || elapsed + pause > limit.min(LONGEST_WAIT) {
                let elapsed_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
                let last_excerpt = last_characters(&text, EXCERPT);
                return value_result(json!({ "found": found, "elapsed_ms": elapsed_ms, "last_excerpt": last_excerpt }));
            }
            tokio::time::sleep(pause).await;
        }
    }

    async fn last_part(&self, id: &str, path: &str) -> Result<String, CallError> {
        let body = Body::Json(json!({ "args": ["sh", "-c", LAST_PART, "sh", path], "timeout_secs": 5 }));
        let answer = self.call(Request::post(sandbox(id, "/exec"), body)).await?;
        let answer: Value = serde_json::from_slice(&answer)
            .map_err(|error| CallError(format!("the daemon's answer is not JSON: {error}")))?;
        Ok(answer["stdout"].as_str().unwrap_or_default().to_owned())
    }
}

fn last_characters(text: &str, n: usize) -> &str {
    let start = text.char_indices().rev().nth(n.saturating_sub(1)).map_or(0, |(at, _)| at);
    &text[start..]
}

#[cfg(test)]
mod tests {
    use super::last_characters;

    #[test]
    fn the_excerpt_is_cut_between_characters() {
        assert_eq!(last_characters("añb", 2), "ñb");
        assert_eq!(last_characters("añb", 3), "añb");
        assert_eq!(last_characters("añb", 9), "añb");
        assert_eq!(last_characters("", 9), "");
    }
}
