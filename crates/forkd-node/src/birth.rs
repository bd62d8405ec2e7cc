//! One child: forked from what holds still, and followed until its agent has answered.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forkd_proto::monitor::{Command, Role};
use forkd_types::rest::SandboxLimits;
use forkd_types::{ByteSize, SandboxId, StageTimings};

use crate::admission::Promise;
use crate::allotment::Allotment;
use crate::console;
use crate::control::{Answer, Control, expect_event};
use crate::error::{NodeError, NodeResult, with_causes};
use crate::frozen::Frozen;
use crate::guest::{Guest, fresh_identity};
use crate::host::Host;
use crate::launch::socket_pair;
use crate::networks::Network;
use crate::process::Process;
use crate::sandbox::{Newborn, Running};
use crate::zygotes::Zygote;

/// Why a child did not come up, for its place in a report.
pub(crate) type Reason = String;

/// What children are forked from. It holds still, and lives while it is held here.
#[derive(Clone)]
pub(crate) enum Parent {
    /// A snapshot.
    Zygote(Arc<Zygote>),
    /// A copy of a running machine.
    Frozen(Arc<Frozen>),
}

impl Parent {
    fn control(&self) -> &Control {
        match self {
            Self::Zygote(zygote) => &zygote.control,
            Self::Frozen(frozen) => &frozen.control,
        }
    }

    /// A network for a child called `name`, if there are networks and its machine has an interface.
    pub(crate) async fn network(&self, host: &Host, name: &str, shown: bool) -> Result<Option<Network>, Reason> {
        let plugs = match self {
            Self::Zygote(zygote) => zygote.network,
            Self::Frozen(frozen) => frozen.network,
        };
        match &host.networks {
            Some(networks) if plugs => Network::lease(networks, name, shown).await.map(Some),
            _ => Ok(None),
        }
    }

    /// How many disks a child needs overlays for.
    pub(crate) fn disks(&self) -> usize {
        match self {
            Self::Zygote(zygote) => zygote.disks,
            Self::Frozen(frozen) => frozen.disks,
        }
    }
}

/// Measures consecutive stages.
pub(crate) struct Stopwatch<'a> {
    stages: &'a mut StageTimings,
    since: Instant,
}

impl<'a> Stopwatch<'a> {
    pub(crate) fn start(stages: &'a mut StageTimings) -> Self {
        Self { stages, since: Instant::now() }
    }

    pub(crate) fn lap(&mut self, stage: &str) {
        let now = Instant::now();
        self.stages.record(stage, now - self.since);
        self.since = now;
    }

    /// Takes in a monitor's own account of a stage that lies within one of ours.
    fn detail(&mut self, within: &str, account: &StageTimings) {
        for stage in &account.0 {
            self.stages.record(&format!("{within}.{}", stage.name), Duration::from_micros(stage.us));
        }
    }
}

/// Forks one child and waits until its agent has answered.
pub(crate) async fn bring_up(
    host: &Arc<Host>,
    parent: &Parent,
    mut newborn: Newborn,
    limits: &SandboxLimits,
    promise: Option<Promise>,
    shows_netns: bool,
    stages: &mut StageTimings,
) -> Result<Newborn, Reason> {
    let mut watch = Stopwatch::start(stages);
    let id = newborn.id().clone();
    let network = parent.network(host, id.as_str(), shows_netns).await?;
    watch.lap("network");
    let allotment = Allotment::make(&host.groups, id.as_str(), limits, promise);
    let parts = allotment.and_then(|allotment| Parts::make(host, id.as_str(), parent.disks(), allotment, network));
    let parts = parts.map_err(|error| with_causes(&error))?;
    watch.lap("prepare");
    // In a task of its own, which ends only when the new process is known and owned: a fork that
    // was asked for happens even if nobody waits for it any longer.
    let (forking, name) = (parent.clone(), id.to_string());
    let forking = tokio::spawn(async move {
        let forked = fork(forking, &name, parts).await?;
        let control = Arc::clone(&forked.control);
        let Forked { process, allotment, network, .. } = forked;
        newborn.born(Running { control, process, allotment, network });
        Ok::<_, Reason>((newborn, forked.control, forked.running, forked.stages))
    });
    let (newborn, control, running, forked) =
        forking.await.map_err(|error| format!("the fork was interrupted: {error}"))??;
    watch.lap("fork");
    watch.detail("fork", &forked);
    match control.while_running(rise(host, id.as_str(), &id, running, &mut watch)).await {
        Ok(()) => Ok(newborn),
        Err(reason) => Err(out_of_memory(&newborn).await.unwrap_or(reason)),
    }
}

/// Whether a child that did not come up was ended for want of memory, which is the better explanation.
async fn out_of_memory(newborn: &Newborn) -> Option<Reason> {
    let running = newborn.running()?;
    // The end of the connection is seen before that of the process.
    let _ = tokio::time::timeout(Duration::from_millis(500), running.process.exited()).await;
    Some(running.allotment.out_of_memory()?.reason)
}

/// From the fork until the agent behind the run files of `name` has answered and is sandbox `id`.
pub(crate) async fn rise(
    host: &Host,
    name: &str,
    id: &SandboxId,
    running: Answer,
    watch: &mut Stopwatch<'_>,
) -> Result<(), Reason> {
    let restored = running.wait().await.map_err(|error| error.to_string())?;
    let restored = expect_event!(id, restored, Running { stages }).map_err(|error| error.to_string())?;
    watch.lap("restore");
    watch.detail("restore", &restored);
    let guest = Guest::behind(host.files.vsock(name));
    let connection = guest.connect_patiently().await.map_err(|error| error.to_string())?;
    watch.lap("connect");
    let identity = fresh_identity(id).map_err(|error| format!("cannot make its identity: {error}"))?;
    let warnings = guest.identify(connection, &identity).await.map_err(|error| error.to_string())?;
    watch.lap("identify");
    if !warnings.is_empty() {
        tracing::warn!(sandbox = %id, ?warnings, "the copy could not take on all of its identity");
    }
    Ok(())
}

/// What a child is given.
pub(crate) struct Parts {
    roles: Vec<Role>,
    fds: Vec<OwnedFd>,
    control: tokio::net::UnixStream,
    allotment: Allotment,
    network: Option<Network>,
}

impl Parts {
    /// Makes the run files of `name` and what else a child with `disks` disks needs.
    pub(crate) fn make(
        host: &Host,
        name: &str,
        disks: usize,
        allotment: Allotment,
        network: Option<Network>,
    ) -> NodeResult<Self> {
        let files = &host.files;
        let (control, theirs) = socket_pair().map_err(NodeError::io("make a control socket"))?;
        let mut roles = vec![Role::Control];
        let mut fds = vec![theirs];
        for (role, path) in [(Role::ControlListener, files.control(name)), (Role::VsockListener, files.vsock(name))] {
            roles.push(role);
            fds.push(files.listen(&path).map_err(NodeError::io(format!("listen on {}", path.display())))?);
        }
        let path = files.console(name);
        let console = console::create(&path).map_err(NodeError::io(format!("create {}", path.display())))?;
        roles.push(Role::Console);
        fds.push(console.into());
        for _ in 0..disks {
            roles.push(Role::DiskOverlay);
            fds.push(files.overlay().map_err(NodeError::io("create a scratch file for a disk"))?);
        }
        if let Some(group) = allotment.descriptor()? {
            roles.push(Role::Cgroup);
            fds.push(group);
        }
        if let Some(network) = &network {
            roles.push(Role::Tap);
            fds.push(network.tap().map_err(NodeError::io("plug in a network"))?);
        }
        Ok(Self { roles, fds, control, allotment, network })
    }
}

/// A child that exists as a process, which is its new owner's to end.
pub(crate) struct Forked {
    pub(crate) control: Arc<Control>,
    pub(crate) process: Process,
    pub(crate) allotment: Allotment,
    pub(crate) network: Option<Network>,
    /// Says when it runs.
    pub(crate) running: Answer,
    pub(crate) stages: StageTimings,
}

/// Forks a child called `name`. To be run to its end: a fork that was asked for happens.
pub(crate) async fn fork(parent: Parent, name: &str, parts: Parts) -> Result<Forked, Reason> {
    let (control, running) = Control::expecting(name, parts.control);
    let disk_bytes = parts.allotment.disk().map(ByteSize::bytes);
    let Parts { roles, fds, allotment, network, .. } = parts;
    let command = Command::Fork { fds: roles, name: name.to_owned(), disk_bytes };
    let event = parent.control().request(&command, fds).wait().await.map_err(|error| error.to_string())?;
    let (pid, _pause_us, stages) =
        expect_event!(name, event, Forked { pid, pause_us, stages }).map_err(|error| error.to_string())?;
    match Process::open(pid) {
        Ok(process) => {
            if let Some(network) = &network {
                network.used_by(&process);
            }
            Ok(Forked { control, process, allotment, network, running, stages })
        }
        Err(error) => {
            // It ended already; what it said before that is the better explanation.
            let ended = tokio::time::timeout(Duration::from_secs(1), running.wait()).await;
            Err(match ended {
                Ok(Err(said)) => said.to_string(),
                _ => format!("its monitor, process {pid}, cannot be watched: {error}"),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn laps_add_up_and_details_keep_their_place() {
        let mut stages = StageTimings::default();
        let mut watch = Stopwatch::start(&mut stages);
        watch.lap("fork");
        let mut inner = StageTimings::default();
        inner.record("vm", Duration::from_micros(150));
        watch.detail("fork", &inner);
        watch.lap("restore");
        let names: Vec<_> = stages.0.iter().map(|stage| stage.name.as_str()).collect();
        assert_eq!(names, ["fork", "fork.vm", "restore"]);
        assert_eq!(stages.get("fork.vm"), Some(Duration::from_micros(150)));
    }
}
