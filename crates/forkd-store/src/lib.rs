//! Snapshot directories and content-addressed blobs on disk: published whole, verified, swept; packs of them.
//!
//! ```text
//! <root>/lock                      held with flock while a store is open; names the holder
//!        snapshots/<tag>/          immutable: snapshot.json, vmstate, memory.layer, disk-N.layer
//!        blobs/<64 hex digits>     immutable: kernels, initramfs images, disks
//!        staging/<name>            being written or being removed; emptied at open
//!        arriving/<name>           whole and on its way to the above; finished at open
//! ```
//!
//! Everything becomes visible by one `rename` of something that is already on disk and synced, and
//! disappears by one `rename` into `staging/`. So a crash at any instant leaves a snapshot or blob
//! either whole or absent. Files are unlinked, never truncated: memory mapped from a removed
//! snapshot stays valid.
//!
//! The store treats `vmstate`, `memory.layer` and `disk-N.layer` as opaque; their formats belong to
//! the crates that write them. Digests are computed when bytes enter the store and in
//! [`Store::verify`], never on the way to a running sandbox.

mod blobs;
mod disk_usage;
mod durable;
mod error;
mod lock;
mod meta;
pub mod pack;
mod seal;
mod snapshots;
mod sparse;
mod staged;
mod store;
mod verify;

pub use blobs::{Blob, BlobEntry, BlobWriter};
pub use error::{Result, StoreError};
pub use meta::{
    Boot, CURRENT, CpuFacts, DISK_LAYER_PREFIX, DiffFacts, Disk, DiskLayer, MEMORY_LAYER, MemoryLayer, ParentRef,
    SNAPSHOT_JSON, SnapshotMeta, VMSTATE, VmState, Volume, disk_layer_name,
};
pub use snapshots::{DEPTH_LIMIT, Listed, Snapshot};
pub use staged::StagedSnapshot;
pub use store::Store;
pub use verify::{Checked, Outcome, VerifyProgress, VerifyReport};
