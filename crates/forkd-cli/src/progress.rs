//! Bars and spinners on a terminal, plain `==>` lines elsewhere, nothing when quiet.
//!
//! Everything that may take longer than half a second runs under a [`Step`]. A step that is dropped
//! without [`Step::done`] disappears: whoever failed reports the error itself.

use std::borrow::Cow;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::{output, units};

/// How often a plain step may repeat itself.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// How often a spinner turns.
const TICK: Duration = Duration::from_millis(120);

/// How a step of unknown length looks.
const SPINNER: &str = "{spinner:.cyan} {prefix} {wide_msg:.dim} {elapsed:.dim}";

/// Where progress is shown.
#[derive(Clone, Debug)]
pub(crate) enum Progress {
    /// Redrawn lines.
    Interactive(MultiProgress),
    /// One line per event.
    Plain,
    /// Nowhere.
    Quiet,
}

impl Progress {
    /// The right kind for standard error as it is.
    pub(crate) fn new(quiet: bool) -> Self {
        match (quiet, output::stderr_is_interactive()) {
            (true, _) => Self::Quiet,
            (false, true) => Self::Interactive(MultiProgress::new()),
            (false, false) => Self::Plain,
        }
    }

    /// Begins a step of unknown length.
    pub(crate) fn step(&self, title: impl Into<String>) -> Step {
        let title = title.into();
        if let Self::Plain = self {
            output::remark(format_args!("==> {title}"));
        }
        self.quick_step(title)
    }

    /// Begins a step that is usually over at once: without a terminal it is only spoken of when it
    /// takes long.
    pub(crate) fn quick_step(&self, title: impl Into<String>) -> Step {
        let title = title.into();
        let shown = match self {
            Self::Interactive(bars) => {
                let bar = bars.add(ProgressBar::new_spinner());
                bar.set_style(style(SPINNER));
                bar.set_prefix(title.clone());
                bar.enable_steady_tick(TICK);
                Shown::Bar(bar)
            }
            Self::Plain => Shown::Lines(Mutex::new(Plain { said: Instant::now(), length: None })),
            Self::Quiet => Shown::Nothing,
        };
        Step { title, shown, began: Instant::now(), progress: self.clone() }
    }

    /// Says one line that stays.
    pub(crate) fn say(&self, text: impl std::fmt::Display) {
        match self {
            Self::Interactive(bars) => bars.suspend(|| output::remark(text)),
            Self::Plain => output::remark(text),
            Self::Quiet => {}
        }
    }

    /// Says a warning, even when quiet.
    pub(crate) fn warn(&self, text: impl std::fmt::Display) {
        let text = format!("warning: {text}");
        match self {
            Self::Interactive(bars) => bars.suspend(|| output::remark(text)),
            Self::Plain | Self::Quiet => output::remark(text),
        }
    }
}

/// One thing being done.
#[derive(Debug)]
pub(crate) struct Step {
    title: String,
    shown: Shown,
    began: Instant,
    progress: Progress,
}

#[derive(Debug)]
enum Shown {
    Bar(ProgressBar),
    Lines(Mutex<Plain>),
    Nothing,
}

/// What a plain step remembers, so that it does not repeat itself too often.
#[derive(Debug)]
struct Plain {
    said: Instant,
    length: Option<u64>,
}

impl Step {
    /// What is being done right now, within the step.
    pub(crate) fn detail(&self, text: impl Into<Cow<'static, str>>) {
        match &self.shown {
            Shown::Bar(bar) => bar.set_message(text),
            Shown::Lines(plain) => {
                let mut plain = plain.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                if plain.said.elapsed() >= PLAIN_INTERVAL {
                    plain.said = Instant::now();
                    output::remark(format_args!("    {}: {}", self.title, text.into()));
                }
            }
            Shown::Nothing => {}
        }
    }

    /// The step turns out to be `bytes` long: shows a bar from here on.
    pub(crate) fn set_bytes(&self, bytes: u64) {
        match &self.shown {
            Shown::Bar(bar) => {
                bar.set_style(style(
                    "{spinner:.cyan} {prefix} {wide_bar:.cyan/dim} {bytes}/{total_bytes} {bytes_per_sec:.dim}",
                ));
                bar.set_length(bytes);
            }
            Shown::Lines(plain) => {
                plain.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).length = Some(bytes);
            }
            Shown::Nothing => {}
        }
    }

    /// The step turns out to have `items` parts: shows a counted bar from here on.
    pub(crate) fn set_items(&self, items: u64) {
        if let Shown::Bar(bar) = &self.shown {
            bar.set_style(style("{spinner:.cyan} {prefix} {wide_bar:.cyan/dim} {pos}/{len} {elapsed:.dim}"));
            bar.set_length(items);
        } else if let Shown::Lines(plain) = &self.shown {
            plain.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).length = Some(items);
        }
    }

    /// The step turns out to be divisible: shows a bar without figures from here on.
    pub(crate) fn set_parts(&self, parts: u64) {
        if let Shown::Bar(bar) = &self.shown {
            bar.set_style(style("{spinner:.cyan} {prefix} {bar:24.cyan/dim} {wide_msg:.dim} {elapsed:.dim}"));
            bar.set_length(parts);
        } else if let Shown::Lines(plain) = &self.shown {
            plain.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).length = Some(parts);
        }
    }

    /// The bar is full but somebody else still works: shows a spinner and why.
    pub(crate) fn wait_for(&self, text: &'static str) {
        match &self.shown {
            Shown::Bar(bar) => {
                bar.set_style(style(SPINNER));
                bar.set_message(text);
            }
            Shown::Lines(plain) => {
                plain.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).length = None;
                self.detail(text);
            }
            Shown::Nothing => {}
        }
    }

    /// How far it is, in the unit of its length.
    pub(crate) fn set_position(&self, position: u64) {
        match &self.shown {
            Shown::Bar(bar) => bar.set_position(position),
            Shown::Lines(plain) => {
                let mut plain = plain.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                if let Some(length) = plain.length.filter(|&length| length > 0)
                    && plain.said.elapsed() >= PLAIN_INTERVAL
                {
                    plain.said = Instant::now();
                    output::remark(format_args!("    {}: {} %", self.title, position * 100 / length));
                }
            }
            Shown::Nothing => {}
        }
    }

    /// Ends the step and leaves a line that says how long it took.
    pub(crate) fn done(self, result: impl std::fmt::Display) {
        let took = units::duration(self.began.elapsed());
        let progress = self.progress.clone();
        drop(self);
        progress.say(format_args!("✓ {result} ({took})"));
    }

    /// Ends the step without a trace, for steps that turned out to need nothing.
    pub(crate) fn vanish(self) {}
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the templates in this file are well formed")
}
