//! What a quick start found out: a table per child, stages, totals.

use std::collections::BTreeSet;
use std::time::Duration;

use forkd_types::rest::{SandboxMemory, SpawnFailure, SpawnReport, SpawnTimings};
use serde::Serialize;

use crate::failure::advised;
use crate::measurement::{Child, Evaluation};
use crate::statistics::{median, summarise};
use crate::{measurement, output, units};

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    children: Vec<Row>,
    failures: Vec<SpawnFailure>,
    /// From the request until the last agent had answered.
    spawn_us: u64,
    /// From the first evaluation's sending until the last answer.
    evaluate_us: u64,
    /// From the start of the program.
    total_ms: u64,
}

/// One child.
#[derive(Debug, Serialize)]
struct Row {
    timings: SpawnTimings,
    answer: Result<String, String>,
    first_eval_us: u64,
    hostname: String,
    urandom: String,
    numpy_random: String,
    at_birth: Option<SandboxMemory>,
    after_eval: Option<SandboxMemory>,
}

impl Report {
    /// Puts together what was measured of each child.
    pub(super) fn new(
        spawn: SpawnReport,
        children: Vec<Child>,
        differing: Vec<Evaluation>,
        evaluate_us: u64,
        total: Duration,
    ) -> Self {
        let children = children.into_iter().zip(differing).map(|(child, differing)| Row::new(child, &differing));
        Self {
            children: children.collect(),
            failures: spawn.failures,
            spawn_us: spawn.total_us,
            evaluate_us,
            total_ms: total.as_millis() as u64,
        }
    }

    /// Writes the tables and totals.
    pub(super) fn print(&self) -> anyhow::Result<()> {
        self.print_children()?;
        output::line("")?;
        self.print_stages()?;
        output::line("")?;
        self.print_totals()
    }

    fn print_children(&self) -> anyhow::Result<()> {
        let mut table = output::table(&[
            "CHILD",
            "NUMPY SAYS",
            "URANDOM",
            "NUMPY RANDOM",
            "ANSWERED ms",
            "FIRST EVAL ms",
            "BIRTH MiB",
            "PRIVATE",
            "AFTER MiB",
            "PRIVATE",
        ]);
        for row in &self.children {
            let mib = |memory: &Option<SandboxMemory>, pick: fn(&SandboxMemory) -> u64| {
                memory.as_ref().map_or_else(|| "—".to_owned(), |memory| units::mebibytes(pick(memory)))
            };
            table.add_row([
                row.timings.id.to_string(),
                row.answer.clone().unwrap_or_else(|error| first_line(&error)),
                row.urandom.clone(),
                row.numpy_random.clone(),
                units::milliseconds(row.timings.answered_us),
                units::milliseconds(row.first_eval_us),
                mib(&row.at_birth, |memory| memory.pss_bytes),
                mib(&row.at_birth, |memory| memory.private_bytes),
                mib(&row.after_eval, |memory| memory.pss_bytes),
                mib(&row.after_eval, |memory| memory.private_bytes),
            ]);
        }
        for failure in &self.failures {
            table.add_row([failure.id.to_string(), format!("failed: {}", first_line(&failure.error))]);
        }
        output::print_table(&mut table)
    }

    fn print_stages(&self) -> anyhow::Result<()> {
        let mut table = output::table(&["STAGE", "p50 ms", "p90 ms", "max ms"]);
        for (name, values) in measurement::stages(self.children.iter().map(|row| &row.timings)) {
            let summary = summarise(values.iter().map(|&us| us as f64 / 1e3));
            table.add_row([
                name,
                format!("{:.2}", summary.p50),
                format!("{:.2}", summary.p90),
                format!("{:.2}", summary.max),
            ]);
        }
        output::print_table(&mut table)
    }

    fn print_totals(&self) -> anyhow::Result<()> {
        let alive = self.children.len();
        let asked = alive + self.failures.len();
        output::line(format_args!(
            "{alive} of {asked} children answered after {}; all had evaluated after another {}",
            units::microseconds(self.spawn_us),
            units::microseconds(self.evaluate_us)
        ))?;
        let private = |pick: fn(&Row) -> &Option<SandboxMemory>| {
            let values = self.children.iter().filter_map(|row| pick(row).as_ref());
            median(values.map(|memory| memory.private_bytes as f64)) / (1u64 << 20) as f64
        };
        output::line(format_args!(
            "each child costs {:.2} MiB of its own at birth, {:.2} MiB after its first evaluation (median)",
            private(|row| &row.at_birth),
            private(|row| &row.after_eval)
        ))?;
        output::line(format_args!("everything took {}", units::duration(Duration::from_millis(self.total_ms))))
    }

    /// Whether every child came up, computed `expected`, and differs from its siblings.
    pub(super) fn verdict(&self, asked: u32, expected: &str) -> anyhow::Result<()> {
        let fail = |text: String| Err(advised(anyhow::anyhow!(text), "forkd doctor"));
        if self.children.len() != asked as usize {
            return fail(format!("{} of {asked} children did not come up", asked as usize - self.children.len()));
        }
        for row in &self.children {
            match &row.answer {
                Ok(answer) if answer == expected => {}
                Ok(answer) => return fail(format!("{} answered {answer}, not {expected}", row.timings.id)),
                Err(error) => return fail(format!("{} could not evaluate: {error}", row.timings.id)),
            }
        }
        for (what, pick) in [
            ("host name", (|row| &row.hostname) as fn(&Row) -> &String),
            ("kernel random", |row| &row.urandom),
            ("numpy random", |row| &row.numpy_random),
        ] {
            let distinct: BTreeSet<&String> = self.children.iter().map(pick).collect();
            if distinct.len() != self.children.len() || distinct.iter().any(|value| value.is_empty()) {
                return fail(format!("children do not differ in their {what}: {} different", distinct.len()));
            }
        }
        Ok(())
    }
}

impl Row {
    fn new(child: Child, differing: &Evaluation) -> Self {
        let (hostname, urandom, numpy_random) = serde_json::from_str::<(String, String, f64)>(differing.stdout.trim())
            .map_or_else(
                |_| Default::default(),
                |(hostname, urandom, random)| (hostname, urandom, format!("{random:.6}")),
            );
        Self {
            timings: child.timings,
            answer: match child.first.error {
                Some(error) => Err(error),
                None => Ok(child.first.result),
            },
            first_eval_us: child.first.us,
            hostname,
            urandom,
            numpy_random,
            at_birth: child.at_birth,
            after_eval: child.after_eval,
        }
    }
}

fn first_line(text: &str) -> String {
    text.trim().lines().last().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_types::{SandboxId, StageTimings};

    fn report(stdouts: &[&str]) -> Report {
        let child = |(number, stdout): (usize, &&str)| {
            let id = SandboxId::new(1, number as u64);
            let evaluation = Evaluation { result: "[0.0]".into(), stdout: (*stdout).to_owned(), us: 5, error: None };
            let timings = SpawnTimings { id: id.clone(), answered_us: 9, stages: StageTimings::default() };
            let child = Child { id, timings, at_birth: None, first: evaluation.clone(), after_eval: None };
            (child, evaluation)
        };
        let (children, differing) = stdouts.iter().enumerate().map(child).unzip();
        let spawn = SpawnReport {
            sandboxes: Vec::new(),
            failures: Vec::new(),
            timings: Vec::new(),
            total_us: 10,
            warnings: Vec::new(),
        };
        Report::new(spawn, children, differing, 1, Duration::from_secs(1))
    }

    #[test]
    fn children_that_differ_pass() {
        let report = report(&["[\"a\", \"00\", 0.25]\n", "[\"b\", \"01\", 0.5]\n"]);
        report.verdict(2, "[0.0]").expect("they differ");
        let error = report.verdict(3, "[0.0]").expect_err("one is missing");
        assert!(error.to_string().contains("1 of 3"), "{error}");
        let error = report.verdict(2, "[1.0]").expect_err("wrong answer");
        assert!(error.to_string().contains("answered [0.0], not [1.0]"), "{error}");
    }

    #[test]
    fn children_that_are_alike_or_say_nothing_fail() {
        for (stdouts, what) in [
            (["[\"a\", \"00\", 0.25]", "[\"a\", \"01\", 0.5]"], "host name"),
            (["[\"a\", \"00\", 0.25]", "[\"b\", \"00\", 0.5]"], "kernel random"),
            (["[\"a\", \"00\", 0.25]", "[\"b\", \"01\", 0.25]"], "numpy random"),
            (["[\"a\", \"00\", 0.25]", "garbage"], "host name"),
        ] {
            let error = report(&stdouts).verdict(2, "[0.0]").expect_err("alike");
            assert!(error.to_string().contains(what), "{error}");
        }
    }
}
