//! Names, sizes and request bodies that every other crate agrees on.
//!
//! This crate does no I/O. It owns what a value *is* (a legal tag, a page, a digest, the JSON of a
//! REST body); what is done with it belongs to the crates above.

mod digest;
mod id;
mod page;
pub mod rest;
mod size;
mod tag;
mod timing;
mod volume;

pub use digest::{Digest, DigestError};
pub use id::{SandboxId, SandboxIdError};
pub use page::{PAGE_SIZE, PageCount, PageRun, PageRunError};
pub use size::{ByteSize, ByteSizeError};
pub use tag::{Tag, TagError};
pub use timing::{Stage, StageTimings};
pub use volume::{
    MountPoint, MountPointError, VOLUME_LIMIT, VolumePolicy, VolumePolicyError, VolumesError, check_places,
};
