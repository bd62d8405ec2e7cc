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
    process: Option<Owned>,
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
        source: &Arc<Control>,
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
        if let Some(group) = host.groups.helpers() {
            roles.push(Role::Cgroup);
            fds.push(group);
        }
        let limit = host.config.child_deadline;
        // In a task of its own: a writer that was asked for comes to be even if nobody waits any longer, and
        // must then be ended.
        let asking = tokio::spawn(Self::ask(Arc::clone(source), ours, roles, fds, contents));
        let gone = |how| MonitorError::Gone { name: source.name().to_owned(), how };
        match tokio::time::timeout(limit, asking).await {
            Ok(Ok(writer)) => writer,
            Ok(Err(error)) => Err(gone(format!("could not be asked ({error})"))),
            Err(_) => Err(gone(format!("did not answer within {} s", limit.as_secs()))),
        }
    }

    async fn ask(
        source: Arc<Control>,
        ours: tokio::net::UnixStream,
        roles: Vec<Role>,
        fds: Vec<OwnedFd>,
        contents: Contents,
    ) -> Result<Self, MonitorError> {
        let (control, written) = Control::expecting("snapshot writer", ours);
        let command = Command::Snapshot { fds: roles, contents };
        let event = source.request(&command, fds).wait().await?;
        let (pid, pause_us, stages) = expect_event!(source.name(), event, Forked { pid, pause_us, stages })?;
        Ok(Self { written, _control: control, process: Process::open(pid).ok().map(Owned), pause_us, stages })
    }

    /// Waits until everything is written. The error is why it was not; nothing writes any more then.
    pub(crate) async fn finish(self, host: &Host) -> Result<(SnapshotFacts, StageTimings), String> {
        self.finish_within(host.config.snapshot_deadline).await
    }

    async fn finish_within(self, limit: Duration) -> Result<(SnapshotFacts, StageTimings), String> {
        let Self { written, process, .. } = self;
        let outcome = match tokio::time::timeout(limit, written.wait()).await {
            Ok(event) => event.map_err(|error| error.to_string()),
            Err(_) => Err(format!("it was not written within {} s", limit.as_secs())),
        };
        let outcome = outcome.and_then(|event| {
            let facts = expect_event!("snapshot writer", event, Written { facts, stages });
            facts.map_err(|error| error.to_string())
        });
        if let (Err(_), Some(Owned(process))) = (&outcome, &process) {
            process.kill();
            process.exited().await;
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_proto::monitor::{self, Event};
    use std::os::unix::net::UnixStream as BlockingStream;
    use std::process::{Child, Command as Program};

    /// A monitor that forks "writers" which never end, and its side of the connection.
    fn source() -> (Arc<Control>, BlockingStream) {
        let (ours, theirs) = BlockingStream::pair().expect("socketpair");
        ours.set_nonblocking(true).expect("nonblocking");
        let stream = tokio::net::UnixStream::from_std(ours).expect("in a runtime");
        (Control::connected("source", stream), theirs)
    }

    fn writer() -> Child {
        Program::new("sleep").arg("600").spawn().expect("sleep")
    }

    /// Receives the request and says that `writer` was forked; returns the writer's connection.
    async fn answer(source: BlockingStream, writer: &Child) -> (BlockingStream, OwnedFd) {
        let event = Event::Forked { pid: writer.id() as i32, pause_us: 7, stages: StageTimings::default() };
        tokio::task::spawn_blocking(move || {
            let (_, mut fds) = monitor::receive::<Command>(&source).expect("a request");
            monitor::send(&source, &event, &[]).expect("send");
            (source, fds.remove(0))
        })
        .await
        .expect("no panic")
    }

    async fn asked(control: &Arc<Control>) -> Result<SnapshotWriter, MonitorError> {
        let (ours, theirs) = socket_pair().expect("socketpair");
        SnapshotWriter::ask(Arc::clone(control), ours, vec![Role::Control], vec![theirs], Contents::Whole).await
    }

    async fn ended_by_a_signal(mut writer: Child) -> bool {
        tokio::task::spawn_blocking(move || writer.wait()).await.expect("no panic").expect("wait").code().is_none()
    }

    #[tokio::test]
    async fn a_writer_that_nobody_waits_for_any_more_is_ended_when_it_comes_to_be() {
        let (control, monitor) = source();
        let writer = writer();
        let asking = tokio::spawn(async move { asked(&control).await.map(drop) });
        tokio::task::yield_now().await;
        drop(asking);
        let _held = answer(monitor, &writer).await;
        assert!(ended_by_a_signal(writer).await);
    }

    #[tokio::test]
    async fn a_writer_that_fails_has_ended_when_that_is_said() {
        let (control, monitor) = source();
        let (writer, limit) = (writer(), Duration::from_secs(60));
        let (asked, (_monitor, connection)) = tokio::join!(asked(&control), answer(monitor, &writer));
        let said = Event::Failed { error: "cannot write memory.layer".to_owned() };
        monitor::send(&connection, &said, &[]).expect("send");
        let error = asked.expect("forked").finish_within(limit).await.expect_err("it failed");
        assert_eq!(error, "cannot write memory.layer");
        assert!(Process::open(writer.id() as i32).is_err(), "it still runs");
        assert!(ended_by_a_signal(writer).await);
    }

    #[tokio::test]
    async fn a_writer_that_is_silent_for_too_long_is_ended() {
        let (control, monitor) = source();
        let writer = writer();
        let (asked, _held) = tokio::join!(asked(&control), answer(monitor, &writer));
        let error = asked.expect("forked").finish_within(Duration::ZERO).await.expect_err("silent");
        assert_eq!(error, "it was not written within 0 s");
        assert!(ended_by_a_signal(writer).await);
    }
}
