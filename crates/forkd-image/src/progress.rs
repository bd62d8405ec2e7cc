//! What a long step is doing.

/// A step in words for people, and how far it is where that is known.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Progress<'a> {
    /// What is done now: `installing python3-numpy`.
    pub step: &'a str,
    /// Part done of the whole build or installation, 0 to 1; `None` when it cannot be told.
    pub fraction: Option<f64>,
}

impl<'a> Progress<'a> {
    /// A step of unknown length.
    pub fn step(step: &'a str) -> Self {
        Self { step, fraction: None }
    }

    /// A step after `done` of `total` units of work.
    pub fn part(step: &'a str, done: u64, total: u64) -> Self {
        Self { step, fraction: Some(if total == 0 { 1.0 } else { (done as f64 / total as f64).min(1.0) }) }
    }
}
