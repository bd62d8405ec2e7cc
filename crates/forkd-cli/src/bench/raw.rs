//! `bench raw`: the monitor's fork against the floor of this host, in interleaved pairs.
//!
//! The floor is `limits/fork_limit.c`: one process maps guest memory, forks, and each child opens a
//! KVM virtual machine over what it inherited and enters the guest. Ours is the same with the whole
//! device model. Both run one after the other, many times, because a busy host slows both alike; the
//! ratio of medians is the figure to quote.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use forkd_types::ByteSize;
use serde::Serialize;
use serde_json::Value;
use tokio::process::Command;

use super::Host;
use super::chart::Chart;
use super::floor::{FloorProgram, field, run};
use crate::commands::Context;
use crate::statistics::{Summary, median, summarise};
use crate::{output, programs, units};

/// The floor.
const FLOOR: FloorProgram =
    FloorProgram { name: "fork_limit", source: include_str!("../../../../limits/fork_limit.c") };

/// The stage in which KVM is told of the guest's memory.
const MEMORY_SLOT: &str = "memory_slot";

/// MiB of the image that hold data, floor and ours alike.
const TOUCHED_MIB: u64 = 64;

/// Arguments of `forkd bench raw`.
#[derive(Args, Debug)]
pub(crate) struct RawBenchArgs {
    /// Children per run; may be given several times
    #[arg(short, long, default_values_t = [1, 10, 100], value_parser = clap::value_parser!(u32).range(1..=1000))]
    n: Vec<u32>,
    /// Pairs of runs
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Guest memory; may be given several times
    #[arg(long, default_values = ["512M"], value_delimiter = ',')]
    memory: Vec<ByteSize>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Write a bar chart
    #[arg(long, value_name = "FILE.svg")]
    chart: Option<PathBuf>,
}

/// The figures for one number of children.
#[derive(Debug, Serialize)]
struct Result {
    n: u32,
    runs: u32,
    memory_mib: u64,
    /// Median wall time of the floor.
    floor_ms: f64,
    /// Median wall time of forkd.
    ours_ms: f64,
    /// `ours_ms` divided by `floor_ms`.
    ratio: f64,
    /// Median of the ratios of the pairs.
    ratio_of_pairs: f64,
    /// `ours_ms` without the kernel's own call for the memory slot, which takes longer the more memory a
    /// guest has.
    ours_without_memory_slot_ms: f64,
    floor: Summary,
    ours: Summary,
    /// Median over the runs of each stage's median over the children, in the order they ran.
    stages_us: Vec<(String, f64)>,
}

/// The whole report.
#[derive(Debug, Serialize)]
struct Report {
    host: Host,
    command: String,
    results: Vec<Result>,
}

/// One number of children: the figures on top, and the machine they are from.
#[derive(Debug, Serialize)]
struct SingleReport<'a> {
    #[serde(flatten)]
    result: &'a Result,
    host: &'a Host,
    command: &'a str,
}

/// One row of the report.
#[derive(Clone, Copy, Debug)]
struct Case {
    n: u32,
    memory: ByteSize,
}

/// One run of ours.
struct Run {
    wall_ms: f64,
    stages: Vec<(String, Vec<f64>)>,
}

impl RawBenchArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let monitor = programs::companion("forkd-vmm")?;
        let floor = FLOOR.compile(context).await?;
        // Both keep their memory images here, on the same file system.
        let scratch = tempfile::tempdir_in(context.data.bench()?)?;
        let mut results = Vec::new();
        for &memory in &self.memory {
            for &n in &self.n {
                let case = Case { n, memory };
                results.push(self.measure(case, &floor, &monitor, scratch.path(), context).await?);
            }
        }
        let report = Report { host: Host::here(), command: self.command(), results };
        if let Some(path) = &self.chart {
            std::fs::write(path, report.chart()).with_context(|| format!("could not write {}", path.display()))?;
            context.progress.say(format_args!("✓ Chart in {}", path.display()));
        }
        match report.results.as_slice() {
            [result] if self.json => {
                output::json(&SingleReport { result, host: &report.host, command: &report.command })?;
            }
            _ if self.json => output::json(&report)?,
            _ => report.print()?,
        }
        Ok(0)
    }

    async fn measure(
        &self,
        case: Case,
        floor: &Path,
        monitor: &Path,
        scratch: &Path,
        context: &Context,
    ) -> anyhow::Result<Result> {
        let title = format!("n={}, {}, {}", case.n, case.memory, units::count(self.runs as usize, "pair"));
        let step = context.progress.step(&title);
        step.set_items(self.runs.into());
        let (mut floors, mut ours) = (Vec::new(), Vec::new());
        for pair in 0..self.runs {
            // They take turns in going first, so that neither profits from what the other warmed.
            if pair % 2 == 0 {
                floors.push(case.run_floor(floor, &scratch.join("floor.memory")).await?);
                ours.push(case.run_ours(monitor, scratch).await?);
            } else {
                ours.push(case.run_ours(monitor, scratch).await?);
                floors.push(case.run_floor(floor, &scratch.join("floor.memory")).await?);
            }
            step.set_position(u64::from(pair) + 1);
        }
        step.done(title);
        let walls: Vec<f64> = ours.iter().map(|run| run.wall_ms).collect();
        let (floor_ms, ours_ms) = (median(floors.iter().copied()), median(walls.iter().copied()));
        Ok(Result {
            n: case.n,
            runs: self.runs,
            memory_mib: case.memory.as_mib(),
            floor_ms,
            ours_ms,
            ratio: ours_ms / floor_ms,
            ours_without_memory_slot_ms: median(ours.iter().map(Run::without_memory_slot)),
            ratio_of_pairs: median(walls.iter().zip(&floors).map(|(ours, floor)| ours / floor)),
            floor: summarise(floors),
            ours: summarise(walls),
            stages_us: stage_medians(&ours),
        })
    }

    fn command(&self) -> String {
        let counts: String = self.n.iter().map(|n| format!(" --n {n}")).collect();
        let sizes: String = self.memory.iter().map(|memory| format!(" --memory {}M", memory.as_mib())).collect();
        format!("forkd bench raw{counts} --runs {}{sizes}", self.runs)
    }
}

impl Case {
    async fn run_floor(self, program: &Path, memory_file: &Path) -> anyhow::Result<f64> {
        let mut command = Command::new(program);
        command
            .arg(self.memory.as_mib().to_string())
            .arg(self.touched_mib().to_string())
            .arg(self.n.to_string())
            .arg("file")
            .arg(memory_file);
        let text = run(command, "the floor").await?;
        parse_floor(&text, self.n).with_context(|| format!("the floor said: {}", text.trim()))
    }

    async fn run_ours(self, monitor: &Path, scratch: &Path) -> anyhow::Result<Run> {
        let mut command = Command::new(monitor);
        // The first run is the zygote's first use, of which a zygote has only one; the last counts.
        command.arg("bench-raw").args(["--runs", "2"]).arg("--n").arg(self.n.to_string());
        command.arg("--memory-mib").arg(self.memory.as_mib().to_string());
        command.arg("--touched-mib").arg(self.touched_mib().to_string());
        command.arg("--scratch").arg(scratch);
        let text = run(command, "forkd-vmm bench-raw").await?;
        parse_run(&text).with_context(|| format!("forkd-vmm bench-raw said: {}", text.trim()))
    }

    fn touched_mib(&self) -> u64 {
        TOUCHED_MIB.min(self.memory.as_mib() / 2)
    }
}

impl Run {
    /// The wall time less what the copies spent in the call for their memory slot, on as many processors as they
    /// can have had.
    fn without_memory_slot(&self) -> f64 {
        let Some((_, slots)) = self.stages.iter().find(|(name, _)| name == MEMORY_SLOT) else { return self.wall_ms };
        let processors = std::thread::available_parallelism().map_or(1, usize::from).min(slots.len());
        self.wall_ms - slots.iter().sum::<f64>() / 1e3 / processors as f64
    }
}

impl Report {
    fn print(&self) -> anyhow::Result<()> {
        let mut table = output::table(&[
            "CHILDREN",
            "MEMORY MiB",
            "FLOOR ms p50",
            "p90",
            "FORKD ms p50",
            "p90",
            "p99",
            "RATIO",
            "FORKD ms/CHILD",
            "LESS MEMORY SLOT ms",
        ]);
        for result in &self.results {
            table.add_row([
                result.n.to_string(),
                result.memory_mib.to_string(),
                format!("{:.2}", result.floor_ms),
                format!("{:.2}", result.floor.p90),
                format!("{:.2}", result.ours_ms),
                format!("{:.2}", result.ours.p90),
                format!("{:.2}", result.ours.p99),
                format!("{:.2}", result.ratio),
                format!("{:.3}", result.ours_ms / f64::from(result.n)),
                format!("{:.2}", result.ours_without_memory_slot_ms),
            ]);
        }
        output::print_table(&mut table)?;
        if let Some(largest) = self.results.iter().max_by_key(|result| result.n) {
            let stages: Vec<String> = largest.stages_us.iter().map(|(name, us)| format!("{name} {:.0}", us)).collect();
            output::line(format_args!("stages of one of {} children, µs: {}", largest.n, stages.join(", ")))?;
        }
        output::line(format_args!("{}\n{}", self.host.describe(), self.command))
    }

    fn chart(&self) -> String {
        let sizes = self.results.iter().any(|result| result.memory_mib != self.results[0].memory_mib);
        let name = |result: &Result| match sizes {
            true => format!("{}, {} MiB ({:.2} ×)", result.n, result.memory_mib, result.ratio),
            false => format!("{} ({:.2} ×)", result.n, result.ratio),
        };
        let bars = |result: &Result| (name(result), vec![result.floor_ms, result.ours_ms]);
        let groups: Vec<(String, Vec<f64>)> = self.results.iter().map(bars).collect();
        Chart {
            title: "Time until the last of N children is in its guest",
            notes: &[self.host.describe(), self.command.clone()],
            unit: "ms",
            series: &["floor: fork(2) and bare KVM", "forkd: whole monitor"],
            groups: &groups,
        }
        .svg()
    }
}

/// The wall time in what the floor prints: `… ran=N … last_child_in_guest_ms=X …`.
fn parse_floor(text: &str, n: u32) -> anyhow::Result<f64> {
    let ran: u32 =
        field(text, "ran").and_then(|ran| ran.parse().ok()).context("it does not say how many children ran")?;
    anyhow::ensure!(ran == n, "only {ran} of {n} children ran");
    field(text, "last_child_in_guest_ms").and_then(|ms| ms.parse().ok()).context("it does not say how long it took")
}

/// The last JSON object in what `forkd-vmm bench-raw` prints.
fn parse_run(text: &str) -> anyhow::Result<Run> {
    let line = text.lines().rev().find(|line| line.trim_start().starts_with('{')).context("there is no JSON in it")?;
    let value: Value = serde_json::from_str(line)?;
    let wall_ms = value.get("wall_ms").and_then(Value::as_f64).context("it has no wall_ms")?;
    let mut stages: Vec<(String, Vec<f64>)> = Vec::new();
    let children = value.get("per_child").and_then(Value::as_array).map_or(&[] as &[Value], Vec::as_slice);
    let children = children.iter().map(|child| child.get("stages").unwrap_or(child));
    for stage in children.filter_map(Value::as_array).flatten() {
        let (Some(name), Some(us)) =
            (stage.get("name").and_then(Value::as_str), stage.get("us").and_then(Value::as_f64))
        else {
            continue;
        };
        match stages.iter_mut().find(|(known, _)| known == name) {
            Some((_, values)) => values.push(us),
            None => stages.push((name.to_owned(), vec![us])),
        }
    }
    Ok(Run { wall_ms, stages })
}

fn stage_medians(runs: &[Run]) -> Vec<(String, f64)> {
    let mut medians: Vec<(String, Vec<f64>)> = Vec::new();
    for (name, values) in runs.iter().flat_map(|run| &run.stages) {
        let of_run = median(values.iter().copied());
        match medians.iter_mut().find(|(known, _)| known == name) {
            Some((_, values)) => values.push(of_run),
            None => medians.push((name.clone(), vec![of_run])),
        }
    }
    medians.into_iter().map(|(name, values)| (name, median(values))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_is_read_and_missing_children_are_noticed() {
        let text = "children=10 ran=10 backing=file mem_mib=512 touched_mib=64 forks_issued_ms=3.1 \
                    last_child_in_guest_ms=9.4 per_child_ms=0.940\n";
        assert_eq!(parse_floor(text, 10).expect("whole"), 9.4);
        assert!(parse_floor(text, 11).is_err());
        assert!(parse_floor("", 1).is_err());
    }

    #[test]
    fn a_run_is_read_with_its_stages() {
        let text = "{\"wall_ms\":12.5,\"per_child\":[[{\"name\":\"fork\",\"us\":100},{\"name\":\"vm\",\"us\":30}],\
                    [{\"name\":\"fork\",\"us\":300},{\"name\":\"vm\",\"us\":10}]]}\n";
        let run = parse_run(text).expect("whole");
        assert_eq!(run.wall_ms, 12.5);
        assert_eq!(stage_medians(&[run]), [("fork".to_owned(), 200.0), ("vm".to_owned(), 20.0)]);
        assert!(parse_run("{}").is_err() && parse_run("").is_err());
    }

    #[test]
    fn the_memory_slot_is_left_out_of_what_one_copy_took() {
        let text =
            "{\"wall_ms\":3.5,\"per_child\":[[{\"name\":\"memory_slot\",\"us\":2000},{\"name\":\"vcpus\",\"us\":30}]]}";
        assert_eq!(parse_run(text).expect("whole").without_memory_slot(), 1.5);
        assert_eq!(parse_run("{\"wall_ms\":3.5}").expect("whole").without_memory_slot(), 3.5);
    }
}
