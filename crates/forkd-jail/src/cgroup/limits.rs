//! What a group's processes may take together, and how the kernel is told.

use forkd_types::ByteSize;

use super::device::DeviceNumber;

/// The period of `cpu.max` in microseconds: the kernel's own default.
const CPU_PERIOD_US: u64 = 100_000;

/// Limits of one group. What is `None` is not limited.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct GroupLimits {
    /// The processes are ended when they need more than this and nothing can be reclaimed.
    pub memory_max: Option<ByteSize>,
    /// Above this the processes are slowed down and their memory is reclaimed.
    pub memory_high: Option<ByteSize>,
    /// How much may be swapped out.
    pub swap_max: Option<ByteSize>,
    /// Share of the processors against other groups when they are scarce; 100 is everybody's default.
    pub cpu_weight: Option<u16>,
    /// Thousandths of a processor.
    pub cpu_max_millis: Option<u32>,
    /// Processes and threads.
    pub pids_max: Option<u32>,
    /// What may be asked of the disk.
    pub io: IoLimits,
}

/// Limits on one block device. What is `None` is not limited.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct IoLimits {
    /// Bytes read in a second.
    pub read_bytes: Option<u64>,
    /// Bytes written in a second.
    pub write_bytes: Option<u64>,
    /// Read requests in a second.
    pub read_requests: Option<u64>,
    /// Write requests in a second.
    pub write_requests: Option<u64>,
}

impl IoLimits {
    /// Whether nothing is limited.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// A line for `io.max`.
    fn line(&self, device: DeviceNumber) -> String {
        let keys = [
            ("rbps", self.read_bytes),
            ("wbps", self.write_bytes),
            ("riops", self.read_requests),
            ("wiops", self.write_requests),
        ];
        let mut line = device.to_string();
        for (key, value) in keys.iter().filter_map(|(key, value)| value.map(|value| (key, value))) {
            line.push_str(&format!(" {key}={value}"));
        }
        line
    }
}

impl GroupLimits {
    /// The controllers that these limits need.
    pub fn controllers(&self) -> impl Iterator<Item = &'static str> {
        let memory = self.memory_max.or(self.memory_high).or(self.swap_max).is_some();
        let cpu = self.cpu_weight.is_some() || self.cpu_max_millis.is_some();
        [("memory", memory), ("cpu", cpu), ("pids", self.pids_max.is_some()), ("io", !self.io.is_empty())]
            .into_iter()
            .filter_map(|(controller, needed)| needed.then_some(controller))
    }

    /// The files of a group to write, and what; `device` is the disk that `io` is about.
    pub(super) fn files(&self, device: Option<DeviceNumber>) -> Vec<(&'static str, String)> {
        let bytes = |size: ByteSize| size.bytes().to_string();
        let mut files = Vec::new();
        let mut limit = |file, value: Option<String>| files.extend(value.map(|value| (file, value)));
        limit("memory.max", self.memory_max.map(bytes));
        limit("memory.high", self.memory_high.map(bytes));
        limit("memory.swap.max", self.swap_max.map(bytes));
        limit("cpu.weight", self.cpu_weight.map(|weight| weight.to_string()));
        limit("cpu.max", self.cpu_max_millis.map(cpu_max));
        limit("pids.max", self.pids_max.map(|pids| pids.to_string()));
        limit("io.max", device.filter(|_| !self.io.is_empty()).map(|device| self.io.line(device)));
        files
    }
}

/// Quota and period for thousandths of a processor.
fn cpu_max(millis: u32) -> String {
    format!("{} {CPU_PERIOD_US}", u64::from(millis) * CPU_PERIOD_US / 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_limit_is_a_line_in_the_file_of_its_name() {
        let limits = GroupLimits {
            memory_max: Some(ByteSize::mib(64)),
            memory_high: Some(ByteSize::mib(48)),
            swap_max: Some(ByteSize(0)),
            cpu_weight: Some(50),
            cpu_max_millis: Some(1500),
            pids_max: Some(32),
            io: IoLimits { read_bytes: Some(1 << 20), write_requests: Some(100), ..IoLimits::default() },
        };
        let device = DeviceNumber { major: 8, minor: 16 };
        let files: Vec<_> = limits.files(Some(device)).into_iter().collect();
        let expected = [
            ("memory.max", "67108864"),
            ("memory.high", "50331648"),
            ("memory.swap.max", "0"),
            ("cpu.weight", "50"),
            ("cpu.max", "150000 100000"),
            ("pids.max", "32"),
            ("io.max", "8:16 rbps=1048576 wiops=100"),
        ];
        assert_eq!(files.iter().map(|(file, text)| (*file, text.as_str())).collect::<Vec<_>>(), expected);
        assert_eq!(limits.controllers().collect::<Vec<_>>(), ["memory", "cpu", "pids", "io"]);
    }

    #[test]
    fn nothing_is_written_for_what_is_not_limited() {
        assert!(GroupLimits::default().files(None).is_empty());
        assert_eq!(GroupLimits::default().controllers().count(), 0);
        let swap = GroupLimits { swap_max: Some(ByteSize(0)), ..GroupLimits::default() };
        assert_eq!(swap.controllers().collect::<Vec<_>>(), ["memory"]);
    }
}
