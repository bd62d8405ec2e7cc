//! `manifest.json`: what is in a pack, in the order in which it comes.
//!
//! JSON, as every other description here: one parser, one set of rules for later versions. Within one
//! version fields may be added and readers ignore those they do not know; a change of meaning is a new
//! version.

use std::collections::BTreeSet;

use forkd_types::{Digest, Tag};
use serde::{Deserialize, Serialize};

use super::error::PackError;
use crate::meta::{SIZE_LIMIT, SNAPSHOT_JSON, VMSTATE};
use crate::snapshots::DEPTH_LIMIT;

/// First member of a pack.
pub(super) const MANIFEST_JSON: &str = "manifest.json";
/// What the manifest of every version has as `format`.
const FORMAT: &str = "forkd-pack";
/// The version that is written, and the newest that is read.
pub(super) const CURRENT: u32 = 1;
/// Whose machine state the snapshots hold.
pub(super) const ENGINE: &str = "forkd-vmm";

/// The largest manifest that is read.
pub(super) const MANIFEST_LIMIT: u64 = 4 << 20;
/// The longest description or image name.
const TEXT_LIMIT: usize = 4096;
/// The most files of one snapshot.
const FILES_LIMIT: usize = 512;
/// The most blobs: three and some disks for each snapshot of the longest chain.
const BLOBS_LIMIT: usize = 1024;
/// The longest name of a file. With what the archive adds it fits a ustar header.
const NAME_LIMIT: usize = 80;
/// The largest machine state.
const VMSTATE_LIMIT: u64 = 1 << 30;
/// The largest layer or blob, and the most that all blobs are together, holes counted: the zeros of a hole
/// cost nothing to send but have to be hashed.
const LOGICAL_LIMIT: u64 = 1 << 40;

/// The contents of `manifest.json`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Manifest {
    format: String,
    version: u32,
    engine: String,
    /// The snapshot that was packed.
    pub tag: Tag,
    /// When that snapshot was made, seconds since the Unix epoch.
    pub created_at_unix: u64,
    /// What its packer said about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// What its packer said it was baked from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_image: Option<String>,
    /// The snapshot and all that it derives from, the base first.
    pub snapshots: Vec<PackedSnapshot>,
    /// Every blob that those need, in the order of their digests.
    pub blobs: Vec<PackedBlob>,
}

/// One snapshot of a pack.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PackedSnapshot {
    /// Its tag.
    pub tag: Tag,
    /// Its files: `snapshot.json`, `vmstate`, layers.
    pub files: Vec<PackedFile>,
}

/// One file of a snapshot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PackedFile {
    /// Its name in the snapshot's directory.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// How much of that is not in holes.
    pub data_bytes: u64,
    /// BLAKE3 of the content; of a sparse member, BLAKE3 of two BLAKE3 hashes: of its map and of its data.
    pub digest: Digest,
}

/// One blob of a pack.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PackedBlob {
    /// Its name in a store: BLAKE3 of its content, holes read as zeros.
    pub blob: Digest,
    /// Its length.
    pub bytes: u64,
    /// How much of that is not in holes.
    pub data_bytes: u64,
    /// As [`PackedFile::digest`] of a sparse member.
    pub digest: Digest,
}

impl PackedSnapshot {
    /// BLAKE3 of its `snapshot.json`: what a child records of its parent.
    pub fn digest(&self) -> Digest {
        self.files[0].digest
    }

    /// Path of one of its files in the archive.
    pub(super) fn path(&self, file: &PackedFile) -> String {
        format!("snapshots/{}/{}", self.tag, file.name)
    }
}

impl PackedFile {
    /// Whether it is a sparse member: layers are, descriptions and machine state are not.
    pub(super) fn is_sparse(&self) -> bool {
        self.name != SNAPSHOT_JSON && self.name != VMSTATE
    }
}

impl PackedBlob {
    /// Its path in the archive.
    pub(super) fn path(&self) -> String {
        format!("blobs/{}", self.blob.hex())
    }
}

impl Manifest {
    /// The manifest of the last of `snapshots`.
    pub(super) fn new(
        created_at_unix: u64,
        description: Option<String>,
        base_image: Option<String>,
        snapshots: Vec<PackedSnapshot>,
        blobs: Vec<PackedBlob>,
    ) -> Result<Self, PackError> {
        let tag = snapshots.last().expect("a chain has a head").tag.clone();
        let (format, engine) = (FORMAT.to_owned(), ENGINE.to_owned());
        let manifest =
            Self { format, version: CURRENT, engine, tag, created_at_unix, description, base_image, snapshots, blobs };
        manifest.check().map_err(|reason| PackError::Manifest { reason })?;
        Ok(manifest)
    }

    /// The member's content.
    pub(super) fn to_json(&self) -> Result<Vec<u8>, PackError> {
        let mut json =
            serde_json::to_vec_pretty(self).map_err(|error| PackError::Manifest { reason: error.to_string() })?;
        json.push(b'\n');
        if json.len() as u64 > MANIFEST_LIMIT {
            return Err(PackError::Manifest { reason: format!("it takes {} bytes, {MANIFEST_LIMIT} fit", json.len()) });
        }
        Ok(json)
    }

    /// Reads a manifest and checks what can be checked of it alone.
    pub(super) fn parse(json: &[u8]) -> Result<Self, PackError> {
        #[derive(Deserialize)]
        struct Versioned {
            format: String,
            version: u64,
            engine: String,
        }
        let unusable = |error: serde_json::Error| PackError::Manifest { reason: format!("it is malformed: {error}") };
        let Versioned { format, version, engine } = serde_json::from_slice(json).map_err(unusable)?;
        if format != FORMAT {
            return Err(PackError::Manifest { reason: format!("its format is {format:?}, a pack's is {FORMAT:?}") });
        }
        if version == 0 || version > u64::from(CURRENT) {
            return Err(PackError::Version { found: version });
        }
        if engine != ENGINE {
            return Err(PackError::Engine { found: engine });
        }
        let manifest: Self = serde_json::from_slice(json).map_err(unusable)?;
        manifest.check().map_err(|reason| PackError::Manifest { reason })?;
        Ok(manifest)
    }

    /// Bytes of all members, holes not counted.
    pub fn data_bytes(&self) -> u64 {
        let files = self.snapshots.iter().flat_map(|snapshot| &snapshot.files).map(|file| file.data_bytes);
        files.chain(self.blobs.iter().map(|blob| blob.data_bytes)).sum()
    }

    /// Every member after manifest and signature, in order: all descriptions, then all other files, then the
    /// blobs.
    pub(super) fn paths(&self) -> impl Iterator<Item = String> + '_ {
        let descriptions = self.snapshots.iter().map(|snapshot| snapshot.path(&snapshot.files[0]));
        let files = self.snapshots.iter().flat_map(|snapshot| snapshot.files[1..].iter().map(|f| snapshot.path(f)));
        descriptions.chain(files).chain(self.blobs.iter().map(PackedBlob::path))
    }

    fn check(&self) -> Result<(), String> {
        let texts = [("description", &self.description), ("base_image", &self.base_image)];
        for (name, text) in texts {
            if text.as_ref().is_some_and(|text| text.len() > TEXT_LIMIT) {
                return Err(format!("its {name} is longer than {TEXT_LIMIT} bytes"));
            }
        }
        if self.snapshots.len() > DEPTH_LIMIT + 1 {
            return Err(format!("it holds {} snapshots, {} are possible", self.snapshots.len(), DEPTH_LIMIT + 1));
        }
        if self.snapshots.last().map(|snapshot| &snapshot.tag) != Some(&self.tag) {
            return Err(format!("its last snapshot is not {}", self.tag));
        }
        let mut tags = BTreeSet::new();
        for snapshot in &self.snapshots {
            if !tags.insert(&snapshot.tag) {
                return Err(format!("it lists snapshot {} twice", snapshot.tag));
            }
            check_files(snapshot).map_err(|reason| format!("of snapshot {}, {reason}", snapshot.tag))?;
        }
        if self.blobs.len() > BLOBS_LIMIT {
            return Err(format!("it holds {} blobs, {BLOBS_LIMIT} are possible", self.blobs.len()));
        }
        if !self.blobs.is_sorted_by(|one, next| one.blob < next.blob) {
            return Err("its blobs are not in the order of their digests, each once".to_owned());
        }
        let mut logical = 0u64;
        for PackedBlob { blob, bytes, data_bytes, .. } in &self.blobs {
            check_size(&format!("blob {blob}"), *bytes, *data_bytes)?;
            logical += bytes;
            if logical > LOGICAL_LIMIT {
                return Err(format!("its blobs have more than {LOGICAL_LIMIT} bytes together"));
            }
        }
        Ok(())
    }
}

fn check_files(snapshot: &PackedSnapshot) -> Result<(), String> {
    let names: Vec<&str> = snapshot.files.iter().map(|file| file.name.as_str()).collect();
    if names.len() > FILES_LIMIT {
        return Err(format!("it lists {} files, {FILES_LIMIT} are possible", names.len()));
    }
    if !names.starts_with(&[SNAPSHOT_JSON, VMSTATE]) {
        return Err(format!("the first files are not {SNAPSHOT_JSON} and {VMSTATE}"));
    }
    let mut seen = BTreeSet::new();
    for PackedFile { name, bytes, data_bytes, .. } in &snapshot.files {
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
        let plain = (1..=NAME_LIMIT).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(legal);
        if !plain {
            return Err(format!("{name:?} is not a plain file name of at most {NAME_LIMIT} bytes"));
        }
        if !seen.insert(name) {
            return Err(format!("it lists {name} twice"));
        }
        check_size(name, *bytes, *data_bytes)?;
        let limit = match name.as_str() {
            SNAPSHOT_JSON => SIZE_LIMIT,
            VMSTATE => VMSTATE_LIMIT,
            _ => continue,
        };
        if *bytes > limit || data_bytes != bytes {
            return Err(format!("{name} has {bytes} bytes, {data_bytes} of them data; at most {limit}, all data, fit"));
        }
    }
    Ok(())
}

fn check_size(what: &str, bytes: u64, data_bytes: u64) -> Result<(), String> {
    if bytes > LOGICAL_LIMIT || data_bytes > bytes {
        return Err(format!(
            "{what} has {bytes} bytes, {data_bytes} of them data; at most {LOGICAL_LIMIT} are possible"
        ));
    }
    Ok(())
}
