//! Limits as a request asks for them: checked, and as the kernel and the monitor take them.

use forkd_jail::cgroup::{GroupLimits, IoLimits};
use forkd_types::ByteSize;
use forkd_types::rest::SandboxLimits;

use crate::error::{NodeError, NodeResult};

/// Processes and threads that a monitor may have when nothing is said: it has one for each vCPU and one for the rest,
/// and no reason for more.
const PIDS: u32 = 64;

/// The fewest that make sense: a machine has up to eight vCPUs.
const FEWEST_PIDS: u32 = 16;

/// What the kernel's weights go up to.
const MOST_WEIGHT: u16 = 10_000;

/// The limits that a request asks for: `memory_limit_mib` is the older way to say one of them.
///
/// # Errors
/// [`NodeError::BadField`] for a limit that cannot be.
pub(crate) fn asked(memory_limit_mib: Option<u64>, limits: Option<SandboxLimits>) -> NodeResult<SandboxLimits> {
    let wrong = |field, value: String, rule| Err(NodeError::BadField { field, value, rule });
    let mut limits = limits.unwrap_or_default();
    match (memory_limit_mib, limits.memory_mib) {
        (Some(0), _) => return wrong("memory_limit_mib", "0".to_owned(), "leave it out for no limit"),
        (Some(older), Some(newer)) if older != newer => {
            let rule = "limits.memory_mib says otherwise; give one of them";
            return wrong("memory_limit_mib", older.to_string(), rule);
        }
        (older, newer) => limits.memory_mib = newer.or(older),
    }
    for (field, value) in [
        ("limits.memory_mib", limits.memory_mib),
        ("limits.memory_high_mib", limits.memory_high_mib),
        ("limits.disk_mib", limits.disk_mib),
        ("limits.disk_read_iops", limits.disk_read_iops),
        ("limits.disk_write_iops", limits.disk_write_iops),
    ] {
        if value == Some(0) {
            return wrong(field, "0".to_owned(), "leave it out for no limit");
        }
    }
    for (field, value) in
        [("limits.disk_read_bps", limits.disk_read_bps), ("limits.disk_write_bps", limits.disk_write_bps)]
    {
        if let Some(rate) = value.filter(|rate| *rate < 4096) {
            return wrong(field, rate.to_string(), "it must be at least 4096, one block a second");
        }
    }
    if let Some(weight) = limits.cpu_weight.filter(|weight| !(1..=MOST_WEIGHT).contains(weight)) {
        return wrong("limits.cpu_weight", weight.to_string(), "it must be 1 to 10000");
    }
    if let Some(pids) = limits.pids.filter(|pids| *pids < FEWEST_PIDS) {
        return wrong("limits.pids", pids.to_string(), "a monitor needs at least 16");
    }
    Ok(limits)
}

/// [`asked`] of a copy of a sandbox that has `inherited`.
pub(crate) fn asked_of_copy(
    memory_limit_mib: Option<u64>,
    limits: Option<SandboxLimits>,
    inherited: SandboxLimits,
) -> NodeResult<SandboxLimits> {
    Ok(asked(memory_limit_mib, limits)?.or(inherited))
}

/// The memory limit.
pub(crate) fn memory(limits: &SandboxLimits) -> Option<ByteSize> {
    limits.memory_mib.map(mib)
}

/// How much may be written to the disks.
pub(crate) fn disk(limits: &SandboxLimits) -> Option<ByteSize> {
    limits.disk_mib.map(mib)
}

/// Those that the kernel enforces for a group of processes.
pub(crate) fn of_group(limits: &SandboxLimits) -> GroupLimits {
    let memory_max = memory(limits);
    GroupLimits {
        memory_max,
        memory_high: limits.memory_high_mib.map(mib),
        // A sandbox at its limit that swaps would be at the expense of the host's disk, and take long to end.
        swap_max: limits.swap_mib.map(mib).or(memory_max.map(|_| ByteSize(0))),
        cpu_weight: limits.cpu_weight,
        cpu_max_millis: limits.cpus.map(|cpus| cpus.millis()),
        pids_max: limits.pids,
        io: IoLimits {
            read_bytes: limits.disk_read_bps,
            write_bytes: limits.disk_write_bps,
            read_requests: limits.disk_read_iops,
            write_requests: limits.disk_write_iops,
        },
    }
}

/// [`of_group`] with what every monitor is limited to.
pub(crate) fn of_monitor(limits: &SandboxLimits) -> GroupLimits {
    let asked = of_group(limits);
    GroupLimits { pids_max: asked.pids_max.or(Some(PIDS)), ..asked }
}

fn mib(mib: u64) -> ByteSize {
    ByteSize(mib.saturating_mul(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: serde_json::Value) -> SandboxLimits {
        serde_json::from_value(body).expect("valid")
    }

    #[test]
    fn the_older_field_is_the_same_limit() {
        let newer = asked(None, Some(parse(serde_json::json!({"memory_mib": 64})))).expect("fine");
        assert_eq!(asked(Some(64), None).expect("fine"), newer);
        assert_eq!(asked(Some(64), Some(newer)).expect("both say the same"), newer);
        let error = asked(Some(65), Some(newer)).expect_err("they differ");
        assert!(matches!(error, NodeError::BadField { field: "memory_limit_mib", .. }), "{error}");
    }

    #[test]
    fn limits_that_cannot_be_are_refused_by_name() {
        for (body, wrong) in [
            (serde_json::json!({"memory_mib": 0}), "limits.memory_mib"),
            (serde_json::json!({"disk_mib": 0}), "limits.disk_mib"),
            (serde_json::json!({"disk_write_bps": 4095}), "limits.disk_write_bps"),
            (serde_json::json!({"disk_read_iops": 0}), "limits.disk_read_iops"),
            (serde_json::json!({"cpu_weight": 0}), "limits.cpu_weight"),
            (serde_json::json!({"cpu_weight": 10001}), "limits.cpu_weight"),
            (serde_json::json!({"pids": 15}), "limits.pids"),
        ] {
            match asked(None, Some(parse(body.clone()))) {
                Err(NodeError::BadField { field, .. }) => assert_eq!(field, wrong, "{body}"),
                other => panic!("{body}: {other:?}"),
            }
        }
        let edges = serde_json::json!({"pids": 16, "cpu_weight": 10000, "disk_write_bps": 4096, "swap_mib": 0});
        asked(None, Some(parse(edges))).expect("the edges themselves");
    }

    #[test]
    fn a_copy_has_the_limits_of_its_source_but_for_those_it_is_given() {
        let source = parse(serde_json::json!({"memory_mib": 64, "cpus": 0.5, "disk_mib": 10}));
        let copy = asked_of_copy(Some(128), None, source).expect("fine");
        assert_eq!(copy, parse(serde_json::json!({"memory_mib": 128, "cpus": 0.5, "disk_mib": 10})));
    }

    #[test]
    fn memory_that_is_limited_is_not_swapped_unless_said() {
        let swap = |body| of_group(&parse(body)).swap_max;
        assert_eq!(swap(serde_json::json!({"memory_mib": 64})), Some(ByteSize(0)));
        assert_eq!(swap(serde_json::json!({"memory_mib": 64, "swap_mib": 8})), Some(ByteSize::mib(8)));
        assert_eq!(swap(serde_json::json!({})), None);
        assert_eq!(of_group(&SandboxLimits::default()), GroupLimits::default());
        assert_eq!(of_monitor(&SandboxLimits::default()).pids_max, Some(PIDS));
    }
}
