//! `ping`.

use clap::Args;
use forkd_types::SandboxId;
use serde_json::json;

use super::{Context, no_sandbox, sandbox_error};
use crate::direct_agent::{DirectAgent, DirectArgs};
use crate::output;

/// Arguments of `forkd ping`.
#[derive(Args, Debug)]
pub(crate) struct PingArgs {
    /// The sandbox
    #[arg(conflicts_with_all = ["target", "child"])]
    sandbox: Option<SandboxId>,
    #[command(flatten)]
    direct: DirectArgs,
}

impl PingArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let pong = match (&self.sandbox, self.direct.agent()) {
            (Some(sandbox), _) => context.client().await?.ping(sandbox).await.map_err(sandbox_error)?,
            (None, Some(agent)) => agent.ask(json!({ "action": "ping" }), None).await?,
            (None, None) => {
                let agent = DirectAgent::usual().await.ok_or_else(|| no_sandbox("ping"))?;
                agent.ask(json!({ "action": "ping" }), None).await?
            }
        };
        output::json(&pong)?;
        Ok(0)
    }
}
