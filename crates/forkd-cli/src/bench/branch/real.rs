//! A real sandbox of a real snapshot, branched while it idles and while it writes to its memory.
//!
//! A round that failed, because a guest or the daemon's machine was lost, is counted and named in the report; the
//! next one begins with a new source.

use std::future::Future;
use std::time::Duration;

use forkd_types::rest::SpawnRequest;
use forkd_types::{ByteSize, Tag};

use super::super::Host;
use super::BranchKind;
use super::report::{Mode, Report, Row, Skipped, Subject};
use super::source::{Raised, Round, Source};
use crate::commands::{Context, spawn_error};
use crate::endpoint::Endpoint;
use crate::interrupt::{Interrupted, Interrupts};
use crate::{output, units};

/// Branches in a row, all copies staying.
const IN_A_ROW: u32 = 10;
/// What takes longer than this, besides the time for which the source is watched, is not slow: nobody will answer.
const PATIENCE: Duration = Duration::from_secs(330);

/// What is measured with a real guest.
#[derive(Debug)]
pub(super) struct RealBranchBench {
    pub(super) tag: Tag,
    /// Private memory of the sources.
    pub(super) private: Vec<ByteSize>,
    /// Branches per row.
    pub(super) runs: u32,
    pub(super) kinds: Vec<BranchKind>,
    /// What a guest that writes to its memory writes to, MiB per second.
    pub(super) dirty_mib: u64,
    /// How long the source is watched after a branch.
    pub(super) after: Duration,
    pub(super) huge_pages: bool,
    pub(super) json: bool,
}

/// The daemon, and the sandbox that is measured; both are replaced when they are lost.
struct Bench<'a> {
    plan: &'a RealBranchBench,
    context: &'a Context,
    interrupts: Interrupts,
    endpoint: Option<Endpoint>,
    place: &'static str,
    source: Option<Box<Source>>,
    /// What the source of the moment does.
    mode: Mode,
}

/// Why there is nothing to measure.
enum Missing {
    /// The guest has room for so much private memory at most, MiB.
    NoRoom(u64),
    Error(anyhow::Error),
}

impl RealBranchBench {
    pub(super) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let interrupts = Interrupts::catch()?;
        let (endpoint, place, source, mode) = (None, "", None, Mode::Idle);
        let mut bench = Bench { plan: &self, context, interrupts, endpoint, place, source, mode };
        let (mut rows, mut skipped) = (Vec::new(), Vec::new());
        for size in &self.private {
            let private_mib = size.as_mib();
            let measured = bench.size(private_mib, &mut rows).await;
            bench.end_source().await;
            if let Some(reason) = measured? {
                context.progress.warn(format_args!("SKIPPED, {private_mib} MiB private: {reason}"));
                skipped.push(Skipped { private_mib, reason });
            }
        }
        let report = Report { host: Host::here(), place: bench.place, command: self.command(), rows, skipped };
        if self.json {
            output::json(&report)?;
        } else {
            report.print()?;
        }
        report.verdict().map(|()| 0)
    }

    fn command(&self) -> String {
        let sizes: Vec<String> = self.private.iter().map(|size| format!("{}M", size.as_mib())).collect();
        let kinds: Vec<String> = self.kinds.iter().map(|kind| kind.to_string()).collect();
        let huge_pages = if self.huge_pages { " --hugepages" } else { "" };
        format!(
            "forkd bench branch --snapshot {} --private {} --runs {} --kind {} --dirty {} --after {}{huge_pages}",
            self.tag,
            sizes.join(","),
            self.runs,
            kinds.join(","),
            self.dirty_mib,
            self.after.as_secs()
        )
    }

    fn pages(&self) -> &'static str {
        if self.huge_pages { "thp" } else { "4k" }
    }
}

impl Bench<'_> {
    /// All rows for one size; a reason when there is none for it.
    async fn size(&mut self, private_mib: u64, rows: &mut Vec<Row>) -> anyhow::Result<Option<String>> {
        for mode in [Mode::Idle, Mode::Dirtying] {
            self.mode = mode;
            if self.source.is_some() {
                self.set_mode().await?;
            }
            for &kind in &self.plan.kinds {
                match self.row(private_mib, kind).await {
                    Ok(row) => rows.push(row),
                    Err(Missing::NoRoom(room_mib)) => {
                        return Ok(Some(format!("the guest has room for {room_mib} MiB")));
                    }
                    Err(Missing::Error(error)) => return Err(error),
                }
            }
        }
        Ok(None)
    }

    async fn row(&mut self, private_mib: u64, kind: BranchKind) -> Result<Row, Missing> {
        let runs = self.plan.runs;
        let title = format!("{private_mib} MiB private, {}, {kind}, {}", self.mode, units::count(runs as usize, "run"));
        let step = self.context.progress.step(&title);
        step.set_items(runs.into());
        let (mut rounds, mut lost, mut dirty_bytes) = (Vec::new(), Vec::new(), None);
        for number in 1..=runs {
            match self.round(private_mib, kind).await {
                Ok((round, bytes)) => {
                    rounds.push(round);
                    dirty_bytes.get_or_insert(bytes);
                }
                // Before anything was measured it is a mistake, or a host that cannot do it.
                Err(Missing::Error(error)) if self.place.is_empty() || error.is::<Interrupted>() => {
                    return Err(Missing::Error(error));
                }
                Err(Missing::Error(error)) => {
                    self.context.progress.warn(format_args!("run {number} is lost: {error:#}"));
                    lost.push(format!("{error:#}"));
                    self.lose_source().await;
                }
                Err(no_room) => return Err(no_room),
            }
            step.set_position(number.into());
        }
        let in_a_row = match (kind, self.mode) {
            (BranchKind::Copy, Mode::Idle) => self.in_a_row(private_mib).await?,
            _ => Vec::new(),
        };
        step.done(title);
        let subject = Subject { private_mib, pages: self.plan.pages(), mode: self.mode, kind };
        Ok(Row::new(subject, dirty_bytes, &rounds, lost, &in_a_row))
    }

    async fn round(&mut self, private_mib: u64, kind: BranchKind) -> Result<(Round, u64), Missing> {
        let after = self.plan.after;
        let (source, interrupts) = self.source(private_mib).await?;
        let work = async {
            let bytes = source.dirty_bytes().await?;
            Ok((source.round(kind, after).await?, bytes))
        };
        interrupts.guard(within(PATIENCE + 4 * after, work)).await.map_err(Missing::Error)
    }

    /// The pause of each of ten branches whose copies all stay; none where that cannot be had.
    async fn in_a_row(&mut self, private_mib: u64) -> Result<Vec<u64>, Missing> {
        let mut pauses = Vec::new();
        let (source, interrupts) = self.source(private_mib).await?;
        let work = async {
            for _ in 0..IN_A_ROW {
                pauses.push(source.pile_up().await?);
            }
            source.tidy().await
        };
        match interrupts.guard(within(PATIENCE, work)).await {
            Err(error) if error.is::<Interrupted>() => return Err(Missing::Error(error)),
            Err(error) => {
                let made = pauses.len();
                self.context.progress.warn(format_args!("{made} of {IN_A_ROW} branches in a row were made: {error:#}"));
                self.lose_source().await;
            }
            Ok(()) => {}
        }
        Ok(pauses)
    }

    /// The source, by the daemon that was found first or by one that is found or started where it was lost.
    async fn source(&mut self, private_mib: u64) -> Result<(&mut Source, &mut Interrupts), Missing> {
        if self.source.is_none() {
            self.raise(private_mib).await?;
        }
        let source = self.source.as_mut().expect("a source was raised");
        Ok((source, &mut self.interrupts))
    }

    async fn raise(&mut self, private_mib: u64) -> Result<(), Missing> {
        let endpoint = match self.endpoint.take() {
            Some(endpoint) => endpoint,
            None => self.interrupts.guard(self.context.endpoint()).await.map_err(Missing::Error)?,
        };
        let client = &self.endpoint.insert(endpoint).client;
        let request = SpawnRequest { hugepages: self.plan.huge_pages, ..SpawnRequest::of(&self.plan.tag, 1) };
        let raising = Source::raise(client, &request, private_mib, &mut self.interrupts, &self.context.progress);
        match within(PATIENCE, raising).await.map_err(|error| Missing::Error(spawn_error(error)))? {
            Raised::NoRoom(room_mib) => return Err(Missing::NoRoom(room_mib)),
            Raised::Source(source) => self.source = Some(source),
        }
        self.set_mode().await.map_err(Missing::Error)?;
        self.place = self.endpoint.as_ref().map_or("", |endpoint| endpoint.place.describe());
        Ok(())
    }

    /// Tells the source to write to its memory, or not to.
    async fn set_mode(&mut self) -> anyhow::Result<()> {
        let rate = if self.mode == Mode::Dirtying { self.plan.dirty_mib } else { 0 };
        match &mut self.source {
            Some(source) => within(PATIENCE, source.dirty(rate)).await,
            None => Ok(()),
        }
    }

    /// Gives up a source of which nobody knows whether it still is, and the daemon with it.
    async fn lose_source(&mut self) {
        self.end_source().await;
        self.endpoint = None;
    }

    async fn end_source(&mut self) {
        if let Some(source) = self.source.take()
            && let Err(error) = within(PATIENCE, source.end()).await
        {
            self.context.progress.warn(format_args!("not everything was removed: {error:#}"));
        }
    }
}

/// Waits for the daemon and its guests, but not for ever.
async fn within<T>(limit: Duration, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let late = |_| anyhow::anyhow!("no answer within {} s", limit.as_secs());
    tokio::time::timeout(limit, work).await.map_err(late)?
}
