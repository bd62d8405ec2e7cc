//! Sandboxes: making them, copying them, going back in them, ending them.

use rmcp::handler::server::wrapper::Parameters;
use rmcp::model::CallToolResult;
use rmcp::{tool, tool_router};
use serde_json::json;

use crate::arguments::{CheckpointSandbox, ForkSandbox, OfSandbox, RewindSandbox, SpawnSandboxes};
use crate::daemon::sandbox;
use crate::reply::{failure, json_body, value_result};
use crate::{Body, Request, Server};

#[tool_router(router = sandbox_tools, vis = "pub(crate)")]
impl Server {
    #[tool(
        description = "Make n running copies of a snapshot. Each is a Linux virtual machine of its own, with all that \
                       the snapshot had in memory and on disk, and takes milliseconds to make. Returns one object per \
                       copy; its id is what all other tools want. They run until kill_sandbox."
    )]
    async fn spawn_sandboxes(&self, Parameters(arguments): Parameters<SpawnSandboxes>) -> CallToolResult {
        self.pass(Request::post("/v1/sandboxes".to_owned(), json_body(&arguments))).await
    }

    #[tool(description = "List the sandboxes that there are.", annotations(read_only_hint = true))]
    async fn list_sandboxes(&self) -> CallToolResult {
        self.pass(Request::get("/v1/sandboxes".to_owned())).await
    }

    #[tool(
        description = "Describe one sandbox: the snapshot it is a copy of, when it was made, whether it still runs.",
        annotations(read_only_hint = true)
    )]
    async fn get_sandbox(&self, Parameters(of): Parameters<OfSandbox>) -> CallToolResult {
        self.pass(Request::get(sandbox(&of.sandbox_id, ""))).await
    }

    #[tool(
        description = "End a sandbox at once. What it had in memory and on disk is lost, its checkpoints included; \
                       snapshots made from it stay.",
        annotations(destructive_hint = true)
    )]
    async fn kill_sandbox(&self, Parameters(of): Parameters<OfSandbox>) -> CallToolResult {
        match self.call(Request::delete(sandbox(&of.sandbox_id, ""))).await {
            Ok(_) => value_result(json!({ "id": of.sandbox_id, "killed": true })),
            Err(error) => failure(&error),
        }
    }

    #[tool(description = "Make n running copies of a running sandbox, all of the same instant, in milliseconds: its \
                       processes, memory and files as they are now. Use it to try several ways from the same point. \
                       Returns one object per copy.")]
    async fn fork_sandbox(&self, Parameters(arguments): Parameters<ForkSandbox>) -> CallToolResult {
        let path = sandbox(&arguments.sandbox_id, "/fork");
        self.pass(Request::post(path, json_body(&arguments))).await
    }

    #[tool(
        description = "Remember a sandbox as it is now, memory and disk, so that rewind_sandbox can bring it back. \
                       Takes milliseconds and hardly any memory; do it before anything that might go wrong."
    )]
    async fn checkpoint_sandbox(&self, Parameters(arguments): Parameters<CheckpointSandbox>) -> CallToolResult {
        let path = sandbox(&arguments.sandbox_id, "/checkpoints");
        self.pass(Request::post(path, json_body(&arguments))).await
    }

    #[tool(description = "List a sandbox's checkpoints, oldest first.", annotations(read_only_hint = true))]
    async fn list_checkpoints(&self, Parameters(of): Parameters<OfSandbox>) -> CallToolResult {
        self.pass(Request::get(sandbox(&of.sandbox_id, "/checkpoints"))).await
    }

    #[tool(
        description = "Bring a sandbox back to a checkpoint: memory, processes and files are as they were then. What \
                       happened since is lost, and so are later checkpoints; the checkpoint itself stays.",
        annotations(destructive_hint = true)
    )]
    async fn rewind_sandbox(&self, Parameters(arguments): Parameters<RewindSandbox>) -> CallToolResult {
        let path = sandbox(&arguments.sandbox_id, "/rewind");
        self.pass(Request::post(path, json_body(&arguments))).await
    }

    #[tool(
        description = "Ask a sandbox's agent whether it is there, and what it has: kernel, warm interpreters, numpy.",
        annotations(read_only_hint = true)
    )]
    async fn ping_sandbox(&self, Parameters(of): Parameters<OfSandbox>) -> CallToolResult {
        self.pass(Request::post(sandbox(&of.sandbox_id, "/ping"), Body::Empty)).await
    }
}
