//! The handlers, one file per kind of object.

pub(crate) mod agent;
pub(crate) mod bakes;
pub(crate) mod blobs;
pub(crate) mod branching;
pub(crate) mod console;
pub(crate) mod discovery;
pub(crate) mod events;
pub(crate) mod exec_stream;
pub(crate) mod files;
#[cfg(test)]
mod guest_tests;
pub(crate) mod overview;
pub(crate) mod packs;
pub(crate) mod ports;
pub(crate) mod sandboxes;
pub(crate) mod snapshots;
pub(crate) mod workspaces;
