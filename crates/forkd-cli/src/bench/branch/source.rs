//! A sandbox that is branched, and those who watch it: a meter inside, a TCP peer outside.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use forkd_proto::meter::{Order, Stretch};
use forkd_types::rest::{BranchMode, BranchRequest, CheckpointRequest, ForkRequest, SnapshotStatus, SpawnRequest};
use forkd_types::{PAGE_SIZE, SandboxId, StageTimings, Tag};

use super::BranchKind;
use super::echo::Echo;
use super::meter::{Meter, Started};
use crate::children::Children;
use crate::client::Client;
use crate::interrupt::Interrupts;
use crate::progress::Progress;

/// What a sandbox is given to come to rest.
const SETTLE: Duration = Duration::from_millis(300);
/// How often is asked whether a snapshot is written.
const POLL: Duration = Duration::from_millis(100);

/// A running sandbox with a meter in it.
pub(super) struct Source {
    client: Client,
    children: Children,
    id: SandboxId,
    meter: Meter,
    echo: Echo,
    /// Branches that are still there.
    made: Vec<Made>,
    tags: u32,
}

/// What came of asking for a source.
pub(super) enum Raised {
    Source(Box<Source>),
    /// Its guest has room for so much private memory at most, MiB.
    NoRoom(u64),
}

/// A branch that has to be removed again.
enum Made {
    Copy(SandboxId),
    Checkpoint(String),
    Snapshot(Tag),
}

/// One branch, as the daemon tells of it.
#[derive(Clone, Debug)]
pub(super) struct Branch {
    pub(super) pause_us: u64,
    /// Where the pause went; of a checkpoint an older daemon does not say it.
    pub(super) stages: Option<StageTimings>,
    /// Of a copy: from the request until its agent had answered.
    pub(super) answered_us: Option<u64>,
}

/// One stretch of time, as the watchers saw it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    pub(super) stretch: Stretch,
    /// Longest time between two echoes.
    pub(super) echo: Duration,
}

/// One branch and what was seen of it.
#[derive(Clone, Debug)]
pub(super) struct Round {
    pub(super) branch: Branch,
    /// From the request until its answer.
    pub(super) during: Seen,
    /// After that, while a snapshot is being written.
    pub(super) later: Seen,
    /// As long as `during`, without a branch.
    pub(super) quiet: Seen,
    /// As long as `later`, without a branch.
    pub(super) quiet_later: Seen,
    /// Of a snapshot: from the request until it was ready.
    pub(super) written: Option<Duration>,
}

impl Seen {
    /// MiB a second that the guest wrote to.
    pub(super) fn dirtied_mib_per_second(&self) -> f64 {
        let mib = (self.stretch.dirtied_pages * PAGE_SIZE) as f64 / (1 << 20) as f64;
        if self.stretch.us == 0 { 0.0 } else { mib * 1e6 / self.stretch.us as f64 }
    }
}

impl Source {
    /// Spawns a sandbox that holds `mib` of memory of its own.
    pub(super) async fn raise(
        client: &Client,
        request: &SpawnRequest,
        mib: u64,
        interrupts: &mut Interrupts,
        progress: &Progress,
    ) -> anyhow::Result<Raised> {
        let children = Children::spawn(client, request, interrupts, progress).await?;
        let begun = match children.report().sandboxes.first() {
            Some(sandbox) => {
                let id = sandbox.id.clone();
                interrupts.guard(watch(client, &id, mib)).await.map(|watchers| (id, watchers))
            }
            None => {
                let why = children.report().failures.first().map_or("no reason given", |failure| &failure.error);
                Err(anyhow::anyhow!("no sandbox came up: {why}"))
            }
        };
        let client = client.clone();
        match begun {
            Ok((id, Watchers::Watching(meter, echo))) => {
                let (made, tags) = (Vec::new(), 0);
                Ok(Raised::Source(Box::new(Self { client, children, id, meter, echo, made, tags })))
            }
            Ok((_, Watchers::NoRoom(room_mib))) => {
                children.kill().await;
                Ok(Raised::NoRoom(room_mib))
            }
            Err(error) => {
                children.kill().await;
                Err(error)
            }
        }
    }

    /// Guest memory that differs from the snapshot, as the host counts it.
    pub(super) async fn dirty_bytes(&self) -> anyhow::Result<u64> {
        Ok(self.client.memory(&self.id).await?.guest_dirty_bytes)
    }

    /// From now on the guest writes to so much memory a second.
    pub(super) async fn dirty(&mut self, mib_per_second: u64) -> anyhow::Result<()> {
        let pages_per_second = mib_per_second * ((1 << 20) / PAGE_SIZE);
        self.meter.order(&Order::Dirty { pages_per_second }).await.map(drop)
    }

    /// Branches it once, and looks at as long a time without a branch for comparison.
    pub(super) async fn round(&mut self, kind: BranchKind, after: Duration) -> anyhow::Result<Round> {
        self.mark().await?;
        let began = Instant::now();
        let branch = self.branch(kind).await?;
        let took = began.elapsed();
        let during = self.mark().await?;
        let later_began = Instant::now();
        let (written, ()) = tokio::join!(self.written(began), tokio::time::sleep(after));
        let written = written?;
        let later_took = later_began.elapsed();
        let later = self.mark().await?;
        self.tidy().await?;
        tokio::time::sleep(SETTLE).await;
        self.mark().await?;
        tokio::time::sleep(took).await;
        let quiet = self.mark().await?;
        tokio::time::sleep(later_took).await;
        let quiet_later = self.mark().await?;
        Ok(Round { branch, during, later, quiet, quiet_later, written })
    }

    /// Makes a copy that stays until [`Self::tidy`]; how long the source stood still for it.
    pub(super) async fn pile_up(&mut self) -> anyhow::Result<u64> {
        Ok(self.branch(BranchKind::Copy).await?.pause_us)
    }

    /// Removes all branches that are still there.
    pub(super) async fn tidy(&mut self) -> anyhow::Result<()> {
        while let Some(made) = self.made.pop() {
            match made {
                Made::Copy(id) => self.client.kill(&id).await?,
                Made::Checkpoint(name) => self.client.remove_checkpoint(&self.id, &name).await?,
                Made::Snapshot(tag) => {
                    self.status(&tag).await?;
                    self.client.delete_snapshot(&tag, false, false).await?;
                }
            }
        }
        Ok(())
    }

    /// Ends it and what was made of it.
    pub(super) async fn end(mut self) -> anyhow::Result<()> {
        let tidied = self.tidy().await;
        self.children.kill().await;
        tidied
    }

    /// What both watchers saw since the last mark.
    async fn mark(&mut self) -> anyhow::Result<Seen> {
        let (stretch, echo) = tokio::try_join!(self.meter.mark(), self.echo.mark())?;
        Ok(Seen { stretch, echo })
    }

    async fn branch(&mut self, kind: BranchKind) -> anyhow::Result<Branch> {
        match kind {
            BranchKind::Copy => self.copy().await,
            BranchKind::Checkpoint => {
                let info = self.client.checkpoint(&self.id, &CheckpointRequest::default()).await?;
                self.made.push(Made::Checkpoint(info.name));
                Ok(Branch { pause_us: info.pause_us, stages: info.stages, answered_us: None })
            }
            BranchKind::Snapshot => self.snapshot().await,
        }
    }

    async fn copy(&mut self) -> anyhow::Result<Branch> {
        let report = self.client.fork(&self.id, &ForkRequest::of(1)).await?;
        self.made.extend(report.sandboxes.into_iter().map(|copy| Made::Copy(copy.id)));
        let Some(timings) = report.timings.first() else {
            let why = report.failures.first().map_or("no reason given", |failure| &failure.error);
            bail!("no copy came up: {why}");
        };
        let stages = pause_of_copy(&timings.stages);
        let pause_us = stages.total().as_micros() as u64;
        Ok(Branch { pause_us, stages: Some(stages), answered_us: Some(timings.answered_us) })
    }

    /// Answered when the source runs again.
    async fn snapshot(&mut self) -> anyhow::Result<Branch> {
        self.tags += 1;
        let tag: Tag = format!("bench-{}-{}", self.id, self.tags).parse().context("an id makes a legal tag")?;
        let (mode, wait) = (Some(BranchMode::Live), false);
        let request = BranchRequest { tag: Some(tag.to_string()), mode, wait, ..BranchRequest::default() };
        let info = self.client.branch(&self.id, &request).await?;
        self.made.push(Made::Snapshot(tag));
        let stages = info.stages.context("the daemon does not say how long the sandbox stood still")?;
        let pause_us = stages.total().as_micros() as u64;
        Ok(Branch { pause_us, stages: Some(stages), answered_us: None })
    }

    /// Waits until the newest branch, if it is a snapshot, is ready; the value is the time since `began`.
    async fn written(&self, began: Instant) -> anyhow::Result<Option<Duration>> {
        let Some(Made::Snapshot(tag)) = self.made.last() else { return Ok(None) };
        match self.status(tag).await? {
            SnapshotStatus::Ready => Ok(Some(began.elapsed())),
            status => bail!("the snapshot {tag} became {status:?}"),
        }
    }

    /// What became of a snapshot, when it is no longer being written.
    async fn status(&self, tag: &Tag) -> anyhow::Result<SnapshotStatus> {
        loop {
            let all = self.client.snapshots().await?;
            let info = all.into_iter().find(|info| info.tag == *tag).with_context(|| format!("{tag} disappeared"))?;
            if info.status != SnapshotStatus::Writing {
                return Ok(info.status);
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

/// What watches a source.
enum Watchers {
    Watching(Meter, Echo),
    NoRoom(u64),
}

async fn watch(client: &Client, id: &SandboxId, mib: u64) -> anyhow::Result<Watchers> {
    let meter = match Meter::start(client.agent(id).await?, mib).await? {
        Started::Measuring(meter) => meter,
        Started::NoRoom(room_mib) => return Ok(Watchers::NoRoom(room_mib)),
    };
    let echo = Echo::start(client.agent(id).await?, meter.echo_port).await?;
    tokio::time::sleep(SETTLE).await;
    Ok(Watchers::Watching(meter, echo))
}

/// The stages of a copy in which its source stood still: those of freezing it.
fn pause_of_copy(stages: &StageTimings) -> StageTimings {
    let mut pause = StageTimings::default();
    for stage in &stages.0 {
        if let Some(name) = stage.name.strip_prefix("freeze.") {
            pause.record(name, Duration::from_micros(stage.us));
        }
    }
    pause
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_of_a_copy_is_what_freezing_it_took() {
        let mut stages = StageTimings::default();
        for (name, us) in [("freeze", 5000), ("freeze.quiesce", 200), ("freeze.seal", 30), ("freeze.fork", 900)] {
            stages.record(name, Duration::from_micros(us));
        }
        stages.record("fork", Duration::from_micros(1234));
        let pause = pause_of_copy(&stages);
        assert_eq!(pause.total(), Duration::from_micros(1130));
        assert_eq!(pause.get("fork"), Some(Duration::from_micros(900)));
    }

    #[test]
    fn a_rate_is_of_the_stretch_it_was_seen_in() {
        let stretch = Stretch { us: 500_000, ticks: 480, longest_gap_us: 2000, dirtied_pages: 12_800 };
        let seen = |stretch| Seen { stretch, echo: Duration::ZERO };
        assert_eq!(seen(stretch).dirtied_mib_per_second(), 100.0);
        assert_eq!(seen(Stretch::default()).dirtied_mib_per_second(), 0.0);
    }
}
