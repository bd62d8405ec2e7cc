//! Finding running sandboxes again after a restart, and clearing what else was left.
//!
//! A recorded sandbox is adopted when its process is the recorded one (pid and start time), its
//! control socket answers, and the kernel says that the answer came from that very process. What
//! cannot be adopted is ended: a monitor that nobody can reach is only a leak.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use forkd_proto::monitor::Command;
use tokio::net::UnixStream;
use tokio::sync::Semaphore;

use crate::checkpoints::Checkpoints;
use crate::control::{Control, MonitorError};
use crate::database::{Record, RecordState};
use crate::error::{NodeError, NodeResult};
use crate::host::{Host, unix_now};
use crate::lifecycle::End;
use crate::limits;
use crate::networks::Network;
use crate::process::Process;
use crate::sandbox::{About, Roster, Running, Sandbox, clear};

/// How long a monitor may take to answer on its control socket. Generous, because one that is taken
/// for lost is ended.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(60);

/// How many monitors are asked at the same time, so that on a slow host the last one is not late
/// only because all were asked at once.
const ASKED_AT_ONCE: usize = 16;

/// Restores the roster and its checkpoints from the database and clears what an earlier daemon left.
pub(crate) async fn adopt_all(host: &Arc<Host>, roster: &Arc<Roster>, checkpoints: &Checkpoints) -> NodeResult<()> {
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_err(NodeError::io("read /proc/sys/kernel/random/boot_id"))?;
    let rebooted = host.database.host_rebooted(boot_id.trim().to_owned()).await?;
    end_helpers(host, rebooted).await?;
    let records = host.database.sandboxes().await?;
    let turns = Arc::new(Semaphore::new(ASKED_AT_ONCE));
    let mut adopting = tokio::task::JoinSet::new();
    for record in records {
        let (host, roster, turns) = (Arc::clone(host), Arc::clone(roster), Arc::clone(&turns));
        adopting.spawn(async move {
            let _turn = turns.acquire_owned().await.expect("the semaphore is never closed");
            adopt(&host, &roster, record, rebooted).await;
        });
    }
    adopting.join_all().await;
    let mut known: HashSet<String> = roster.all().iter().map(|sandbox| sandbox.id.to_string()).collect();
    known.extend(checkpoints.adopt_all(rebooted).await?);
    host.files.sweep(|name, _| known.contains(name)).map_err(NodeError::io("sweep the run directory"))?;
    host.groups.sweep();
    if let Some(networks) = &host.networks {
        networks.sweep();
    }
    host.database.settle().await?;
    Ok(())
}

/// Zygotes and boots of an earlier daemon serve nobody.
async fn end_helpers(host: &Host, rebooted: bool) -> NodeResult<()> {
    for (key, name) in host.database.helpers().await? {
        if !rebooted && let Ok(process) = Process::find(key) {
            tracing::info!(name, pid = key.pid, "ending a monitor that an earlier daemon left");
            process.kill();
        }
        host.database.forget_helper(key);
    }
    Ok(())
}

async fn adopt(host: &Arc<Host>, roster: &Arc<Roster>, record: Record, rebooted: bool) {
    let about = About {
        id: record.id.clone(),
        origin: record.origin.clone(),
        branches: record.branches.clone(),
        expiry: record.expiry,
    };
    match &record.state {
        RecordState::Stopped { end, at_unix } => {
            roster.insert(Sandbox::stopped(host, about, end.clone(), *at_unix));
        }
        RecordState::Starting => end_unfinished(host, &record, rebooted).await,
        RecordState::Running => {
            let found = if rebooted {
                Err("ended with the host's previous boot".to_owned())
            } else {
                find(host, &record).await
            };
            match found {
                Ok(running) => {
                    tracing::info!(sandbox = %record.id, pid = running.process.key().pid, "adopted");
                    roster.adopt(about, running);
                }
                Err(reason) => {
                    let end = host.groups.out_of_memory(record.id.as_str(), &record.origin.limits);
                    let end = end.unwrap_or_else(|| End::lost(reason));
                    tracing::warn!(sandbox = %record.id, reason = end.reason, "not adopted");
                    let now = unix_now();
                    host.database.stopped(record.id.clone(), end.clone(), now);
                    host.files.remove(record.id.as_str(), true);
                    roster.insert(Sandbox::stopped(host, about, end, now));
                }
            }
        }
    }
}

/// The running sandbox of `record`, or how it ended.
async fn find(host: &Host, record: &Record) -> Result<Running, String> {
    let key = record.process.ok_or("was recorded without its process")?;
    let process = Process::find(key).map_err(|_| "ended while no daemon was running".to_owned())?;
    // The daemon may have died while it put the sandbox on disk, which it did not get done.
    process.let_go();
    match shake_hands(host, record.id.as_str(), key.pid).await {
        Ok(control) => {
            let limits = record.origin.limits;
            let promise = host.admission.promise(limits::memory(&limits));
            let allotment = host.groups.adopted(key.pid, limits, promise);
            let id = record.id.as_str();
            let network = host.networks.as_ref().and_then(|networks| Network::adopt(networks, id, &process));
            Ok(Running { control, process, allotment, network })
        }
        Err(reason) => {
            process.kill();
            Err(format!("was ended because a restarted daemon could not reach its monitor: {reason}"))
        }
    }
}

/// Connects to the monitor called `name` and makes sure that it is process `pid`.
pub(crate) async fn shake_hands(host: &Host, name: &str, pid: i32) -> Result<Arc<Control>, String> {
    let (control, sender) = reach(host, name).await?;
    if sender != Some(pid) {
        return Err(format!("its control socket is answered by process {sender:?} instead of {pid}"));
    }
    Ok(control)
}

/// Connects to the monitor called `name`; tells which process answers.
async fn reach(host: &Host, name: &str) -> Result<(Arc<Control>, Option<i32>), String> {
    let path = host.files.control(name);
    let shaking = async {
        let stream = UnixStream::connect(&path).await.map_err(|error| format!("{}: {error}", path.display()))?;
        // The credentials of a listening socket's peer are those of the daemon that made it; those of
        // a message are its sender's.
        rustix::net::sockopt::set_socket_passcred(&stream, true).map_err(|error| error.to_string())?;
        let control = Control::connected(name, stream);
        match control.request(&Command::Pages, Vec::new()).wait().await {
            // A refusal is an answer all the same.
            Ok(_) | Err(MonitorError::Refused { .. }) => Ok((Arc::clone(&control), control.peer())),
            Err(error) => Err(error.to_string()),
        }
    };
    match tokio::time::timeout(HANDSHAKE_LIMIT, shaking).await {
        Ok(result) => result,
        Err(_) => Err(format!("no answer on {} within {} s", path.display(), HANDSHAKE_LIMIT.as_secs())),
    }
}

/// Ends a child whose spawn nobody was told the outcome of.
async fn end_unfinished(host: &Host, record: &Record, rebooted: bool) {
    if !rebooted {
        let process = match record.process {
            Some(key) => Process::find(key).ok(),
            // The daemon died between the fork and noting its process: only the socket knows it.
            None => match reach(host, record.id.as_str()).await {
                Ok((_, Some(pid))) => Process::open(pid).ok(),
                _ => None,
            },
        };
        if let Some(process) = process {
            tracing::info!(sandbox = %record.id, pid = process.key().pid, "ending an unfinished child");
            process.kill();
            process.exited().await;
        }
    }
    clear(host, &record.id);
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::process::{Child, Command as Program};

    use forkd_proto::monitor::{self, Event};
    use forkd_types::SandboxId;

    use super::*;
    use crate::config::NodeConfig;
    use crate::database::{Database, Origin};
    use crate::node::Node;
    use crate::process::ProcessKey;

    /// A process that is no monitor, and the key of it.
    fn stranger() -> (Child, ProcessKey) {
        let child = Program::new("sleep").arg("600").spawn().expect("sleep");
        let key = Process::open(child.id() as i32).expect("it runs").key();
        (child, key)
    }

    /// A state directory with one running sandbox on record, whose process is that of `key`.
    async fn recorded(dir: &Path, key: ProcessKey) -> SandboxId {
        let database = Database::open(&dir.join("forkd.db")).expect("open");
        let origin = Origin {
            snapshot_tag: "py".parse().expect("legal tag"),
            snapshot_digest: None,
            forked_from: None,
            created_at_unix: 7,
            limits: Default::default(),
            disks: 1,
            base: None,
            auto_checkpoint: false,
        };
        let id = database.begin(origin, None, 1).await.expect("begin").remove(0);
        database.running(vec![(id.clone(), key)]).await.expect("running");
        id
    }

    /// Starts a node and says why it did not adopt its one sandbox.
    async fn refusal(dir: &Path) -> String {
        let config = NodeConfig::new(dir, Path::new("/nonexistent/forkd-vmm")).expect("short path");
        let node = Node::start(config).await.expect("start");
        let sandboxes = node.sandboxes();
        assert_eq!(sandboxes.len(), 1, "it is listed once: {sandboxes:?}");
        assert_eq!(sandboxes[0].pid, None);
        sandboxes[0].stopped.clone().expect("it is not running")
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_process_whose_number_was_reused_is_neither_adopted_nor_ended() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (mut child, key) = stranger();
        recorded(dir.path(), ProcessKey { started: key.started + 1, ..key }).await;
        assert_eq!(refusal(dir.path()).await, "ended while no daemon was running");
        assert!(child.try_wait().expect("ours").is_none(), "somebody else's process runs on");
        child.kill().expect("ours");
        child.wait().expect("ours");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_monitor_that_nobody_can_reach_is_ended() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (mut child, key) = stranger();
        recorded(dir.path(), key).await;
        let reason = refusal(dir.path()).await;
        assert!(reason.contains("could not reach its monitor"), "{reason}");
        assert!(child.wait().expect("ours").code().is_none(), "a signal ended it");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_socket_that_another_process_answers_on_is_not_that_of_the_monitor() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (mut child, key) = stranger();
        let id = recorded(dir.path(), key).await;
        std::fs::create_dir_all(dir.path().join("run")).expect("mkdir");
        let listener = UnixListener::bind(dir.path().join(format!("run/{id}.control"))).expect("bind");
        let answering = std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("the node asks");
            monitor::receive::<Command>(&stream).expect("a request");
            let event = Event::Failed { error: "this is no monitor".to_owned() };
            monitor::send(&stream, &event, &[]).expect("send");
            stream
        });
        let reason = refusal(dir.path()).await;
        assert!(reason.contains(&format!("answered by process Some({})", std::process::id())), "{reason}");
        child.wait().expect("ours");
        drop(answering.join());
    }
}
