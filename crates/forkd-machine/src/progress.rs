//! What a long operation reports while it runs.

/// One piece of news. A step lasts until the next one begins.
#[derive(Clone, PartialEq, Debug)]
pub enum Progress {
    /// A new step began: a short phrase such as `building the machine's root disk`.
    Step(String),
    /// Something to show beside the current step.
    Detail(String),
    /// How far the current step is, between 0 and 1.
    Fraction(f32),
}

/// Receives [`Progress`].
pub type Report<'a> = &'a mut dyn FnMut(Progress);

pub(crate) fn step(report: Report<'_>, text: impl Into<String>) {
    report(Progress::Step(text.into()));
}
