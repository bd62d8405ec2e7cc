//! The daemon's own process, by the names that Prometheus's client libraries use.

use forkd_types::PAGE_SIZE;
use metrics::{describe_gauge, gauge};

pub(super) fn describe() {
    describe_gauge!("process_resident_memory_bytes", "Memory that the daemon has.");
    describe_gauge!("process_open_fds", "Descriptors that the daemon has open.");
}

/// Looks at the process as it is now; what `/proc` does not tell keeps its last value.
pub(super) fn look() {
    if let Some(bytes) = std::fs::read_to_string("/proc/self/statm").ok().and_then(|statm| resident(&statm)) {
        gauge!("process_resident_memory_bytes").set(bytes as f64);
    }
    if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
        // One of them is the directory's own.
        gauge!("process_open_fds").set(open.count().saturating_sub(1) as f64);
    }
}

/// The second field of `statm`, which is in pages.
fn resident(statm: &str) -> Option<u64> {
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(pages * PAGE_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resident_memory_is_in_bytes() {
        assert_eq!(resident("5000 300 200 10 0 400 0\n"), Some(300 * 4096));
        assert_eq!(resident(""), None);
        assert!(resident(&std::fs::read_to_string("/proc/self/statm").expect("Linux has it")) > Some(1 << 20));
    }
}
