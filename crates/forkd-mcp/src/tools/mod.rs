//! The tools, grouped by what they are about.

mod files;
mod programs;
mod sandboxes;
mod snapshots;
