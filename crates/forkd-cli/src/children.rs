//! Sandboxes that this program started and therefore ends, whatever happens.

use std::future::Future;

use forkd_types::SandboxId;
use forkd_types::rest::{SpawnReport, SpawnRequest};
use futures_util::StreamExt;

use crate::client::{Client, ClientError};
use crate::interrupt::Interrupts;
use crate::progress::Progress;

/// How many calls to the daemon may be under way at once. QEMU's user network, through which a daemon
/// in `forkd machine` is reached, drops connections when many arrive together, and a dropped one is
/// noticed only after a minute.
pub(crate) const CONCURRENCY: usize = 8;

/// Children of one spawn.
pub(crate) struct Children {
    client: Client,
    progress: Progress,
    report: SpawnReport,
}

impl Children {
    /// Forks children. A signal meanwhile does not lose them: the answer is awaited, then all are
    /// killed; a second signal gives up waiting.
    pub(crate) async fn spawn(
        client: &Client,
        request: &SpawnRequest,
        interrupts: &mut Interrupts,
        progress: &Progress,
    ) -> anyhow::Result<Self> {
        let spawning = client.spawn(request);
        tokio::pin!(spawning);
        let interrupted = tokio::select! {
            report = &mut spawning => {
                let report = report?;
                warn(&report, progress);
                return Ok(Self { client: client.clone(), progress: progress.clone(), report });
            }
            interrupted = interrupts.next() => interrupted,
        };
        progress.say("stopping; waiting for the daemon to say what it forked (interrupt again to give up)");
        tokio::select! {
            report = &mut spawning => {
                let children = Self { client: client.clone(), progress: progress.clone(), report: report? };
                children.kill().await;
            }
            _ = interrupts.next() => progress.warn("children may still be running; `forkd ls` shows them"),
        }
        Err(interrupted.into())
    }

    /// What the daemon said about them.
    pub(crate) fn report(&self) -> &SpawnReport {
        &self.report
    }

    /// Runs `work`, then kills the children: also when it fails, and when a signal comes.
    pub(crate) async fn scope<T>(
        self,
        interrupts: &mut Interrupts,
        work: impl Future<Output = anyhow::Result<T>>,
    ) -> anyhow::Result<T> {
        let outcome = interrupts.guard(work).await;
        self.kill().await;
        outcome
    }

    /// Kills them all.
    pub(crate) async fn kill(self) {
        let ids = self.report.sandboxes.into_iter().map(|sandbox| sandbox.id).collect();
        for (id, outcome) in kill(&self.client, ids).await {
            if let Err(error) = outcome {
                self.progress.warn(format_args!("could not kill {id}: {error}"));
            }
        }
    }
}

/// Passes on what the daemon did otherwise than asked.
pub(crate) fn warn(report: &SpawnReport, progress: &Progress) {
    for warning in &report.warnings {
        progress.warn(warning);
    }
}

/// Kills sandboxes, many at a time; the outcomes in the order of `ids`.
pub(crate) async fn kill(client: &Client, ids: Vec<SandboxId>) -> Vec<(SandboxId, Result<(), ClientError>)> {
    for_each(ids, |id| async move {
        let outcome = client.kill(&id).await;
        (id, outcome)
    })
    .await
}

/// Calls `call` for every item, at most [`CONCURRENCY`] at a time; results in the order of `items`.
pub(crate) async fn for_each<I, T, F>(items: Vec<I>, call: impl Fn(I) -> F) -> Vec<T>
where
    F: Future<Output = T>,
{
    futures_util::stream::iter(items).map(call).buffered(CONCURRENCY).collect().await
}
