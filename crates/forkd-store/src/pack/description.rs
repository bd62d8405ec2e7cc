//! The descriptions of a pack's snapshots: that they fit their files, each other and the blobs.

use std::collections::BTreeSet;

use forkd_types::{Digest, Tag};
use serde::Serialize;

use super::error::PackError;
use super::manifest::{Manifest, PackedSnapshot};
use super::members::Members;
use crate::meta::{SnapshotMeta, VMSTATE};
use crate::seal;

/// A snapshot whose description is known to be right.
pub(super) struct Described<'a> {
    pub(super) packed: &'a PackedSnapshot,
    pub(super) meta: SnapshotMeta,
    pub(super) json: Vec<u8>,
    /// By the name that it gets here.
    pub(super) digest: Digest,
}

/// Reads all descriptions and checks that each fits its files and its parent.
pub(super) fn read_all<'a>(
    members: &mut Members<'_>,
    manifest: &'a Manifest,
    rename: Option<&Tag>,
) -> Result<Vec<Described<'a>>, PackError> {
    let mut described: Vec<Described<'a>> = Vec::new();
    for packed in &manifest.snapshots {
        let wrong = |reason: String| PackError::Description { tag: packed.tag.clone(), reason };
        let file = &packed.files[0];
        let mut json = Vec::new();
        members.plain(&packed.path(file), file, &mut |_, bytes| {
            json.extend_from_slice(bytes);
            Ok(())
        })?;
        let meta = SnapshotMeta::parse(&json).map_err(&wrong)?;
        fits(&meta, packed).map_err(&wrong)?;
        let parent = described.last().map(|parent| (&parent.meta, parent.digest));
        match (&meta.parent, parent) {
            (None, None) => {}
            (Some(named), Some((parent, digest))) if named.tag == parent.tag && named.digest == digest => {
                meta.check_over(parent).map_err(&wrong)?;
            }
            _ => return Err(wrong("it does not derive from the one before it".to_owned())),
        }
        described.push(Described { packed, meta, json, digest: file.digest });
    }
    let used: BTreeSet<Digest> = described.iter().flat_map(|one| one.meta.blobs()).collect();
    if !used.iter().eq(manifest.blobs.iter().map(|blob| &blob.blob)) {
        return Err(PackError::Manifest { reason: "its blobs are not those that its snapshots need".to_owned() });
    }
    match (rename, described.split_last_mut()) {
        (Some(tag), Some((head, ancestors))) if head.meta.tag != *tag => {
            if ancestors.iter().any(|ancestor| ancestor.meta.tag == *tag) {
                let reason = "it derives from a snapshot of that name; choose another".to_owned();
                return Err(PackError::Description { tag: tag.clone(), reason });
            }
            head.rename(tag)?;
        }
        _ => {}
    }
    Ok(described)
}

/// Whether a description is that of the snapshot that the manifest lists.
fn fits(meta: &SnapshotMeta, packed: &PackedSnapshot) -> Result<(), String> {
    if meta.tag != packed.tag {
        return Err(format!("it is described as {}", meta.tag));
    }
    if !meta.files().eq(packed.files[1..].iter().map(|file| file.name.as_str())) {
        return Err("it is described with other files".to_owned());
    }
    let vmstate = &packed.files[1];
    if (meta.vmstate.digest, meta.vmstate.bytes) != (vmstate.digest, vmstate.bytes) {
        return Err(format!("it is described with another {VMSTATE}"));
    }
    Ok(())
}

/// A description with another tag, to be sealed anew.
#[derive(Serialize)]
struct Renamed {
    #[serde(flatten)]
    fields: serde_json::Map<String, serde_json::Value>,
    seal: &'static str,
}

impl Described<'_> {
    /// Gives it another name. Fields of the description that are not known here stay.
    fn rename(&mut self, tag: &Tag) -> Result<(), PackError> {
        let wrong = |reason: String| PackError::Description { tag: tag.clone(), reason };
        let mut fields: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(&self.json).map_err(|error| wrong(error.to_string()))?;
        fields.insert("tag".to_owned(), tag.as_str().into());
        fields.remove("seal");
        let renamed = Renamed { fields, seal: seal::OPEN };
        let mut json = serde_json::to_vec_pretty(&renamed).map_err(|error| wrong(error.to_string()))?;
        json.push(b'\n');
        seal::close(&mut json).map_err(&wrong)?;
        crate::seal::close(&mut json).map_err(wrong)?;
        self.meta = SnapshotMeta::parse(&json).map_err(wrong)?;
        self.digest = Digest::from_bytes(*blake3::hash(&json).as_bytes());
        self.json = json;
        Ok(())
    }

    /// The digest that the description records of a layer.
    pub(super) fn layer_digest(&self, name: &str) -> Digest {
        let memory = self.meta.memory_layers.iter().map(|layer| (&layer.file, layer.digest));
        let disks = self.meta.disks.iter().flat_map(|disk| &disk.layers).map(|layer| (&layer.file, layer.digest));
        memory.chain(disks).find(|(file, _)| *file == name).expect("the description lists the file").1
    }
}
