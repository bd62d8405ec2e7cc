//! Memory that the meter holds, and the thread that keeps writing to it.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::poison;

const PAGE: usize = 4096;
const WORDS: usize = PAGE / size_of::<u64>();
/// Pages written between two looks at the clock: 1 MiB.
const BATCH: usize = 256;
/// What is left to the guest's other programs.
const LEFT_MIB: u64 = 64;

/// Written memory, and its writer.
pub(super) struct HeldMemory {
    shared: Arc<Shared>,
}

struct Shared {
    /// Pages a second; 0 while the writer rests.
    rate: Mutex<u64>,
    changed: Condvar,
    dirtied: AtomicU64,
}

/// How much memory the meter may take in this guest.
pub(super) fn room_mib() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    available_mib(&text)
        .map(|mib| mib.saturating_sub(LEFT_MIB))
        .ok_or_else(|| io::Error::other("/proc/meminfo has no MemAvailable"))
}

fn available_mib(meminfo: &str) -> Option<u64> {
    let value = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    value.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib >> 10)
}

impl HeldMemory {
    /// Takes `mib` of memory and writes to every page of it.
    pub(super) fn written(mib: u64) -> io::Result<Self> {
        let words = usize::try_from(mib << 20).map_err(io::Error::other)? / size_of::<u64>();
        let mut memory = vec![0_u64; words];
        // A page that is all zeros would be none to a snapshot.
        for (page, word) in memory.iter_mut().step_by(WORDS).enumerate() {
            *word = !(page as u64);
        }
        let shared = Arc::new(Shared { rate: Mutex::new(0), changed: Condvar::new(), dirtied: AtomicU64::new(0) });
        let writing = Arc::clone(&shared);
        std::thread::Builder::new().name("dirtier".into()).spawn(move || writing.write_for_ever(&mut memory))?;
        Ok(Self { shared })
    }

    /// Writes to so many pages a second from now on.
    pub(super) fn dirty(&self, pages_per_second: u64) {
        *poison::lock(&self.shared.rate) = pages_per_second;
        self.shared.changed.notify_one();
    }

    /// How many pages were written to since the memory is held.
    pub(super) fn dirtied(&self) -> u64 {
        self.shared.dirtied.load(Ordering::Relaxed)
    }
}

impl Shared {
    /// Writes to one page after the other, round and round, at the rate that is asked for; what a standstill cost
    /// is not caught up. Ends only if there is no memory.
    fn write_for_ever(&self, memory: &mut [u64]) {
        for first in (0..memory.len()).step_by(BATCH * WORDS).cycle() {
            let rate = self.rate();
            let began = Instant::now();
            let batch = &mut memory[first..];
            let mut written = 0_u32;
            for word in batch.iter_mut().step_by(WORDS).take(BATCH) {
                *word = word.wrapping_add(1);
                written += 1;
                // Page by page: after a branch each may take long, and the count is read at any moment.
                self.dirtied.fetch_add(1, Ordering::Relaxed);
            }
            let whole = Duration::from_secs_f64(f64::from(written) / rate as f64);
            std::thread::sleep(whole.saturating_sub(began.elapsed()));
        }
    }

    /// The rate, as soon as there is one.
    fn rate(&self) -> u64 {
        let rate = self.changed.wait_while(poison::lock(&self.rate), |rate| *rate == 0);
        *rate.unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_written_at_the_rate_and_rest_without_one() {
        let memory = HeldMemory::written(2).expect("2 MiB");
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(memory.dirtied(), 0);
        memory.dirty(5120);
        let began = Instant::now();
        while memory.dirtied() < 1024 && began.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(1));
        }
        // Two rounds of the memory in four batches of 50 ms, the last of which need not be waited for.
        assert!(memory.dirtied() >= 1024 && began.elapsed() >= Duration::from_millis(150), "{:?}", began.elapsed());
        memory.dirty(0);
        std::thread::sleep(Duration::from_millis(120));
        let rested = memory.dirtied();
        std::thread::sleep(Duration::from_millis(120));
        assert_eq!(memory.dirtied(), rested);
    }

    #[test]
    fn a_meter_without_memory_has_nothing_to_write() {
        let memory = HeldMemory::written(0).expect("nothing");
        memory.dirty(1000);
        assert_eq!(memory.dirtied(), 0);
    }

    #[test]
    fn room_is_what_the_kernel_has_to_spare() {
        assert_eq!(available_mib("MemTotal: 500000 kB\nMemAvailable:  409600 kB\n"), Some(400));
        assert_eq!(available_mib("MemTotal: 500000 kB\n"), None);
        assert!(room_mib().expect("Linux") > 0);
    }
}
