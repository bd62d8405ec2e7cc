//! `--limit NAME=VALUE`: what sandboxes may take of the host.

use clap::Args;
use forkd_types::rest::SandboxLimits;

/// Limits, one by one.
#[derive(Args, Debug, Clone)]
pub(crate) struct LimitOptions {
    /// What each may take of the host, as in cpus=0.5; repeat for more. Names: memory_mib, memory_high_mib, swap_mib,
    /// cpu_weight, cpus, pids, disk_mib, disk_read_bps, disk_write_bps, disk_read_iops, disk_write_iops
    #[arg(long = "limit", value_name = "NAME=VALUE", value_parser = one)]
    limits: Vec<SandboxLimits>,
}

impl LimitOptions {
    /// All of them, the later of two of a name; none when none was given.
    pub(crate) fn all(&self) -> Option<SandboxLimits> {
        self.limits.iter().copied().reduce(|earlier, later| later.or(earlier))
    }
}

fn one(text: &str) -> Result<SandboxLimits, String> {
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE, as in cpus=0.5")?;
    let value: serde_json::Number = value.parse().map_err(|_| format!("{value:?} is not a number"))?;
    let limits = serde_json::Value::Object([(name.to_owned(), value.into())].into_iter().collect());
    serde_json::from_value(limits).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_add_up_and_the_later_wins() {
        let limits = ["cpus=0.5", "memory_mib=64", "cpus=2"].map(|text| one(text).expect(text)).to_vec();
        let all = LimitOptions { limits }.all().expect("some");
        let expected = serde_json::json!({"memory_mib": 64, "cpus": 2.0});
        assert_eq!(serde_json::to_value(all).expect("plain data"), expected);
        assert_eq!(LimitOptions { limits: Vec::new() }.all(), None);
    }

    #[test]
    fn what_is_no_limit_is_refused_with_what_would_be() {
        assert!(one("memory=64").expect_err("unknown").contains("memory_mib"));
        assert!(one("cpus=all").expect_err("no number").contains("\"all\""));
        assert!(one("cpus").expect_err("no value").contains("NAME=VALUE"));
        assert!(one("cpus=0").expect_err("none").contains("0.01 to 4096"));
    }
}
