//! Files of a sandbox.

use rmcp::handler::server::wrapper::Parameters;
use rmcp::model::{CallToolResult, ContentBlock};
use rmcp::{tool, tool_router};

use crate::arguments::{OfFile, WriteFile};
use crate::daemon::{query, sandbox};
use crate::reply::failure;
use crate::{Body, CallError, Request, Server};

/// The largest file that is shown to a model; more would only fill its context.
const READ_LIMIT: usize = 1 << 20;

#[tool_router(router = file_tools, vis = "pub(crate)")]
impl Server {
    #[tool(
        description = "Read a text file of a sandbox, at most 1 MiB. Of a larger one read parts with exec_command, for \
                       example by head, tail or sed.",
        annotations(read_only_hint = true)
    )]
    async fn read_file(&self, Parameters(of): Parameters<OfFile>) -> CallToolResult {
        let path = format!("{}?path={}", sandbox(&of.sandbox_id, "/files"), query(&of.path));
        let read = self.call(Request::get(path).at_most(READ_LIMIT)).await;
        let text = read.and_then(|bytes| as_text(&of.path, bytes));
        match text {
            Ok(text) => CallToolResult::success(vec![ContentBlock::text(text)]),
            Err(error) => failure(&error),
        }
    }

    #[tool(
        description = "Create a text file in a sandbox, or replace what it held. Directories that are missing are made.",
        annotations(destructive_hint = true, idempotent_hint = true)
    )]
    async fn write_file(&self, Parameters(arguments): Parameters<WriteFile>) -> CallToolResult {
        let WriteFile { sandbox_id, path, content } = arguments;
        let path = format!("{}?path={}&parents=true", sandbox(&sandbox_id, "/files"), query(&path));
        self.pass(Request::put(path, Body::Bytes(content.into_bytes()))).await
    }

    #[tool(
        description = "List a directory of a sandbox: name, path, type, size, mode and time of each entry.",
        annotations(read_only_hint = true)
    )]
    async fn list_files(&self, Parameters(of): Parameters<OfFile>) -> CallToolResult {
        let path = format!("{}?path={}", sandbox(&of.sandbox_id, "/files/list"), query(&of.path));
        self.pass(Request::get(path)).await
    }
}

/// A file's content as a model can read it.
fn as_text(path: &str, bytes: Vec<u8>) -> Result<String, CallError> {
    String::from_utf8(bytes)
        .map_err(|_| CallError(format!("{path} is not UTF-8 text; look at it with exec_command, for example by xxd")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_model_cannot_read_is_said_and_not_shown() {
        assert_eq!(as_text("/a", b"text".to_vec()).expect("text"), "text");
        assert!(as_text("/a", vec![0xff]).expect_err("not text").to_string().contains("not UTF-8"));
    }
}
