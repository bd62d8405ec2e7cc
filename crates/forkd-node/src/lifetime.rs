//! Sandboxes that end by themselves: when, and how.
//!
//! A lifetime is a time on the clock, so that it goes on while no daemon runs: one that was over by then ends with the
//! next start. It is looked for once a second.

use std::sync::Arc;
use std::time::Duration;

use forkd_types::rest::{
    EndCode, EventKind, LIFETIME_LIMIT_SECS, OnTimeout, SandboxInfo, SnapshotInfo, TimeoutRequest,
};
use forkd_types::{SandboxId, Tag};

use crate::branch::Brancher;
use crate::checkpoints::Checkpoints;
use crate::database::Expiry;
use crate::error::{NodeError, NodeResult};
use crate::events::News;
use crate::host::{Host, unix_now};
use crate::lifecycle::End;
use crate::sandbox::{Roster, Sandbox};
use crate::workspaces::Workspaces;

/// How often it is looked which lifetimes are over.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// When a suspend that failed is tried again.
const AGAIN_AFTER_SECS: u64 = 60;

/// The lifetime that a request asks for, from now on.
pub(crate) fn expiry(timeout_secs: Option<u64>, on_timeout: Option<OnTimeout>) -> NodeResult<Option<Expiry>> {
    let Some(seconds) = timeout_secs else {
        return match on_timeout {
            None => Ok(None),
            Some(_) => {
                let (field, value) = ("on_timeout", "given without timeout_secs".to_owned());
                Err(NodeError::BadField { field, value, rule: "say after how long, too" })
            }
        };
    };
    if !(1..=LIFETIME_LIMIT_SECS).contains(&seconds) {
        let (field, rule) = ("timeout_secs", "a lifetime has 1 to 31536000 seconds; leave it out for none");
        return Err(NodeError::BadField { field, value: seconds.to_string(), rule });
    }
    Ok(Some(Expiry { at_unix: unix_now() + seconds, then: on_timeout.unwrap_or_default() }))
}

/// The snapshot that a sandbox becomes when it is put on disk for its own sake.
fn suspended_tag(id: &SandboxId) -> NodeResult<Tag> {
    Ok(format!("suspended-{id}").parse()?)
}

/// What ends sandboxes whose time is over.
pub(crate) struct Lifetimes {
    pub(crate) host: Arc<Host>,
    pub(crate) roster: Arc<Roster>,
    pub(crate) checkpoints: Arc<Checkpoints>,
    pub(crate) brancher: Brancher,
    pub(crate) workspaces: Arc<Workspaces>,
}

impl Lifetimes {
    /// Changes when a sandbox ends by itself.
    pub(crate) async fn change(&self, id: &SandboxId, request: &TimeoutRequest) -> NodeResult<SandboxInfo> {
        let sandbox = self.roster.get(id)?;
        sandbox.running()?;
        let before = sandbox.expiry().map(|expiry| expiry.then);
        let on_timeout = request.on_timeout.or(request.timeout_secs.and(before));
        let expiry = expiry(request.timeout_secs, on_timeout)?;
        self.host.database.note_expiry(id.clone(), expiry).await?;
        sandbox.set_expiry(expiry);
        self.host.events.tell(News::of(EventKind::SandboxTimeoutChanged).sandbox(id));
        Ok(sandbox.info())
    }

    /// Puts a sandbox on disk and ends it. That of a workspace becomes the workspace's state; any other the snapshot
    /// `suspended-<id>`, and stays known as stopped, saying so.
    pub(crate) async fn suspend(&self, sandbox: &Arc<Sandbox>) -> NodeResult<SnapshotInfo> {
        if let Some(name) = self.workspaces.of_sandbox(&sandbox.id) {
            return self.workspaces.suspend(&name).await;
        }
        let tag = suspended_tag(&sandbox.id)?;
        let suspended = self.brancher.suspend(sandbox, &tag).await?;
        let reason = format!("was suspended to snapshot {tag}; spawn that to go on");
        let end = End { code: EndCode::Suspended, reason };
        let (id, key) = (sandbox.id.clone(), suspended.key());
        self.host.database.stopping(id, key, end.clone(), unix_now()).await?;
        let snapshot = suspended.done();
        sandbox.set_expiry(None);
        self.roster.retire(sandbox, end)?;
        self.host.events.tell(News::of(EventKind::SandboxSuspended).sandbox(&sandbox.id).snapshot(&tag));
        Ok(snapshot)
    }

    /// Ends what is over, for as long as the node lives.
    pub(crate) async fn enforce(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let now = unix_now();
            for sandbox in self.roster.all() {
                if let Some(expiry) = sandbox.take_due(now) {
                    let lifetimes = Arc::clone(&self);
                    tokio::spawn(async move { lifetimes.end(&sandbox, expiry).await });
                }
            }
            self.workspaces.look(now);
        }
    }

    async fn end(&self, sandbox: &Arc<Sandbox>, expiry: Expiry) {
        let id = &sandbox.id;
        if expiry.then == OnTimeout::Kill {
            tracing::info!(sandbox = %id, "its lifetime is over");
            // It may have been ended by somebody else meanwhile.
            let _ = self.roster.end(id, Some("its lifetime is over"));
            self.checkpoints.forget(id);
            return;
        }
        match self.suspend(sandbox).await {
            Ok(snapshot) => tracing::info!(sandbox = %id, tag = %snapshot.tag, "suspended at the end of its lifetime"),
            // It has ended by itself.
            Err(NodeError::SandboxStopped { .. } | NodeError::SandboxNotFound { .. }) => {}
            Err(error) => {
                let reason = error.message();
                tracing::error!(sandbox = %id, reason, "cannot be suspended at the end of its lifetime; it runs on");
                sandbox.set_expiry(Some(Expiry { at_unix: unix_now() + AGAIN_AFTER_SECS, ..expiry }));
                self.host.events.tell(News::of(EventKind::SandboxSuspendFailed).sandbox(id).because(reason));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lifetimes_are_checked_at_their_edges() {
        assert_eq!(expiry(None, None).expect("none"), None);
        let one = expiry(Some(1), None).expect("a second").expect("a lifetime");
        assert!(one.at_unix > unix_now().saturating_sub(1) && one.then == OnTimeout::Kill);
        let long = expiry(Some(LIFETIME_LIMIT_SECS), Some(OnTimeout::Suspend)).expect("a year").expect("a lifetime");
        assert_eq!(long.then, OnTimeout::Suspend);
        for (seconds, then) in [(Some(0), None), (Some(LIFETIME_LIMIT_SECS + 1), None), (None, Some(OnTimeout::Kill))] {
            assert!(matches!(expiry(seconds, then), Err(NodeError::BadField { .. })), "{seconds:?} {then:?}");
        }
    }

    #[test]
    fn every_sandbox_has_a_place_on_disk() {
        let id = SandboxId::new(u64::MAX, u64::MAX);
        assert_eq!(suspended_tag(&id).expect("short enough").as_str(), format!("suspended-{id}"));
    }
}
