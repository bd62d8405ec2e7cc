//! What `bench api` says.

use serde::Serialize;

use super::super::Host;
use super::calls::{Call, Calls};
use super::fan_out::FanOut;
use super::soak::Soak;
use crate::output;

/// The whole report.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) host: Host,
    pub(super) place: &'static str,
    pub(super) command: String,
    #[serde(flatten)]
    pub(super) calls: Calls,
    pub(super) fan_out: Option<FanOut>,
    pub(super) soak: Option<Soak>,
}

impl Report {
    /// Prints the tables.
    pub(super) fn print(&self) -> anyhow::Result<()> {
        let mut table = output::table(&["CALL, ms p50", "WHOLE", "MONITOR AND AGENT", "DAEMON", "p99"]);
        for (name, Call { whole_ms, below_ms, overhead_ms }) in
            [("spawn one child", &self.calls.spawn), ("ping", &self.calls.ping)]
        {
            table.add_row([
                name.to_owned(),
                ms(whole_ms.p50),
                ms(below_ms.p50),
                ms(overhead_ms.p50),
                ms(overhead_ms.p99),
            ]);
        }
        output::print_table(&mut table)?;
        if let Some(FanOut { n, one_call, separate_calls }) = &self.fan_out {
            output::line("")?;
            let mut table = output::table(&["EVALUATED, ms", "CHILDREN", "p50", "p95", "p99", "ALL"]);
            for (name, way) in [("of one call", one_call), ("of a call each", separate_calls)] {
                let times = &way.evaluated_ms;
                table.add_row([
                    name.to_owned(),
                    format!("{}/{n}", way.evaluated),
                    ms(times.p50),
                    ms(times.p95),
                    ms(times.p99),
                    ms(times.max),
                ]);
            }
            output::print_table(&mut table)?;
            for failure in one_call.failures.iter().chain(&separate_calls.failures) {
                output::line(format_args!("failed: {failure}"))?;
            }
        }
        if let Some(soak) = &self.soak {
            output::line("")?;
            self.print_soak(soak)?;
        }
        output::line(format_args!("\n{}, in {}\n{}", self.host.describe(), self.place, self.command))
    }

    fn print_soak(&self, soak: &Soak) -> anyhow::Result<()> {
        let Soak { clients, sandboxes, seconds, answered, errors, .. } = soak;
        output::line(format_args!(
            "{clients} clients, {sandboxes} sandboxes, {seconds:.0} s: {answered} answers, {errors} errors"
        ))?;
        let mut table = output::table(&["CALL, ms", "p50", "p95", "p99", "max"]);
        for (name, times) in [("ping", &soak.ping_ms), ("exec true", &soak.exec_ms)] {
            table.add_row([name.to_owned(), ms(times.p50), ms(times.p95), ms(times.p99), ms(times.max)]);
        }
        output::print_table(&mut table)?;
        for (text, count) in &soak.error_texts {
            output::line(format_args!("{count} × {text}"))?;
        }
        match soak.resident_mib {
            Some([first, last]) => {
                output::line(format_args!("the daemon's memory: {first:.1} MiB, then {last:.1} MiB"))
            }
            None => output::line("the daemon does not say how much memory it has"),
        }
    }
}

fn ms(value: f64) -> String {
    format!("{value:.2}")
}
