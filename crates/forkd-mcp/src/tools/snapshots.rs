//! Snapshots: what sandboxes are copies of.

use rmcp::handler::server::wrapper::Parameters;
use rmcp::model::CallToolResult;
use rmcp::{tool, tool_router};

use crate::arguments::{BranchSandbox, CreateSnapshot};
use crate::daemon::sandbox;
use crate::reply::json_body;
use crate::{Request, Server};

#[tool_router(router = snapshot_tools, vis = "pub(crate)")]
impl Server {
    #[tool(
        description = "List the snapshots that sandboxes can be copied from. Each has a tag, which is its name, and a \
                       status; only those with status \"ready\" can be used.",
        annotations(read_only_hint = true)
    )]
    async fn list_snapshots(&self) -> CallToolResult {
        self.pass(Request::get("/v1/snapshots".to_owned())).await
    }

    #[tool(
        description = "Boot a kernel and a root file system that lie on the daemon's host, let them settle, and keep \
                       the machine as a snapshot. Takes seconds to minutes. To snapshot a sandbox that runs, use \
                       branch_sandbox."
    )]
    async fn create_snapshot(&self, Parameters(arguments): Parameters<CreateSnapshot>) -> CallToolResult {
        self.pass(Request::post("/v1/snapshots".to_owned(), json_body(&arguments))).await
    }

    #[tool(
        description = "Keep a running sandbox, exactly as it is now, as a new snapshot that spawn_sandboxes can copy \
                       any number of times, also after the sandbox is gone. The sandbox runs on after a pause of \
                       milliseconds. Returns the snapshot with its tag. For running copies at once, use fork_sandbox; \
                       to be able to go back in the same sandbox, use checkpoint_sandbox."
    )]
    async fn branch_sandbox(&self, Parameters(arguments): Parameters<BranchSandbox>) -> CallToolResult {
        let path = sandbox(&arguments.sandbox_id, "/branch");
        self.pass(Request::post(path, json_body(&arguments))).await
    }
}
