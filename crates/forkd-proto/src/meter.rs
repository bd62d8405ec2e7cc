//! Messages between `forkd bench` and the meter in a guest.
//!
//! The meter is the agent's program run once more ([`PROGRAM`] with [`VERB`]). When its memory is written it says so
//! ([`Greeting`]), then answers every [`Order`] on its standard input with a [`Stretch`], one JSON object a line.

use serde::{Deserialize, Serialize};

/// Where every guest has the agent's program: it is what PID 1 runs.
pub const PROGRAM: &str = "/proc/1/exe";

/// The argument that makes the agent's program a meter. What follows is the memory it shall hold, in MiB.
pub const VERB: &str = "meter";

/// How far apart the ticks are when nothing is in their way.
pub const TICK_US: u64 = 1000;

/// First line of the meter.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Greeting {
    /// It measures.
    Ready {
        /// TCP port on loopback at which it sends back what it is sent.
        echo_port: u16,
    },
    /// The guest has too little memory left, and the meter has ended.
    NoRoom {
        /// What it may hold at most.
        room_mib: u64,
    },
}

/// What the meter is told. It also ends the stretch that is being measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Order {
    /// Nothing else.
    Mark,
    /// From now on write to so many of its pages a second, one after the other; 0 ends it.
    Dirty {
        /// Pages of 4 KiB.
        pages_per_second: u64,
    },
}

/// What was measured since the last order.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Stretch {
    /// How long it was, by the guest's monotonic clock.
    pub us: u64,
    /// Ticks in it.
    pub ticks: u64,
    /// The longest time between two ticks; at least [`TICK_US`].
    pub longest_gap_us: u64,
    /// Pages written to.
    pub dirtied_pages: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_as_a_meter_of_another_version_writes_them() {
        let line = |order: &Order| serde_json::to_string(order).expect("plain data");
        assert_eq!(line(&Order::Mark), r#"{"op":"mark"}"#);
        assert_eq!(line(&Order::Dirty { pages_per_second: 7 }), r#"{"op":"dirty","pages_per_second":7}"#);
        let stretch: Stretch =
            serde_json::from_str(r#"{"us":9,"ticks":2,"longest_gap_us":5,"dirtied_pages":1,"later":0}"#)
                .expect("what a later meter says besides is passed over");
        assert_eq!(stretch, Stretch { us: 9, ticks: 2, longest_gap_us: 5, dirtied_pages: 1 });
    }
}
