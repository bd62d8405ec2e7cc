//! The server: all tools over one daemon.

use std::fmt;
use std::sync::Arc;

use rmcp::ServerHandler;
use rmcp::handler::server::router::tool::ToolRouter;
use rmcp::model::{CallToolResult, Implementation, ServerCapabilities, ServerConfig};
use rmcp::tool_handler;

use crate::reply::json_result;
use crate::{CallError, Daemon, Request};

/// What a model is told about all tools together.
const INSTRUCTIONS: &str = "\
forkd runs Linux virtual machines that are copies of a warmed snapshot; a copy takes milliseconds. \
Pick a snapshot with list_snapshots and make a sandbox with spawn_sandboxes. Run programs in it with exec_command and \
code in its warm interpreter with eval_code; move files with read_file and write_file. \
Before something risky, checkpoint_sandbox; rewind_sandbox undoes everything since, memory and disk. \
To try several ways from the same point, fork_sandbox gives running copies; branch_sandbox keeps a snapshot for later. \
kill_sandbox what is no longer needed.";

/// The tools. It keeps no state: sandboxes are the daemon's.
#[derive(Clone)]
pub struct Server {
    daemon: Arc<dyn Daemon>,
    tools: ToolRouter<Self>,
}

impl Server {
    /// All tools, over `daemon`.
    pub fn new(daemon: Arc<dyn Daemon>) -> Self {
        Self {
            daemon,
            tools: Self::snapshot_tools() + Self::sandbox_tools() + Self::program_tools() + Self::file_tools(),
        }
    }

    /// Asks the daemon.
    pub(crate) async fn call(&self, request: Request) -> Result<Vec<u8>, CallError> {
        self.daemon.call(request).await
    }

    /// Asks the daemon for JSON, which is the tool's result.
    pub(crate) async fn pass(&self, request: Request) -> CallToolResult {
        json_result(self.call(request).await)
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").finish_non_exhaustive()
    }
}

#[tool_handler(router = self.tools)]
impl ServerHandler for Server {
    fn get_info(&self) -> ServerConfig {
        ServerConfig::new(ServerCapabilities::builder().enable_tools().build())
            .with_server_info(Implementation::new("forkd", env!("CARGO_PKG_VERSION")))
            .with_instructions(INSTRUCTIONS)
    }
}
