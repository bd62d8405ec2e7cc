//! The server on standard input and output, as clients start it.

use std::pin::Pin;
use std::sync::Arc;

use rmcp::ServiceExt;
use rmcp::transport::stdio_pipes;

use crate::{Daemon, Server};

/// Why serving ended badly.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// The client did not open the session as the protocol has it.
    #[error("the client on standard input did not open a session")]
    Opening(#[from] Box<rmcp::service::ServerInitializeError>),
    /// The session's task broke.
    #[error("the session broke off")]
    Session(#[from] tokio::task::JoinError),
}

/// Serves one client until it closes standard input.
///
/// Boxed, so that it is compiled here and not again with every program that serves.
pub fn serve(daemon: Arc<dyn Daemon>) -> Pin<Box<dyn Future<Output = Result<(), StdioError>> + Send>> {
    Box::pin(serve_client(daemon))
}

async fn serve_client(daemon: Arc<dyn Daemon>) -> Result<(), StdioError> {
    let session = match Server::new(daemon).serve(stdio_pipes()).await {
        Ok(session) => session,
        // A client that goes away without a word wanted nothing.
        Err(rmcp::service::ServerInitializeError::ConnectionClosed(_)) => return Ok(()),
        Err(error) => return Err(Box::new(error).into()),
    };
    session.waiting().await?;
    Ok(())
}
