//! Copies of running machines that hold still.
//!
//! A frozen copy is the machine of one instant, kept in memory by the kernel's copy-on-write. Any number
//! of copies can be forked from it, and it can be written out, while its source runs on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use forkd_proto::monitor::{Command, Role};
use forkd_types::StageTimings;

use crate::control::{Control, expect_event};
use crate::error::{NodeError, NodeResult};
use crate::host::Host;
use crate::launch::{Owned, socket_pair};
use crate::process::{Process, ProcessKey};
use crate::sandbox::Sandbox;

/// A frozen copy; it ends when this is dropped.
pub(crate) struct Frozen {
    host: Arc<Host>,
    key: ProcessKey,
    _process: Owned,
    /// Where to send forks.
    pub(crate) control: Arc<Control>,
    /// How many disks a child needs overlays for.
    pub(crate) disks: usize,
    /// How long the source stood still.
    pub(crate) pause_us: u64,
    /// Where that time went.
    pub(crate) stages: StageTimings,
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.host.database.forget_helper(self.key);
    }
}

impl Frozen {
    /// Freezes a copy of `sandbox` as it is now. The sandbox runs on, also when this fails.
    pub(crate) async fn of(host: &Arc<Host>, sandbox: &Sandbox) -> NodeResult<Self> {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let name = format!("{}-frozen-{}", sandbox.id, SERIAL.fetch_add(1, Ordering::Relaxed));
        let source = sandbox.running()?;
        let disks = sandbox.origin.disks;
        let (ours, theirs) = socket_pair().map_err(NodeError::io("make a control socket"))?;
        let (mut roles, mut fds) = (vec![Role::Control], vec![theirs]);
        for _ in 0..disks {
            roles.push(Role::DiskOverlay);
            fds.push(host.files.overlay().map_err(NodeError::io("create a scratch file for a disk"))?);
        }
        let failed = |source| NodeError::Monitor { what: "freeze a copy", id: sandbox.id.clone(), source };
        let limit = host.config.child_deadline;
        let (host, id) = (Arc::clone(host), sandbox.id.clone());
        // In a task of its own: a copy that was asked for comes to be even if nobody waits any longer, and
        // must then be ended.
        let freezing = tokio::spawn(async move {
            let (control, ready) = Control::expecting(&name, ours);
            let command = Command::Freeze { fds: roles, name: name.clone() };
            let event = source.control.request(&command, fds).wait().await?;
            let (pid, pause_us, stages) = expect_event!(id, event, Forked { pid, pause_us, stages })?;
            let Ok(process) = Process::open(pid) else {
                return Err(match ready.wait().await {
                    Err(said) => said,
                    Ok(_) => crate::MonitorError::Gone { name, how: "ended at once".to_owned() },
                });
            };
            let key = process.key();
            host.database.note_helper(key, name.clone());
            let frozen = Self { host, key, _process: Owned(process), control, disks, pause_us, stages };
            let event = ready.wait().await?;
            expect_event!(name, event, Ready { vcpus })?;
            Ok(frozen)
        });
        match tokio::time::timeout(limit, freezing).await {
            Ok(Ok(frozen)) => frozen.map_err(failed),
            Ok(Err(_)) => Err(NodeError::Interrupted { what: "freezing a copy" }),
            Err(_) => {
                let how = format!("did not answer within {} s", limit.as_secs());
                Err(failed(crate::MonitorError::Gone { name: sandbox.id.to_string(), how }))
            }
        }
    }
}
