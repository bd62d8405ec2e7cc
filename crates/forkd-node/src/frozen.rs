//! Copies of running machines that hold still.
//!
//! A frozen copy is the machine of one instant, kept in memory by the kernel's copy-on-write. Any number
//! of copies can be forked from it, and it can be written out, while its source runs on.
//!
//! Most serve one request. One that is a checkpoint outlives the daemon, like a sandbox, and is found again by
//! the next at its listening socket.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use forkd_proto::monitor::{Command, Role};
use forkd_types::StageTimings;

use crate::control::{Control, expect_event};
use crate::error::{NodeError, NodeResult};
use crate::host::{Host, unix_now};
use crate::launch::socket_pair;
use crate::process::{Process, ProcessKey};
use crate::sandbox::Sandbox;

/// How long a frozen copy lives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Lifetime {
    /// Until nobody in this process holds it any more.
    Daemon,
    /// Until [`Frozen::end`].
    Checkpoint,
}

/// A frozen copy.
pub(crate) struct Frozen {
    host: Arc<Host>,
    name: String,
    process: Process,
    /// Whether it ends when this is dropped.
    ends: AtomicBool,
    /// Where to send forks.
    pub(crate) control: Arc<Control>,
    /// How many disks a child needs overlays for.
    pub(crate) disks: usize,
    /// Whether its machine has a network interface.
    pub(crate) network: bool,
    /// How long the source stood still.
    pub(crate) pause_us: u64,
    /// Where that time went.
    pub(crate) stages: StageTimings,
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if *self.ends.get_mut() {
            self.process.kill();
            self.host.database.forget_helper(self.process.key());
            self.host.files.remove(&self.name, false);
        }
    }
}

impl Frozen {
    /// One that an earlier daemon made, found at the other end of `control`.
    pub(crate) fn adopted(host: &Arc<Host>, found: (Arc<Control>, Process), name: String, about: (usize, u64)) -> Self {
        let (control, process) = found;
        let (disks, pause_us) = about;
        let (ends, stages) = (AtomicBool::new(false), StageTimings::default());
        // It does not say any more; one that has none ignores the tap.
        let (host, network) = (Arc::clone(host), true);
        Self { host, name, process, ends, control, disks, network, pause_us, stages }
    }

    /// Its process.
    pub(crate) fn key(&self) -> ProcessKey {
        self.process.key()
    }

    /// The name of its run files.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Lets it end as soon as nobody forks from it any more.
    pub(crate) fn end(&self) {
        self.ends.store(true, Ordering::Relaxed);
    }

    /// Lets it outlive this process.
    fn keep(&self) {
        self.ends.store(false, Ordering::Relaxed);
    }

    /// Freezes a copy of `sandbox` as it is now. The sandbox runs on, also when this fails.
    pub(crate) async fn of(host: &Arc<Host>, sandbox: &Sandbox, lifetime: Lifetime) -> NodeResult<Self> {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        // Unlike those that an earlier daemon gave.
        let name = format!("frozen-{:08x}-{:x}", unix_now(), SERIAL.fetch_add(1, Ordering::Relaxed));
        let source = sandbox.running()?;
        let disks = sandbox.origin.disks;
        let (ours, theirs) = socket_pair().map_err(NodeError::io("make a control socket"))?;
        let (mut roles, mut fds) = (vec![Role::Control], vec![theirs]);
        for _ in 0..disks {
            roles.push(Role::DiskOverlay);
            fds.push(host.files.overlay().map_err(NodeError::io("create a scratch file for a disk"))?);
        }
        if let Some(group) = host.groups.helpers() {
            roles.push(Role::Cgroup);
            fds.push(group);
        }
        if lifetime == Lifetime::Checkpoint {
            let path = host.files.control(&name);
            roles.push(Role::ControlListener);
            fds.push(host.files.listen(&path).map_err(NodeError::io(format!("listen on {}", path.display())))?);
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
            host.database.note_helper(process.key(), name.clone());
            let ends = AtomicBool::new(true);
            let mut frozen = Self { host, name, process, ends, control, disks, network: false, pause_us, stages };
            let event = ready.wait().await?;
            frozen.network = expect_event!(frozen.name, event, Ready { network })?;
            if lifetime == Lifetime::Checkpoint {
                frozen.keep();
            }
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
