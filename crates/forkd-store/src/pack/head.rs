//! The beginning of a pack: its manifest, who signed it, and whether it is one at all.

use std::collections::BTreeMap;

use forkd_types::Tag;

use super::archive::Archive;
use super::error::PackError;
use super::manifest::{MANIFEST_JSON, MANIFEST_LIMIT, Manifest};
use super::member;
use super::members::unlike_declared;
use super::signature::{MANIFEST_SIG, SIGNATURE_LEN, VerifyingKey};

/// Manifest of the other engine's packs.
const FOREIGN_MANIFEST: &str = "manifest.toml";

/// Reads the manifest and, if there is one, the signature; says whether `key` was given and has signed it.
pub(super) fn read_manifest(archive: &mut Archive, key: Option<&VerifyingKey>) -> Result<(Manifest, bool), PackError> {
    let header = archive.block()?;
    let path = member::path_of(&header);
    if !member::is_header(&header) || (path != MANIFEST_JSON && path != FOREIGN_MANIFEST) {
        return Err(PackError::NotAPack { found: path });
    }
    let len = member::size_of(&header).unwrap_or(u64::MAX);
    if len > MANIFEST_LIMIT {
        return Err(PackError::Manifest { reason: format!("it takes {len} bytes, {MANIFEST_LIMIT} fit") });
    }
    let mut json = vec![0; len as usize];
    archive.fill(&mut json)?;
    if path == FOREIGN_MANIFEST {
        return Err(foreign(&String::from_utf8_lossy(&json)));
    }
    if header != member::plain(MANIFEST_JSON, len)? {
        return Err(member::objection(&header).unwrap_or_else(|| unlike_declared(MANIFEST_JSON)));
    }
    archive.padding(len)?;
    let manifest = Manifest::parse(&json)?;
    archive.enter(MANIFEST_SIG);
    let signed = archive.peek_block()? == member::plain(MANIFEST_SIG, SIGNATURE_LEN as u64)?;
    let mut signature = [0; SIGNATURE_LEN];
    if signed {
        archive.block()?;
        archive.fill(&mut signature)?;
        archive.padding(SIGNATURE_LEN as u64)?;
    }
    match key {
        Some(_) if !signed => Err(PackError::Unsigned),
        Some(key) => key.check(&json, &signature).map(|()| (manifest, true)),
        None => Ok((manifest, false)),
    }
}

/// What the other engine's manifest says about itself: top-level `key = value` lines.
fn foreign(toml: &str) -> PackError {
    let top = toml.lines().take_while(|line| !line.trim_start().starts_with('['));
    let values: BTreeMap<&str, &str> =
        top.filter_map(|line| line.split_once('=')).map(|(key, value)| (key.trim(), value.trim())).collect();
    let text = |key| values.get(key).map(|value| value.trim_matches('"').to_owned()).filter(|text| !text.is_empty());
    match values.get("forkd_pack_version") {
        Some(version) => PackError::Foreign {
            version: version.parse::<u32>().map_or_else(|_| "unknown".to_owned(), |version| version.to_string()),
            tag: text("tag").filter(|tag| tag.parse::<Tag>().is_ok()),
            base_image: text("base_image"),
        },
        None => PackError::NotAPack { found: FOREIGN_MANIFEST.to_owned() },
    }
}
