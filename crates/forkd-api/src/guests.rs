//! Connections to the agents in guests, for the routes that speak with them.

use forkd_node::{GuestConnection, GuestError, InUse};
use forkd_types::SandboxId;

use crate::error::{ApiError, ApiResult};
use crate::router::Api;

impl Api {
    /// Fails unless there is such a sandbox.
    pub(crate) fn check_sandbox(&self, id: &SandboxId) -> ApiResult<()> {
        #[cfg(test)]
        if self.stand_in.is_some() {
            return Ok(());
        }
        self.node.sandbox(id)?;
        Ok(())
    }

    /// A fresh connection to the agent of a sandbox; `to_exec` says that something is going to be run.
    pub(crate) async fn agent(&self, id: &SandboxId, to_exec: bool) -> ApiResult<GuestConnection> {
        #[cfg(test)]
        if let Some(agent) = &self.stand_in {
            return Ok(agent.connect());
        }
        Ok(self.node.agent(id, to_exec).await?)
    }

    /// Keeps a sandbox from counting as idle while it is held.
    pub(crate) fn in_use(&self, id: &SandboxId) -> ApiResult<Option<InUse>> {
        #[cfg(test)]
        if self.stand_in.is_some() {
            return Ok(None);
        }
        Ok(Some(self.node.in_use(id)?))
    }

    /// The error for a request of ours, `what`, that the agent of a sandbox did not carry out.
    pub(crate) async fn guest_error(&self, id: &SandboxId, what: &'static str, error: GuestError) -> ApiError {
        #[cfg(test)]
        if self.stand_in.is_some() {
            return forkd_node::NodeError::Guest { what, id: id.clone(), source: error }.into();
        }
        self.node.explain(id, what, error).await.into()
    }
}

/// The real agent in this process instead of one in a guest, for tests where no guest can run.
#[cfg(test)]
pub(crate) mod stand_in {
    use std::os::unix::net::UnixStream;
    use std::sync::{Arc, OnceLock};

    use forkd_agent::agent::{Agent, Role};
    use forkd_agent::connection::Connection;
    use forkd_node::GuestConnection;

    /// An agent; it serves as long as the process lives.
    #[derive(Clone)]
    pub(crate) struct StandIn(Arc<Agent>);

    impl StandIn {
        /// The agent of all tests: it waits for every child of the process, so there can be but one.
        pub(crate) fn shared() -> Self {
            static AGENT: OnceLock<Arc<Agent>> = OnceLock::new();
            Self(Arc::clone(AGENT.get_or_init(|| Agent::start(Role::Program).expect("the agent starts"))))
        }

        pub(crate) fn connect(&self) -> GuestConnection {
            let (near, far) = UnixStream::pair().expect("a socket pair");
            near.set_nonblocking(true).expect("a socket knows this");
            let agent = Arc::clone(&self.0);
            std::thread::spawn(move || forkd_agent::requests::serve(&agent, Connection::new(far.into()), None));
            GuestConnection::over(tokio::net::UnixStream::from_std(near).expect("within a runtime"))
        }
    }
}
