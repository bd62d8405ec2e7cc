//! Wakes every millisecond and notes the longest time between two wakings.

use std::io;
use std::sync::mpsc::{Receiver, TryRecvError};

use forkd_proto::meter::{Order, Stretch, TICK_US};
use rustix::io::Errno;
use rustix::thread::ClockId;
use rustix::time::Timespec;

use super::memory::HeldMemory;
use super::say;

const TICK_NS: u64 = TICK_US * 1000;

/// The most favourable priority: what is measured is how long the machine keeps a program waiting, not how long
/// other programs of the guest do.
const PRIORITY: i32 = -20;

/// The stretch that is being measured.
pub(super) struct Ticker<'a> {
    memory: &'a HeldMemory,
    began_ns: u64,
    last_ns: u64,
    ticks: u64,
    longest_ns: u64,
    dirtied_before: u64,
}

impl<'a> Ticker<'a> {
    pub(super) fn new(memory: &'a HeldMemory) -> Self {
        let now = now_ns();
        let dirtied_before = memory.dirtied();
        Self { memory, began_ns: now, last_ns: now, ticks: 0, longest_ns: 0, dirtied_before }
    }

    /// Ticks until `orders` end; each is answered at a tick, with the stretch that ends there. So a gap belongs
    /// to one stretch as a whole.
    pub(super) fn run(mut self, orders: &Receiver<Order>) -> io::Result<()> {
        // Without it the figures are still true, only coarser.
        let _ = rustix::process::setpriority_process(None, PRIORITY);
        loop {
            self.tick();
            match orders.try_recv() {
                Ok(order) => {
                    if let Order::Dirty { pages_per_second } = order {
                        self.memory.dirty(pages_per_second);
                    }
                    let stretch = self.end_stretch();
                    say(&stretch)?;
                }
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return Ok(()),
            }
        }
    }

    /// Sleeps for one tick and notes how long that was.
    fn tick(&mut self) {
        sleep_until(self.last_ns + TICK_NS);
        let now = now_ns();
        self.longest_ns = self.longest_ns.max(now - self.last_ns);
        self.last_ns = now;
        self.ticks += 1;
    }

    /// What was measured until the last tick; the next stretch begins there.
    fn end_stretch(&mut self) -> Stretch {
        let dirtied = self.memory.dirtied();
        let stretch = Stretch {
            us: (self.last_ns - self.began_ns) / 1000,
            ticks: self.ticks,
            longest_gap_us: self.longest_ns / 1000,
            dirtied_pages: dirtied - self.dirtied_before,
        };
        (self.began_ns, self.ticks, self.longest_ns, self.dirtied_before) = (self.last_ns, 0, 0, dirtied);
        stretch
    }
}

fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

fn sleep_until(ns: u64) {
    let until = Timespec { tv_sec: (ns / 1_000_000_000) as i64, tv_nsec: (ns % 1_000_000_000) as i64 };
    while rustix::thread::clock_nanosleep_absolute(ClockId::Monotonic, &until) == Err(Errno::INTR) {}
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_stretch_has_its_longest_gap_and_none_of_the_next() {
        let memory = HeldMemory::written(0).expect("nothing");
        let mut ticker = Ticker::new(&memory);
        for _ in 0..3 {
            ticker.tick();
        }
        std::thread::sleep(Duration::from_millis(30));
        ticker.tick();
        let first = ticker.end_stretch();
        assert_eq!(first.ticks, 4);
        assert!(first.longest_gap_us >= 30_000 && first.us >= first.longest_gap_us + 3 * TICK_US, "{first:?}");
        ticker.tick();
        let second = ticker.end_stretch();
        assert_eq!(second.ticks, 1);
        assert_eq!(second.us, second.longest_gap_us);
        assert!(second.longest_gap_us >= TICK_US);
    }
}
