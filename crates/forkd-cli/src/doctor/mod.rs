//! `doctor`: what this host has, what it lacks, and how forkd will run on it.

mod checks;
mod network;
mod packages;

use std::fmt;

use clap::Args;
use serde::Serialize;

use crate::commands::Context;
use crate::output;

pub(crate) use packages::{Package, missing as missing_packages};

/// Arguments of `forkd doctor`.
#[derive(Args, Debug)]
pub(crate) struct DoctorArgs {
    /// Print the checks as JSON
    #[arg(long)]
    json: bool,
}

/// How a check ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// As it should be.
    Pass,
    /// Works, but less well.
    Warn,
    /// Does not work.
    Fail,
    /// Does not matter here.
    Skip,
}

/// One check.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
struct Check {
    name: &'static str,
    status: Status,
    detail: String,
    /// What to type.
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

/// All checks, as `--json` prints them.
#[derive(Debug, Serialize)]
struct Report {
    checks: Vec<Check>,
    pass: usize,
    warn: usize,
    fail: usize,
    skip: usize,
}

impl DoctorArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let step = context.progress.quick_step("Looking at this host");
        let report = Report::new(checks::all(context).await);
        step.vanish();
        if self.json {
            output::json(&report)?;
        } else {
            let colours = output::stdout_has_colours();
            for check in &report.checks {
                output::line(check.render(colours))?;
            }
            output::line(format_args!("\n{report}"))?;
        }
        Ok(u8::from(report.fail > 0))
    }
}

impl Report {
    fn new(checks: Vec<Check>) -> Self {
        let count = |status| checks.iter().filter(|check| check.status == status).count();
        let (pass, warn, fail, skip) =
            (count(Status::Pass), count(Status::Warn), count(Status::Fail), count(Status::Skip));
        Self { checks, pass, warn, fail, skip }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pass={} warn={} fail={} skip={}", self.pass, self.warn, self.fail, self.skip)
    }
}

impl Check {
    fn new(name: &'static str, status: Status, detail: impl Into<String>) -> Self {
        Self { name, status, detail: detail.into(), hint: None }
    }

    fn pass(name: &'static str, detail: impl Into<String>) -> Self {
        Self::new(name, Status::Pass, detail)
    }

    fn warn(name: &'static str, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..Self::new(name, Status::Warn, detail) }
    }

    fn fail(name: &'static str, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..Self::new(name, Status::Fail, detail) }
    }

    fn skip(name: &'static str, detail: impl Into<String>) -> Self {
        Self::new(name, Status::Skip, detail)
    }

    fn render(&self, colours: bool) -> String {
        let (glyph, colour) = match self.status {
            Status::Pass => ("✓", "32"),
            Status::Warn => ("⚠", "33"),
            Status::Fail => ("✗", "31"),
            Status::Skip => ("–", "2"),
        };
        let glyph = if colours { format!("\x1b[{colour}m{glyph}\x1b[0m") } else { glyph.to_owned() };
        let row = format!("{glyph} {:<14} {}", self.name, self.detail);
        match &self.hint {
            Some(hint) => format!("{row}\n    → {hint}"),
            None => row,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_colours_only_where_asked() {
        let check = Check::fail("qemu", "not installed", "apt-get install qemu-system-x86");
        assert_eq!(check.render(false), "✗ qemu           not installed\n    → apt-get install qemu-system-x86");
        assert!(check.render(true).starts_with("\x1b[31m✗\x1b[0m"));
    }

    #[test]
    fn the_footer_counts() {
        let report = Report::new(vec![Check::pass("a", ""), Check::skip("b", ""), Check::pass("c", "")]);
        assert_eq!(report.to_string(), "pass=2 warn=0 fail=0 skip=1");
    }
}
