//! Packs: a snapshot with all that it derives from, in one file to be carried elsewhere.
//!
//! ```text
//! zstd frame 1    manifest.json                   what is inside, with every digest
//! zstd frame      manifest.sig                    only in a signed pack: ed25519 over manifest.json
//! zstd frame      snapshots/<tag>/snapshot.json   all descriptions, the base's first
//!                 snapshots/<tag>/vmstate …       state and layers, snapshot by snapshot
//!                 blobs/<64 hex digits>           kernels, initramfs images, disks, once each
//! ```
//!
//! One after the other the frames are a tar archive that GNU tar reads. Layers and blobs are sparse
//! members; where their holes are follows from their content and not from the file system. Owners,
//! modes and times are fixed, so the same snapshot makes the same bytes everywhere.
//!
//! A reader trusts nothing: the manifest says which member comes next and how long it is, every other
//! byte ends the reading. Everything is written to a directory of its own and checked, and becomes
//! visible in one step.
//!
//! | module | owns |
//! |---|---|
//! | `manifest` | what a manifest says, and what it may say |
//! | `member` | the headers of the archive's members |
//! | `sparse_map` | which parts of a file are data |
//! | `packing` | from a store to a pack |
//! | `archive` | the bytes of a pack, decompressed, member by member |
//! | `head` | the beginning of a pack, and whether it is one |
//! | `members` | reading members as the manifest declares them |
//! | `description` | the snapshots' descriptions, that they fit what is packed |
//! | `unpacking` | from a pack to files that are checked |
//! | `settle` | what of a pack is new to the store, and what stands in its way |
//! | `arrival` | from checked files to snapshots, all or none |
//! | `signature` | key files, signing, checking |

mod archive;
pub(crate) mod arrival;
mod description;
mod error;
mod head;
mod manifest;
mod member;
mod members;
mod packing;
mod settle;
mod signature;
mod sparse_map;
mod unpacking;

pub use error::{KeyError, PackError};
pub use manifest::{Manifest, PackedBlob, PackedFile, PackedSnapshot};
pub use packing::{DEFAULT_LEVEL, LEVELS, Pack, PackOptions};
pub use settle::Fate;
pub use signature::{SigningKey, VerifyingKey, sign};
pub use unpacking::{UnpackOptions, Unpacked, UnpackedSnapshot};

/// How far packing or unpacking is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PackProgress<'a> {
    /// What is being done now: `reading`, or the path of a member.
    pub what: &'a str,
    /// Bytes done.
    pub done_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
}
