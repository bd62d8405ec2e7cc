//! `mcp`: sandboxes as tools of language models.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Args;
use forkd_mcp::http::{self, HttpServer};
use forkd_mcp::{CallError, Calling, Daemon, Request, stdio};
use tokio_util::sync::CancellationToken;

use super::Context;
use crate::client::{Client, RawBody};
use crate::environment::FORKD_MCP_TOKEN;
use crate::failure::Advise;
use crate::interrupt::Interrupts;

/// Arguments of `forkd mcp`.
#[derive(Args, Debug)]
#[command(after_help = "\
Without --http it talks to one client over standard input and output. For example, in a client's configuration:
  { \"mcpServers\": { \"forkd\": { \"command\": \"forkd\", \"args\": [\"mcp\"] } } }")]
pub(crate) struct McpArgs {
    /// Serve streamable HTTP at this address, path /mcp, instead of standard input and output
    #[arg(long, value_name = "ADDRESS:PORT")]
    http: Option<SocketAddr>,
    /// Bearer token that HTTP clients must present; needed for other than loopback addresses
    #[arg(long, value_name = "TOKEN", env = FORKD_MCP_TOKEN, hide_env_values = true, requires = "http")]
    http_token: Option<String>,
}

impl McpArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        // First, so that a wrong address is told before a daemon is started.
        let server = match self.http {
            Some(address) => Some(
                HttpServer::bind(address, self.http_token)
                    .await
                    .advise(format!("forkd mcp --http 127.0.0.1:{}", address.port()))?,
            ),
            None => None,
        };
        let daemon = Arc::new(FoundDaemon(context.client().await?));
        let Some(server) = server else {
            // Standard output is the protocol's.
            stdio::serve(daemon).await.context("talking to the client on standard input and output failed")?;
            return Ok(0);
        };
        let mut interrupts = Interrupts::catch()?;
        context.progress.say(format_args!("==> http://{}{}", server.address(), http::PATH));
        let stop = CancellationToken::new();
        let _stopped = stop.clone().drop_guard();
        interrupts.guard(async { Ok(server.serve(daemon, stop).await.map(|()| 0)?) }).await
    }
}

/// The daemon as this program found it.
struct FoundDaemon(Client);

impl Daemon for FoundDaemon {
    fn call(&self, request: Request) -> Calling<'_> {
        Box::pin(self.send(request))
    }
}

impl FoundDaemon {
    async fn send(&self, request: Request) -> Result<Vec<u8>, CallError> {
        let Request { method, path, body, limit } = request;
        let body = match body {
            forkd_mcp::Body::Empty => RawBody::Empty,
            forkd_mcp::Body::Json(value) => RawBody::Json(value),
            forkd_mcp::Body::Bytes(bytes) => RawBody::Bytes(bytes),
        };
        // The whole chain in one line: a model sees nothing else.
        self.0
            .raw(method, &path, body, limit)
            .await
            .map_err(|error| CallError(format!("{:#}", anyhow::Error::from(error))))
    }
}
