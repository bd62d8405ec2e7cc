//! `bench branch`: what branching a running machine costs its source, and when the copy is there.
//!
//! Of a real sandbox by default ([`real`]), as its monitor times it and as a program in the guest sees it; with
//! `--raw` of a tiny built-in guest ([`raw`]), which runs where KVM is emulated, next to two floors of the host.

mod echo;
mod gaps;
mod meter;
mod raw;
mod real;
mod report;
mod source;

use std::fmt;
use std::time::Duration;

use clap::{Args, ValueEnum};
use forkd_types::{ByteSize, StageTimings, Tag};
use serde::Serialize;

use crate::commands::Context;
use crate::statistics::median;
use raw::RawBranchBench;
use real::RealBranchBench;

/// Private memory of the sources where nothing else is asked for, MiB.
const RAW_SIZES: [u64; 4] = [64, 256, 1024, 4096];
const REAL_SIZES: [u64; 2] = [64, 256];

/// Arguments of `forkd bench branch`.
#[derive(Args, Debug)]
pub(crate) struct BranchBenchArgs {
    /// Branch a tiny built-in guest instead; needs no Linux guest
    #[arg(long)]
    raw: bool,
    /// The snapshot whose guest is branched
    #[arg(long, value_name = "TAG", default_value = "quickstart", conflicts_with = "raw")]
    snapshot: Tag,
    /// Private memory of the source; may be given several times [default: 64M,256M; raw 64M,256M,1G,4G]
    #[arg(long, value_name = "SIZE", value_delimiter = ',')]
    private: Vec<ByteSize>,
    /// Branches per row, of a raw guest each with a bare fork [default: 5; raw 20]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: Option<u32>,
    /// What becomes of the branches; may be given several times
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = BranchKind::ALL, conflicts_with = "raw")]
    kind: Vec<BranchKind>,
    /// How much the guest writes to in the rows in which it does, MiB per second
    #[arg(long, value_name = "MIB", default_value_t = 256, conflicts_with = "raw",
          value_parser = clap::value_parser!(u64).range(1..=65536))]
    dirty: u64,
    /// How long the source is watched after each branch
    #[arg(long, value_name = "SECONDS", default_value_t = 2, conflicts_with = "raw",
          value_parser = clap::value_parser!(u64).range(1..=600))]
    after: u64,
    /// Back the guest's memory with huge pages
    #[arg(long, conflicts_with = "raw")]
    hugepages: bool,
    /// Branches per row and guest as the guest sees them, up to 1 GiB private, each written to disk
    #[arg(long, value_name = "N", default_value_t = 6, requires = "raw",
          value_parser = clap::value_parser!(u32).range(0..=1000))]
    gap_runs: u32,
    /// Branches from one source at the end, to find what leaks or slows down
    #[arg(long, value_name = "N", default_value_t = 200, requires = "raw",
          value_parser = clap::value_parser!(u32).range(0..=5000))]
    soak: u32,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// What becomes of a branch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
enum BranchKind {
    /// A running copy
    Copy,
    /// A frozen copy in memory
    Checkpoint,
    /// A snapshot on disk, written while the source runs
    Snapshot,
}

impl BranchKind {
    const ALL: [Self; 3] = [Self::Copy, Self::Checkpoint, Self::Snapshot];
}

impl fmt::Display for BranchKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Copy => "copy",
            Self::Checkpoint => "checkpoint",
            Self::Snapshot => "snapshot",
        })
    }
}

impl BranchBenchArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let private = |usual: &[u64]| match self.private.is_empty() {
            true => usual.iter().map(|mib| ByteSize::mib(*mib)).collect(),
            false => self.private.clone(),
        };
        if self.raw {
            let (private, runs) = (private(&RAW_SIZES), self.runs.unwrap_or(20));
            let (gap_runs, soak, json) = (self.gap_runs, self.soak, self.json);
            return RawBranchBench { private, runs, gap_runs, soak, json }.run(context).await;
        }
        let bench = RealBranchBench {
            private: private(&REAL_SIZES),
            runs: self.runs.unwrap_or(5),
            tag: self.snapshot,
            kinds: self.kind,
            dirty_mib: self.dirty,
            after: Duration::from_secs(self.after),
            huge_pages: self.hugepages,
            json: self.json,
        };
        bench.run(context).await
    }
}

/// The median of each stage over all operations, in the order in which stages first ran.
fn stage_medians<'a>(operations: impl Iterator<Item = &'a StageTimings>) -> Vec<(String, f64)> {
    let mut values: Vec<(String, Vec<f64>)> = Vec::new();
    for stage in operations.flat_map(|timings| &timings.0) {
        match values.iter_mut().find(|(known, _)| *known == stage.name) {
            Some((_, values)) => values.push(stage.us as f64),
            None => values.push((stage.name.clone(), vec![stage.us as f64])),
        }
    }
    values.into_iter().map(|(name, values)| (name, median(values))).collect()
}
