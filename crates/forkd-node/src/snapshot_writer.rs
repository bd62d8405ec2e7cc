//! The process that writes a snapshot's files: forked from a monitor, into a staged directory.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use forkd_proto::monitor::{Command, Contents, Role, SnapshotFacts};
use forkd_store::StagedSnapshot;
use forkd_types::StageTimings;

use crate::control::{Answer, Control, MonitorError, expect_event};
use crate::host::Host;
use crate::launch::{Owned, socket_pair};
use crate::process::Process;

/// A writer at work; it is ended when this is dropped.
pub(crate) struct SnapshotWriter {
    written: Answer,
    /// Kept for the answer.
    _control: Arc<Control>,
    /// None when it is done already, and has nothing left to end.
    _process: Option<Owned>,
    /// How long the source stood still.
    pub(crate) pause_us: u64,
    /// Where that time went.
    pub(crate) stages: StageTimings,
}

impl SnapshotWriter {
    /// Forks a writer from the machine behind `source`, which runs on when this returns, also with an error.
    /// `disks` is how many disks that machine writes to: none for one that holds still.
    pub(crate) async fn fork(
        host: &Host,
        source: &Control,
        disks: usize,
        staged: &StagedSnapshot,
        contents: Contents,
    ) -> Result<Self, MonitorError> {
        let here = |what: &str| {
            let what = what.to_owned();
            move |error: std::io::Error| MonitorError::Send {
                name: source.name().to_owned(),
                error: format!("cannot {what}: {error}"),
            }
        };
        let (ours, theirs) = socket_pair().map_err(here("make a control socket"))?;
        let directory = staged.dir().try_clone_to_owned().map_err(here("hand over the staged directory"))?;
        let (mut roles, mut fds) = (vec![Role::Control, Role::SnapshotDir], vec![theirs, directory]);
        for _ in 0..disks {
            roles.push(Role::DiskOverlay);
            fds.push(host.files.overlay().map_err(here("create a scratch file for a disk"))?);
        }
        Self::ask(source, ours, roles, fds, contents, host.config.child_deadline).await
    }

    async fn ask(
        source: &Control,
        ours: tokio::net::UnixStream,
        roles: Vec<Role>,
        fds: Vec<OwnedFd>,
        contents: Contents,
        limit: Duration,
    ) -> Result<Self, MonitorError> {
        let (control, written) = Control::expecting("snapshot writer", ours);
        let command = Command::Snapshot { fds: roles, contents };
        let event = match tokio::time::timeout(limit, source.request(&command, fds).wait()).await {
            Ok(event) => event?,
            Err(_) => {
                let how = format!("did not answer within {} s", limit.as_secs());
                return Err(MonitorError::Gone { name: source.name().to_owned(), how });
            }
        };
        let (pid, pause_us, stages) = expect_event!(source.name(), event, Forked { pid, pause_us, stages })?;
        Ok(Self { written, _control: control, _process: Process::open(pid).ok().map(Owned), pause_us, stages })
    }

    /// Waits until everything is written. The error is why it was not.
    pub(crate) async fn finish(self, host: &Host) -> Result<(SnapshotFacts, StageTimings), String> {
        let limit = host.config.snapshot_deadline;
        let event = match tokio::time::timeout(limit, self.written.wait()).await {
            Ok(event) => event.map_err(|error| error.to_string())?,
            Err(_) => return Err(format!("it was not written within {} s", limit.as_secs())),
        };
        expect_event!("snapshot writer", event, Written { facts, stages }).map_err(|error| error.to_string())
    }
}
