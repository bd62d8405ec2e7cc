//! What can go wrong with packs.

use std::io;
use std::path::PathBuf;

use forkd_types::{ByteSize, Digest, Tag};

use super::manifest::{CURRENT, ENGINE};
use super::packing::LEVELS;
use crate::StoreError;

/// Why a pack was not written or not taken in. After any of these the store is as it was.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The first bytes are not those of a zstd frame.
    #[error("this is not a pack: it is not compressed with zstd, its first bytes are {first:02x?}")]
    NotZstd {
        /// The first bytes, up to four.
        first: Vec<u8>,
    },
    /// The bytes cannot be read or decompressed.
    #[error("the pack cannot be decompressed after {at} bytes of its content; it is damaged")]
    Undecodable {
        /// Bytes that came out before.
        at: u64,
        /// What the decompressor said.
        source: io::Error,
    },
    /// The bytes end too soon.
    #[error("the pack ends within {within}; it was cut off")]
    Truncated {
        /// The member.
        within: String,
    },
    /// There is more than a pack.
    #[error("bytes follow the end of the pack")]
    TrailingBytes,
    /// An archive of something else.
    #[error("this is not a pack: it begins with {found:?}, a pack begins with manifest.json")]
    NotAPack {
        /// Name of the first member.
        found: String,
    },
    /// Made by the other engine.
    #[error(
        "this pack{} was made by another engine (forkd_pack_version {version}): its machine state means nothing to this \
         one. Bake it again: forkd from-image {} --tag {}",
        tag.as_ref().map(|tag| format!(" of {tag:?}")).unwrap_or_default(),
        base_image.as_deref().map_or_else(|| "IMAGE".to_owned(), |image| format!("{image:?}")),
        tag.as_deref().unwrap_or("NAME")
    )]
    Foreign {
        /// Version of its format.
        version: String,
        /// The tag it claims.
        tag: Option<String>,
        /// The image it claims to be baked from.
        base_image: Option<String>,
    },
    /// A later format.
    #[error("pack format version {found}; this program reads versions 1 to {CURRENT}, a newer forkd made it")]
    Version {
        /// The version it claims.
        found: u64,
    },
    /// A format of ours for another monitor.
    #[error("the pack is for the engine {found:?}; this is {ENGINE}, bake the snapshot again with it")]
    Engine {
        /// The engine it claims.
        found: String,
    },
    /// The manifest makes no sense.
    #[error("the manifest is unusable: {reason}")]
    Manifest {
        /// What is wrong.
        reason: String,
    },
    /// A signature was asked for and there is none.
    #[error("the pack is not signed, and a signature was asked for")]
    Unsigned,
    /// There is a signature that is not by the given key over this manifest.
    #[error("the signature is not by the given key, or not over this manifest")]
    BadSignature,
    /// The member cannot be part of a pack, or not in this form.
    #[error("member {path:?} is refused: it {reason}")]
    Member {
        /// Its path as the archive has it.
        path: String,
        /// What is wrong, as a predicate.
        reason: String,
    },
    /// A member that the manifest declares is not there.
    #[error("member {path:?} is missing")]
    Missing {
        /// Its path.
        path: String,
    },
    /// A member is there that the manifest does not declare.
    #[error("member {path:?} is refused: the manifest does not declare it")]
    Undeclared {
        /// Its path.
        path: String,
    },
    /// A member is there twice.
    #[error("member {path:?} is refused: it is there twice")]
    Duplicate {
        /// Its path.
        path: String,
    },
    /// Content is not what was announced.
    #[error("{what} has digest {actual}, {expected} was announced; the pack is damaged or forged")]
    Digest {
        /// What it is, in words.
        what: String,
        /// What was announced.
        expected: Digest,
        /// What came.
        actual: Digest,
    },
    /// A layer is not one.
    #[error("{what} is unusable: {reason}")]
    Layer {
        /// What it is, in words.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// A description does not fit its pack, its files or its parent.
    #[error("snapshot {tag} of the pack is unusable: {reason}")]
    Description {
        /// The snapshot.
        tag: Tag,
        /// What is wrong.
        reason: String,
    },
    /// Another snapshot has the name.
    #[error(
        "there is another snapshot {tag} already, with digest {there}; the pack's has {packed}. Remove it, replace it, or \
         {}",
        if *head { "unpack under another tag" } else { "unpack where it is not in the way" }
    )]
    Differs {
        /// The name.
        tag: Tag,
        /// Digest of what is there, if that is readable.
        there: String,
        /// Digest of what the pack has.
        packed: Digest,
        /// Whether it is the pack's own snapshot, which can be given another name.
        head: bool,
    },
    /// What would be replaced is needed.
    #[error("snapshot {tag} cannot be replaced: {} built on it; remove those first", names(children))]
    InUse {
        /// The snapshot.
        tag: Tag,
        /// What derives from it and would stay.
        children: Vec<Tag>,
    },
    /// What was settled when the pack began no longer holds.
    #[error("other snapshots were made or removed while the pack came in; unpack it again")]
    Changed,
    /// It is too much for the file system.
    #[error("the pack's files take {}, the store has {} left", ByteSize(*needed), ByteSize(*free))]
    NoSpace {
        /// Bytes to be stored.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// No such level.
    #[error("there is no compression level {level}; levels are {} to {}", LEVELS.start(), LEVELS.end())]
    Level {
        /// The level asked for.
        level: i32,
    },
    /// Where the pack goes takes no more.
    #[error("cannot write the pack")]
    Output(#[source] io::Error),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn names(tags: &[Tag]) -> String {
    let list = tags.iter().map(Tag::as_str).collect::<Vec<_>>().join(", ");
    format!("{list} {}", if tags.len() == 1 { "is" } else { "are" })
}

impl PackError {
    /// A stable machine-readable code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Foreign { .. } | Self::Engine { .. } => "foreign_pack",
            Self::Version { .. } => "pack_version",
            Self::Unsigned => "pack_unsigned",
            Self::BadSignature => "pack_bad_signature",
            Self::Differs { .. } => "snapshot_exists",
            Self::InUse { .. } => "snapshot_has_children",
            Self::Changed => "store_changed",
            Self::NoSpace { .. } => "no_space",
            Self::Level { .. } => "bad_field",
            Self::Output(_) => "pack_output",
            Self::Store(error) => error.code(),
            Self::NotZstd { .. }
            | Self::Undecodable { .. }
            | Self::Truncated { .. }
            | Self::TrailingBytes
            | Self::NotAPack { .. }
            | Self::Manifest { .. }
            | Self::Member { .. }
            | Self::Missing { .. }
            | Self::Undeclared { .. }
            | Self::Duplicate { .. }
            | Self::Digest { .. }
            | Self::Layer { .. }
            | Self::Description { .. } => "bad_pack",
        }
    }

    /// A member that is refused because it `reason`.
    pub(super) fn member(path: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Member { path: path.into(), reason: reason.into() }
    }
}

/// Why a key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// It cannot be read.
    #[error("cannot read the key file {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It holds something else.
    #[error("{} holds no ed25519 {kind} key in PEM form ({reason}); make one with: {how}", path.display())]
    NotAKey {
        /// The file.
        path: PathBuf,
        /// `private` or `public`.
        kind: &'static str,
        /// What is wrong with it.
        reason: String,
        /// The command that makes one.
        how: &'static str,
    },
    /// A text is no key.
    #[error("{text:?} is not a public key; a key is 64 hex digits")]
    NotHex {
        /// The text.
        text: String,
    },
}
