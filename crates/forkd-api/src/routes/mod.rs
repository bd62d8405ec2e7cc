//! The handlers, one file per kind of object.

pub(crate) mod agent;
pub(crate) mod bakes;
pub(crate) mod blobs;
pub(crate) mod branching;
pub(crate) mod discovery;
pub(crate) mod packs;
pub(crate) mod sandboxes;
pub(crate) mod snapshots;
