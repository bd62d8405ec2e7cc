//! Putting a running sandbox on disk and ending it, without losing anything in between.
//!
//! ```text
//! fork a writer ──► hold the machine ──► write and publish ──► record ──► end the machine
//!       │                  │                    │                │
//!       └──────────────────┴────────────────────┴────────────────┴──► failed: the machine goes on
//! ```
//!
//! From the instant that is put on disk to its end the machine stands still, but for the moment between the writer's
//! fork and the hold. It is ended only when the snapshot is durable and what became of the sandbox is on record.

use std::sync::Arc;

use forkd_types::Tag;
use forkd_types::rest::SnapshotInfo;

use crate::branch::{Brancher, Order};
use crate::error::{NodeError, NodeResult};
use crate::lifecycle::Step;
use crate::process::ProcessKey;
use crate::sandbox::{Running, Sandbox};

/// A sandbox that is on disk and whose machine stands still; the machine goes on when this is dropped.
pub(crate) struct Suspended {
    still: Still,
    /// The snapshot it is in.
    pub(crate) snapshot: SnapshotInfo,
}

impl Suspended {
    /// The process of its machine.
    pub(crate) fn key(&self) -> ProcessKey {
        self.still.machine.process.key()
    }

    /// Leaves the machine, which stands still, to be ended; returns the snapshot.
    pub(crate) fn done(mut self) -> SnapshotInfo {
        self.still.goes_on = false;
        self.snapshot.clone()
    }
}

/// A machine that stands still; it goes on when this is dropped.
struct Still {
    sandbox: Arc<Sandbox>,
    machine: Arc<Running>,
    goes_on: bool,
}

impl Still {
    fn hold(sandbox: &Arc<Sandbox>) -> NodeResult<Self> {
        let machine = sandbox.running()?;
        sandbox.step(Step::Suspend)?;
        let still = Self { sandbox: Arc::clone(sandbox), machine, goes_on: true };
        let what = format!("hold the monitor of sandbox {}", sandbox.id);
        still.machine.process.hold().map_err(NodeError::io(what))?;
        Ok(still)
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        if self.goes_on {
            self.machine.process.let_go();
            // It may have ended meanwhile, and is that then.
            let _ = self.sandbox.step(Step::GoOn);
        }
    }
}

impl Brancher {
    /// Puts `sandbox` on disk as `tag`, in place of an earlier snapshot of that tag, which stays what it is until
    /// the new one is durable.
    ///
    /// # Errors
    /// The sandbox goes on, and an earlier snapshot of the tag is as it was.
    pub(crate) async fn suspend(&self, sandbox: &Arc<Sandbox>, tag: &Tag) -> NodeResult<Suspended> {
        sandbox.running()?;
        let _slot = self.slots.take()?;
        let _claim = self.claims.claim(tag)?;
        self.check_place(tag, true).await?;
        self.claims.forget_failure(tag);
        let begun = self.begin(sandbox, Order::replacing(tag.clone())).await?;
        let still = Still::hold(sandbox)?;
        let snapshot = self.finish(begun).await?;
        Ok(Suspended { still, snapshot })
    }
}
