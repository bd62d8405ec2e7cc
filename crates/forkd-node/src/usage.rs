//! What the monitors of sandboxes take of the host: memory, processor time, how long they have run.

use std::time::Duration;

use forkd_types::rest::SandboxUsage;

use crate::error::NodeResult;
use crate::host::blocking;
use crate::memory;
use crate::node::Node;

impl Node {
    /// What every sandbox costs, in the order of their ids.
    pub async fn usage(&self) -> NodeResult<Vec<SandboxUsage>> {
        let sandboxes: Vec<_> = self
            .roster
            .all()
            .into_iter()
            .map(|sandbox| (sandbox.info(), sandbox.machine().map(|machine| machine.process.key().pid)))
            .collect();
        blocking("reading the sizes of monitors", move || {
            let usage = sandboxes.into_iter().map(|(info, pid)| {
                // One that ends meanwhile is told of with what is known.
                let sizes = pid.and_then(|pid| memory::of_process(pid).ok());
                let times = pid.and_then(times_of);
                SandboxUsage {
                    id: info.id,
                    snapshot_tag: info.snapshot_tag,
                    created_at_unix: info.created_at_unix,
                    stopped: info.stopped,
                    expires_at_unix: info.expires_at_unix,
                    private_bytes: sizes.map(|sizes| sizes.private),
                    cpu_ms: times.map(|times| times.cpu.as_millis() as u64),
                    uptime_secs: times.map(|times| times.uptime.as_secs()),
                }
            });
            usage.collect()
        })
        .await
    }
}

/// How long a process has computed, and been.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Times {
    cpu: Duration,
    uptime: Duration,
}

fn times_of(pid: i32) -> Option<Times> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
    parse(&stat, &uptime, rustix::param::clock_ticks_per_second())
}

/// From `/proc/<pid>/stat` (fields 14, 15 and 22: user and system time, of which guest code is the former, and the
/// start since boot, in ticks) and `/proc/uptime` (seconds since boot).
fn parse(stat: &str, uptime: &str, ticks_per_second: u64) -> Option<Times> {
    // The name, field 2, may hold spaces and parentheses.
    let (_, after_name) = stat.rsplit_once(") ")?;
    let fields: Vec<&str> = after_name.split_ascii_whitespace().collect();
    let ticks = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    let seconds = |ticks: u64| Duration::from_millis(ticks.saturating_mul(1000) / ticks_per_second.max(1));
    let since_boot: f64 = uptime.split_ascii_whitespace().next()?.parse().ok()?;
    let since_boot = Duration::try_from_secs_f64(since_boot).ok()?;
    let cpu = seconds(ticks(14)?.saturating_add(ticks(15)?));
    Some(Times { cpu, uptime: since_boot.saturating_sub(seconds(ticks(22)?)) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn times_are_read_behind_any_name() {
        for name in ["forkd-vmm", "a b", ") R 9 9"] {
            let stat = format!("77 ({name}) S 1 2 3 4 5 6 7 8 9 10 150 50 13 14 15 16 17 18 4200 20 21\n");
            let times = parse(&stat, "100.50 7.00\n", 100).expect("both files are whole");
            assert_eq!(times, Times { cpu: Duration::from_secs(2), uptime: Duration::from_millis(58_500) }, "{name}");
        }
        assert!(times_of(std::process::id() as i32).is_some());
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_without_panic(stat in "\\PC{0,80}", uptime in "\\PC{0,12}") {
            let _ = parse(&stat, &uptime, 100);
            let _ = parse(&format!("1 (x) {stat}"), &uptime, 0);
        }
    }
}
