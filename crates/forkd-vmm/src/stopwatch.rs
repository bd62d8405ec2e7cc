//! Times the stages of one operation.

use std::time::Instant;

use forkd_types::StageTimings;

/// Attributes the time since the last lap to a stage.
#[derive(Debug)]
pub struct Stopwatch {
    last: Instant,
    timings: StageTimings,
}

impl Stopwatch {
    /// Starts at `instant`.
    pub fn since(instant: Instant) -> Self {
        Self { last: instant, timings: StageTimings::default() }
    }

    /// Ends the stage `name`.
    pub fn lap(&mut self, name: &str) {
        let now = Instant::now();
        self.timings.record(name, now - self.last);
        self.last = now;
    }

    /// Ends a stage that timed its own parts.
    pub fn lap_parts(&mut self, parts: &[(&str, std::time::Duration)]) {
        for (name, took) in parts {
            self.timings.record(name, *took);
        }
        self.last = Instant::now();
    }

    /// All stages.
    pub fn finish(self) -> StageTimings {
        self.timings
    }
}
