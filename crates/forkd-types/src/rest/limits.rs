//! What a sandbox may take of its host, and how one ended that took more.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What one sandbox may take of its host; what is left out is not limited. Copies of a sandbox have its limits
/// unless told otherwise, limit by limit.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SandboxLimits {
    /// Memory that it has for itself, in MiB: pages that it wrote, and its monitor's own. When it needs more it ends
    /// with the code `oom`. Pages that it shares with its snapshot do not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 1))]
    pub memory_mib: Option<u64>,
    /// Above this much memory, in MiB, it is slowed down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 1))]
    pub memory_high_mib: Option<u64>,
    /// How much of its memory may be swapped out, in MiB; none when there is a `memory_mib` and this is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swap_mib: Option<u64>,
    /// Its share of the processors against other sandboxes when they are scarce, 1 to 10000; 100 is the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 1, maximum = 10000))]
    pub cpu_weight: Option<u16>,
    /// How many of the host's processors it may keep busy, as in 0.5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<Cpus>,
    /// Processes and threads that its monitor may have on the host, at least 16; those in the guest do not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 16))]
    pub pids: Option<u32>,
    /// How much it may write to its disks beyond what they held when it began, in MiB. Its guest sees an
    /// input/output error then; discarded blocks can be written again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 1))]
    pub disk_mib: Option<u64>,
    /// Bytes a second that it may read from the host's disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 4096))]
    pub disk_read_bps: Option<u64>,
    /// Bytes a second that it may write to the host's disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 4096))]
    pub disk_write_bps: Option<u64>,
    /// Requests a second that it may make to read from the host's disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 1))]
    pub disk_read_iops: Option<u64>,
    /// Requests a second that it may make to write to the host's disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 1))]
    pub disk_write_iops: Option<u64>,
}

impl SandboxLimits {
    /// Whether nothing is limited.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// These limits, and those of `other` where these say nothing.
    pub fn or(self, other: Self) -> Self {
        Self {
            memory_mib: self.memory_mib.or(other.memory_mib),
            memory_high_mib: self.memory_high_mib.or(other.memory_high_mib),
            swap_mib: self.swap_mib.or(other.swap_mib),
            cpu_weight: self.cpu_weight.or(other.cpu_weight),
            cpus: self.cpus.or(other.cpus),
            pids: self.pids.or(other.pids),
            disk_mib: self.disk_mib.or(other.disk_mib),
            disk_read_bps: self.disk_read_bps.or(other.disk_read_bps),
            disk_write_bps: self.disk_write_bps.or(other.disk_write_bps),
            disk_read_iops: self.disk_read_iops.or(other.disk_read_iops),
            disk_write_iops: self.disk_write_iops.or(other.disk_write_iops),
        }
    }
}

/// A number of processors, in thousandths; a plain number in JSON.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[cfg_attr(feature = "openapi", schema(value_type = f64))]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Cpus(u32);

impl Cpus {
    /// The fewest: with less than a hundredth the kernel's scheduler does not know what to do.
    pub const LEAST: Self = Self(10);
    /// The most.
    pub const MOST: Self = Self(4_096_000);

    /// Thousandths of a processor.
    pub const fn millis(self) -> u32 {
        self.0
    }
}

impl TryFrom<f64> for Cpus {
    type Error = String;

    fn try_from(cpus: f64) -> Result<Self, String> {
        let millis = (cpus * 1000.0).round();
        if millis.is_finite() && (f64::from(Self::LEAST.0)..=f64::from(Self::MOST.0)).contains(&millis) {
            return Ok(Self(millis as u32));
        }
        Err(format!("{cpus} processors cannot be given; ask for {} to {}", Self::LEAST, Self::MOST))
    }
}

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", f64::from(self.0) / 1000.0)
    }
}

impl Serialize for Cpus {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(f64::from(self.0) / 1000.0)
    }
}

impl<'de> Deserialize<'de> for Cpus {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        f64::deserialize(deserializer)?.try_into().map_err(serde::de::Error::custom)
    }
}

/// How a sandbox's machine ended.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndCode {
    /// Its guest powered it off.
    PoweredOff,
    /// Its guest asked for a reboot.
    Rebooted,
    /// Its guest's kernel panicked.
    Panicked,
    /// The processor could not go on.
    Crashed,
    /// It needed more memory than its limit allows, or than the host had.
    Oom,
    /// Somebody asked for it.
    Killed,
    /// It is on disk.
    Suspended,
    /// Its monitor is gone and nobody knows why, or an earlier release made the record.
    Lost,
}

impl EndCode {
    /// As it is written in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::PoweredOff => "powered_off",
            Self::Rebooted => "rebooted",
            Self::Panicked => "panicked",
            Self::Crashed => "crashed",
            Self::Oom => "oom",
            Self::Killed => "killed",
            Self::Suspended => "suspended",
            Self::Lost => "lost",
        }
    }

    /// The code of this name.
    pub fn named(name: &str) -> Option<Self> {
        const ALL: [EndCode; 8] = [
            EndCode::PoweredOff,
            EndCode::Rebooted,
            EndCode::Panicked,
            EndCode::Crashed,
            EndCode::Oom,
            EndCode::Killed,
            EndCode::Suspended,
            EndCode::Lost,
        ];
        ALL.into_iter().find(|code| code.name() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_overridden_one_by_one() {
        let of = |text| serde_json::from_str::<SandboxLimits>(text).expect("valid");
        let own = of(r#"{"memory_mib":64,"cpus":0.5}"#);
        let inherited = of(r#"{"memory_mib":512,"pids":32}"#);
        let both = serde_json::to_string(&own.or(inherited)).expect("plain data");
        assert_eq!(both, r#"{"memory_mib":64,"cpus":0.5,"pids":32}"#);
        assert!(SandboxLimits::default().is_empty() && !own.is_empty());
    }

    #[test]
    fn a_limit_that_nobody_knows_is_refused_rather_than_left_out() {
        let error = serde_json::from_str::<SandboxLimits>(r#"{"memory_mb":64}"#).expect_err("unknown").to_string();
        assert!(error.contains("memory_mb") && error.contains("memory_mib"), "{error}");
    }

    #[test]
    fn processors_are_read_at_their_edges() {
        for (text, millis) in [("0.01", 10), ("1", 1000), ("1.5", 1500), ("4096", 4_096_000)] {
            assert_eq!(serde_json::from_str::<Cpus>(text).expect(text).millis(), millis);
        }
        for text in ["0", "0.004", "-1", "4097", "1e300"] {
            let error = serde_json::from_str::<Cpus>(text).expect_err(text).to_string();
            assert!(error.contains("0.01 to 4096"), "{error}");
        }
    }

    #[test]
    fn a_code_is_found_by_the_name_that_clients_see() {
        for code in [EndCode::PoweredOff, EndCode::Oom, EndCode::Lost] {
            assert_eq!(serde_json::to_string(&code).expect("plain data"), format!("{:?}", code.name()));
            assert_eq!(EndCode::named(code.name()), Some(code));
        }
        assert_eq!(EndCode::named("struck"), None);
    }
}
