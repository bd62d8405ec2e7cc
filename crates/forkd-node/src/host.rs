//! What every part of the node uses: settings, files, the database, the store.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use forkd_net::Networks;
use forkd_store::{CpuFacts, Store};
use rustix::fs::{Mode, OFlags};

use crate::admission::Admission;
use crate::allotment::Groups;
use crate::config::NodeConfig;
use crate::database::Database;
use crate::error::{NodeError, NodeResult};
use crate::events::Events;
use crate::run_files::RunFiles;

/// The node's means.
pub(crate) struct Host {
    pub(crate) config: NodeConfig,
    pub(crate) store: Store,
    pub(crate) database: Database,
    pub(crate) files: RunFiles,
    pub(crate) groups: Groups,
    pub(crate) admission: Admission,
    pub(crate) networks: Option<Networks>,
    pub(crate) cpu: CpuFacts,
    pub(crate) events: Events,
}

impl Host {
    /// The KVM device, opened anew.
    pub(crate) fn open_kvm(&self) -> NodeResult<OwnedFd> {
        let path = &self.config.kvm;
        rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(|source| NodeError::Kvm { path: path.clone(), source: source.into() })
    }
}

/// The run files of a monitor that is not a sandbox; they go when this is dropped.
pub(crate) struct Traces {
    host: Arc<Host>,
    name: String,
}

impl Traces {
    /// Takes charge of the files of monitor `name`, clearing what an earlier one of the name left.
    pub(crate) fn of(host: &Arc<Host>, name: String) -> Self {
        host.files.remove(&name, false);
        Self { host: Arc::clone(host), name }
    }

    /// The monitor's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        self.host.files.remove(&self.name, false);
        self.host.files.remove_log(&self.name);
    }
}

/// Seconds since the Unix epoch.
pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Runs blocking work, file system calls on the store for example, on a thread for that.
pub(crate) async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> NodeResult<T> {
    tokio::task::spawn_blocking(work).await.map_err(|_| NodeError::Interrupted { what })
}
