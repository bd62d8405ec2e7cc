//! Whether sandboxes have networks, and how this node gets them.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use forkd_net::{Cidr, Lease, Networks, NetworksConfig, Tenant};

use crate::config::NodeConfig;
use crate::error::{NodeError, NodeResult};
use crate::process::Process;

/// Whether sandboxes have networks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum NetworkMode {
    /// They have none.
    #[default]
    Off,
    /// They have one if this host can make it; the log says so once if not.
    Auto,
    /// They have one, and a host that cannot make it is no host for a node.
    Required,
}

/// What networks there are to be.
#[derive(Clone, Copy, Debug)]
pub struct NetworkSettings {
    /// Whether there are any.
    pub mode: NetworkMode,
    /// How many are made ahead.
    pub ready: usize,
    /// The range of the addresses between this host and its networks; a free one unless given.
    pub range: Option<Cidr>,
}

impl Default for NetworkSettings {
    fn default() -> Self {
        Self { mode: NetworkMode::Off, ready: 8, range: None }
    }
}

/// The networks of this node; none where there are to be or can be none. Blocks.
pub(crate) fn open(config: &NodeConfig) -> NodeResult<Option<Networks>> {
    let NetworkSettings { mode, ready, range } = config.network;
    if mode == NetworkMode::Off {
        return Ok(None);
    }
    match Networks::start(&NetworksConfig { ready, range, ..NetworksConfig::new(&config.state_dir) }) {
        Ok(networks) => Ok(Some(networks)),
        Err(error) if mode == NetworkMode::Required => {
            Err(NodeError::io("set up networks, which --network required asks for")(io::Error::other(error)))
        }
        Err(error) => {
            tracing::warn!(%error, "sandboxes have no network; forkd doctor tells what this host lacks");
            Ok(None)
        }
    }
}

/// A machine's network, and the processes that have been given its tap.
#[derive(Clone, Debug)]
pub(crate) struct Network(Arc<Lease>);

impl Network {
    /// Leases one for sandbox `name`; `shown` says whether clients are told its namespace.
    pub(crate) async fn lease(networks: &Networks, name: &str, shown: bool) -> Result<Self, String> {
        let leased = networks.lease(Tenant { name: name.to_owned(), shown }).await;
        leased.map(Arc::new).map(Self).map_err(|error| format!("it has no network: {error}"))
    }

    /// The one that an earlier daemon leased for sandbox `name`, whose monitor is `process`.
    pub(crate) fn adopt(networks: &Networks, name: &str, process: &Process) -> Option<Self> {
        networks.adopt(name, process.key().pid, process.pidfd()).map(Arc::new).map(Self)
    }

    /// Another descriptor of its tap, for one process; [`used_by`](Self::used_by) tells which, once there is one.
    pub(crate) fn tap(&self) -> io::Result<OwnedFd> {
        self.0.tap()
    }

    /// The name of its namespace, if clients are told.
    pub(crate) fn shown_name(&self) -> Option<String> {
        self.0.tenant().shown.then(|| self.0.netns())
    }

    /// Whether clients are told the name of its namespace.
    pub(crate) fn is_shown(&self) -> bool {
        self.0.tenant().shown
    }

    /// Notes that `process` has the tap that was given away last.
    pub(crate) fn used_by(&self, process: &Process) {
        if let Err(error) = self.0.used_by(process.pidfd()) {
            // Without this note the slot is removed instead of used again, which is right too.
            tracing::warn!(netns = self.0.netns(), %error, "cannot note who uses a network");
        }
    }
}
