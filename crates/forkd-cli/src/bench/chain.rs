//! `bench chain`: what a snapshot costs that lies over ever more others, in time to spawn and in bytes on disk.
//!
//! `forkd-vmm bench-chain` makes a chain of a tiny guest, loads a zygote of each of its snapshots, and spawns
//! from all of them in turns. Half of what changes from one snapshot to the next is one run of pages, half is
//! scattered over all of memory, a page here and there, which is the worst that a guest can do.

use anyhow::Context as _;
use clap::Args;
use forkd_types::{ByteSize, StageTimings};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::Host;
use super::floor::run;
use crate::commands::Context;
use crate::statistics::{Summary, summarise};
use crate::{output, programs};

/// Arguments of `forkd bench chain`.
#[derive(Args, Debug)]
pub(crate) struct ChainBenchArgs {
    /// Snapshots over the base
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=64))]
    depth: u32,
    /// Copies spawned from each snapshot
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: u32,
    /// Guest memory
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    memory: ByteSize,
    /// What each snapshot changes, in memory and again on disk
    #[arg(long, value_name = "SIZE", default_value = "4M")]
    changed: ByteSize,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// The figures of one snapshot of the chain.
#[derive(Debug, Serialize)]
struct Row {
    depth: usize,
    /// From a request until the copy's guest had run. Median.
    spawn_ms: f64,
    /// `spawn_ms` divided by that of the base.
    ratio: f64,
    spawn: Summary,
    /// The part of it that is `fork(2)`. Median.
    fork_ms: f64,
    /// From starting the snapshot's zygote until that was ready; once per snapshot, not per copy.
    load_ms: f64,
    /// What the snapshot's own files take on disk.
    layer_bytes: u64,
    /// Changed pages and blocks that are not zero, in bytes.
    changed_bytes: u64,
    /// `layer_bytes` divided by `changed_bytes`.
    bytes_ratio: f64,
    /// Reading the snapshot's layers and comparing their digests, which all agreed.
    verify_ms: f64,
}

/// The whole report.
#[derive(Debug, Serialize)]
struct Report {
    host: Host,
    command: String,
    memory_mib: u64,
    rows: Vec<Row>,
}

/// What `forkd-vmm bench-chain` prints.
#[derive(Debug, Deserialize)]
struct Measured {
    memory_mib: u64,
    depths: Vec<Depth>,
}

/// One snapshot of it.
#[derive(Debug, Deserialize)]
struct Depth {
    depth: usize,
    load_us: f64,
    spawn_us: Vec<f64>,
    spawn_stages: Vec<StageTimings>,
    layer_bytes: u64,
    changed_bytes: u64,
    verify_us: f64,
}

impl ChainBenchArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let monitor = programs::companion("forkd-vmm")?;
        let scratch = tempfile::tempdir_in(context.data.bench()?)?;
        let title = format!("a chain of {} snapshots, {} copies of each", self.depth + 1, self.runs);
        let step = context.progress.step(title.clone());
        let mut command = Command::new(monitor);
        command.arg("bench-chain").arg("--scratch").arg(scratch.path());
        for (name, value) in [
            ("--depth", self.depth.into()),
            ("--runs", self.runs.into()),
            ("--memory-mib", self.memory.as_mib()),
            ("--changed-mib", self.changed.as_mib()),
        ] {
            command.arg(name).arg(value.to_string());
        }
        let text = run(command, "forkd-vmm bench-chain").await?;
        step.done(title);
        let measured: Measured = serde_json::from_str(&text).context("could not read what forkd-vmm measured")?;
        let report = Report {
            host: Host::here(),
            command: self.command(),
            memory_mib: measured.memory_mib,
            rows: rows(&measured.depths),
        };
        if self.json {
            output::json(&report)?;
        } else {
            report.print()?;
        }
        Ok(0)
    }

    fn command(&self) -> String {
        let (memory, changed) = (self.memory.as_mib(), self.changed.as_mib());
        format!("forkd bench chain --depth {} --runs {} --memory {memory}M --changed {changed}M", self.depth, self.runs)
    }
}

fn rows(depths: &[Depth]) -> Vec<Row> {
    let spawns: Vec<_> = depths.iter().map(|depth| summarise(depth.spawn_us.iter().map(|us| us / 1e3))).collect();
    let base = spawns.first().map_or(0.0, |spawn| spawn.p50);
    depths
        .iter()
        .zip(spawns)
        .map(|(depth, spawn)| {
            let forks = depth.spawn_stages.iter().flat_map(|stages| &stages.0).filter(|stage| stage.name == "fork");
            Row {
                depth: depth.depth,
                spawn_ms: spawn.p50,
                ratio: spawn.p50 / base,
                spawn,
                fork_ms: summarise(forks.map(|stage| stage.us as f64 / 1e3)).p50,
                load_ms: depth.load_us / 1e3,
                layer_bytes: depth.layer_bytes,
                changed_bytes: depth.changed_bytes,
                bytes_ratio: depth.layer_bytes as f64 / depth.changed_bytes as f64,
                verify_ms: depth.verify_us / 1e3,
            }
        })
        .collect()
}

impl Report {
    fn print(&self) -> anyhow::Result<()> {
        let mut table = output::table(&[
            "DEPTH",
            "SPAWN ms p50",
            "p90",
            "RATIO",
            "FORK ms",
            "LOAD ms",
            "ON DISK",
            "CHANGED",
            "RATIO",
            "VERIFY ms",
        ]);
        for row in &self.rows {
            table.add_row([
                row.depth.to_string(),
                format!("{:.2}", row.spawn_ms),
                format!("{:.2}", row.spawn.p90),
                format!("{:.2}", row.ratio),
                format!("{:.2}", row.fork_ms),
                format!("{:.0}", row.load_ms),
                ByteSize(row.layer_bytes).to_string(),
                ByteSize(row.changed_bytes).to_string(),
                format!("{:.3}", row.bytes_ratio),
                format!("{:.1}", row.verify_ms),
            ]);
        }
        output::print_table(&mut table)?;
        output::line(format_args!("{}\n{}", self.host.describe(), self.command))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_compared_with_the_base() {
        let depth = |depth, spawn_us: &[f64], fork_us: u64| -> Depth {
            let stages = serde_json::json!([{"name": "fork", "us": fork_us}, {"name": "vcpus", "us": 9}]);
            serde_json::from_value(serde_json::json!({
                "depth": depth, "load_us": 5000.0, "spawn_us": spawn_us, "spawn_stages": [stages],
                "layer_bytes": 1100, "changed_bytes": 1000, "verify_us": 70.0,
            }))
            .expect("whole")
        };
        let rows = rows(&[depth(0, &[900.0, 1000.0, 9000.0], 100), depth(1, &[1500.0], 200)]);
        assert_eq!((rows[0].spawn_ms, rows[0].ratio, rows[0].fork_ms), (1.0, 1.0, 0.1));
        assert_eq!((rows[1].spawn_ms, rows[1].ratio, rows[1].fork_ms), (1.5, 1.5, 0.2));
        assert_eq!((rows[1].bytes_ratio, rows[1].load_ms), (1.1, 5.0));
    }
}
