//! Whether the host has room for more machines.
//!
//! A memory limit is a promise: a sandbox may come to need all of it. Promises are given up to what the host has
//! less a reserve, times what it may overcommit. A sandbox without a limit is promised nothing and takes what there
//! is; so every spawn, whatever its limit, also needs memory that is free now, beyond the reserve.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use forkd_types::ByteSize;

use crate::error::{NodeError, NodeResult};

/// What a child takes before its guest has written anything: its page tables, its monitor, its vCPUs.
const NEWBORN: ByteSize = ByteSize::mib(1);

/// Gives promises of memory.
#[derive(Debug)]
pub(crate) struct Admission {
    reserve: ByteSize,
    /// The most that may be promised in all.
    capacity: ByteSize,
    promised: Arc<AtomicU64>,
}

/// Memory that a sandbox may come to need; given back when this is dropped.
#[derive(Debug)]
pub(crate) struct Promise {
    bytes: u64,
    promised: Arc<AtomicU64>,
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.promised.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// What the host has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct HostMemory {
    pub(crate) total: ByteSize,
    pub(crate) available: ByteSize,
}

impl HostMemory {
    /// As the kernel tells it now.
    pub(crate) fn now() -> std::io::Result<Self> {
        let text = std::fs::read_to_string("/proc/meminfo")?;
        Self::parse(&text).ok_or_else(|| {
            let what = "/proc/meminfo has no MemTotal and MemAvailable in kB";
            std::io::Error::new(std::io::ErrorKind::InvalidData, what)
        })
    }

    fn parse(text: &str) -> Option<Self> {
        let kib = |key: &str| -> Option<ByteSize> {
            let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
            Some(ByteSize(value.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10))
        };
        Some(Self { total: kib("MemTotal")?, available: kib("MemAvailable")? })
    }
}

impl Admission {
    /// Promises on a host with `total` bytes of memory, of which `reserve` are not given away; of the rest, `overcommit`
    /// times as much may be promised.
    pub(crate) fn new(total: ByteSize, reserve: ByteSize, overcommit: f64) -> Self {
        let capacity = ByteSize((total.bytes().saturating_sub(reserve.bytes()) as f64 * overcommit) as u64);
        Self { reserve, capacity, promised: Arc::default() }
    }

    /// Room for `n` children, each with a memory limit of `each`; one promise for each child.
    ///
    /// # Errors
    /// [`NodeError::NoRoom`] with the numbers.
    pub(crate) fn admit(&self, n: u32, each: Option<ByteSize>, host: HostMemory) -> NodeResult<Vec<Option<Promise>>> {
        let at_once = u64::from(n) * NEWBORN.bytes();
        if host.available.bytes() < self.reserve.bytes().saturating_add(at_once) {
            let (available, reserve) = (host.available, self.reserve);
            let reason = format!(
                "{n} more need {} at once, and of the {available} that the host has left {reserve} are its reserve",
                ByteSize(at_once)
            );
            return Err(NodeError::NoRoom { n, reason });
        }
        let Some(each) = each else { return Ok((0..n).map(|_| None).collect()) };
        let wanted = u64::from(n).saturating_mul(each.bytes());
        let fits = |promised: u64| promised.checked_add(wanted).filter(|all| *all <= self.capacity.bytes());
        match self.promised.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits) {
            Ok(_) => Ok((0..n).map(|_| Some(self.covering(each))).collect()),
            Err(promised) => {
                let (capacity, promised) = (self.capacity, ByteSize(promised));
                let reason = format!(
                    "{n} with a memory limit of {each} may need {}, and of the {capacity} that this host promises \
                     {promised} are promised already",
                    ByteSize(wanted)
                );
                Err(NodeError::NoRoom { n, reason })
            }
        }
    }

    /// A promise that is given whether there is room or not: to a machine that runs already, or replaces one.
    pub(crate) fn promise(&self, each: Option<ByteSize>) -> Option<Promise> {
        let each = each?;
        self.promised.fetch_add(each.bytes(), Ordering::Relaxed);
        Some(self.covering(each))
    }

    /// A promise that is counted already.
    fn covering(&self, each: ByteSize) -> Promise {
        Promise { bytes: each.bytes(), promised: Arc::clone(&self.promised) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ROOMY: HostMemory = HostMemory { total: ByteSize::gib(4), available: ByteSize::gib(3) };

    #[test]
    fn promises_are_given_up_to_the_last_byte_and_come_back() {
        let admission = Admission::new(ByteSize::gib(4), ByteSize::gib(1), 1.0);
        let limit = Some(ByteSize::gib(1));
        let two = admission.admit(2, limit, ROOMY).expect("room for two");
        let third = admission.admit(1, limit, ROOMY).expect("and for a third");
        let error = admission.admit(1, Some(ByteSize(1)), ROOMY).expect_err("not for one byte more");
        assert_eq!(error.code(), "no_room");
        let text = error.to_string();
        assert!(text.contains("of the 3 GiB that this host promises 3 GiB are promised already"), "{text}");
        drop(third);
        assert!(admission.admit(2, limit, ROOMY).is_err(), "all or nothing");
        drop(two);
        admission.admit(3, limit, ROOMY).expect("all came back");
    }

    #[test]
    fn overcommitted_promises_are_for_more_than_there_is() {
        let admission = Admission::new(ByteSize::gib(4), ByteSize::gib(2), 2.5);
        let _five = admission.admit(5, Some(ByteSize::gib(1)), ROOMY).expect("five of two");
        assert!(admission.admit(1, Some(ByteSize::gib(1)), ROOMY).is_err());
    }

    #[test]
    fn a_host_that_is_short_takes_nobody_with_or_without_a_limit() {
        let admission = Admission::new(ByteSize::gib(4), ByteSize::mib(256), 1.0);
        let short = HostMemory { available: ByteSize::mib(260), ..ROOMY };
        assert_eq!(admission.admit(4, None, short).expect("just fits").len(), 4);
        let text = admission.admit(5, None, short).expect_err("too many").to_string();
        assert!(text.contains("5 MiB") && text.contains("260 MiB") && text.contains("256 MiB"), "{text}");
    }

    #[test]
    fn the_kernels_numbers_are_read() {
        let text = "MemTotal:        4009024 kB\nMemFree:          100 kB\nMemAvailable:    3210000 kB\n";
        let found = HostMemory { total: ByteSize(4_009_024 << 10), available: ByteSize(3_210_000 << 10) };
        assert_eq!(HostMemory::parse(text), Some(found));
        assert_eq!(HostMemory::parse("MemTotal: 1 kB\n"), None);
        HostMemory::now().expect("this host tells");
    }

    proptest! {
        #[test]
        fn what_is_promised_never_exceeds_the_capacity(
            steps in prop::collection::vec((1u32..5, 1u64..2000, any::<bool>()), 0..60),
        ) {
            let admission = Admission::new(ByteSize::gib(4), ByteSize::gib(1), 1.0);
            let mut given = Vec::new();
            for (n, mib, give_back) in steps {
                if give_back {
                    given.pop();
                }
                if let Ok(promises) = admission.admit(n, Some(ByteSize::mib(mib)), ROOMY) {
                    given.extend(promises);
                }
                let sum: u64 = given.iter().flatten().map(|promise| promise.bytes).sum();
                prop_assert_eq!(sum, admission.promised.load(Ordering::Relaxed));
                prop_assert!(sum <= ByteSize::gib(3).bytes());
            }
        }
    }
}
