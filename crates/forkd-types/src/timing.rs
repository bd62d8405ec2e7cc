//! Stage timers: where the time of one operation went, kept for benchmarks, metrics and answers.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// One named stage of an operation and how long it took.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Stage {
    /// Short name, `snake_case`, stable because dashboards select on it.
    pub name: String,
    /// Duration in microseconds.
    pub us: u64,
}

/// The stages of one operation, in the order they ran.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StageTimings(pub Vec<Stage>);

impl StageTimings {
    /// Appends a stage.
    pub fn record(&mut self, name: &str, took: Duration) {
        self.0.push(Stage { name: name.to_owned(), us: took.as_micros() as u64 });
    }

    /// The duration of the stage called `name`, if it ran.
    pub fn get(&self, name: &str) -> Option<Duration> {
        self.0.iter().find(|stage| stage.name == name).map(|stage| Duration::from_micros(stage.us))
    }

    /// The sum of all stages.
    pub fn total(&self) -> Duration {
        Duration::from_micros(self.0.iter().map(|stage| stage.us).sum())
    }
}
