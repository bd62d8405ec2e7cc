//! The members of a pack, each as the manifest declares it, in its order.

use std::collections::BTreeSet;

use forkd_types::Digest;

use super::PackProgress;
use super::archive::Archive;
use super::error::PackError;
use super::manifest::{MANIFEST_JSON, Manifest, PackedFile};
use super::member::{self, Block};
use super::packing::END;
use super::signature::MANIFEST_SIG;
use super::sparse_map::{Run, SparseMap, digest};
use crate::StoreError;

/// Reads members, one after the other.
pub(super) struct Members<'a> {
    archive: Archive,
    manifest: &'a Manifest,
    progress: &'a mut dyn FnMut(PackProgress<'_>),
    done_bytes: u64,
    total_bytes: u64,
    /// Members that went by.
    seen: BTreeSet<String>,
}

/// Takes a piece of content that belongs at an offset.
pub(super) type Take<'a> = dyn FnMut(u64, &[u8]) -> Result<(), StoreError> + 'a;

impl<'a> Members<'a> {
    /// The members behind the manifest and the signature.
    pub(super) fn new(archive: Archive, manifest: &'a Manifest, progress: &'a mut dyn FnMut(PackProgress<'_>)) -> Self {
        let total_bytes = manifest.data_bytes();
        Self { archive, manifest, progress, done_bytes: 0, total_bytes, seen: BTreeSet::new() }
    }

    /// Reads the plain member of `file`.
    pub(super) fn plain(&mut self, path: &str, file: &PackedFile, take: &mut Take<'_>) -> Result<(), PackError> {
        let header = self.header(path)?;
        if header != member::plain(path, file.bytes)? {
            return Err(self.explain(&header, path));
        }
        let mut hasher = blake3::Hasher::new();
        self.run_of_data(path, Run { offset: 0, len: file.bytes }, &mut hasher, take)?;
        self.archive.padding(file.bytes)?;
        expect(path, file.digest, Digest::from_bytes(*hasher.finalize().as_bytes()))
    }

    /// Reads a sparse member.
    pub(super) fn sparse(
        &mut self,
        path: &str,
        bytes: u64,
        data_bytes: u64,
        expected: Digest,
        take: &mut Take<'_>,
    ) -> Result<(), PackError> {
        let header = self.header(path)?;
        let content = match self.archive.sparse_head(path, &header, bytes, data_bytes) {
            Err(PackError::Member { .. }) if self.is_another(&header, path) => return Err(self.explain(&header, path)),
            other => other?,
        };
        let SparseMap { runs, .. } = content.map;
        let mut hasher = blake3::Hasher::new();
        for run in runs {
            self.run_of_data(path, run, &mut hasher, take)?;
        }
        self.archive.padding(content.map_text.len() as u64 + data_bytes)?;
        expect(path, expected, digest(&content.map_text, &hasher))
    }

    fn run_of_data(
        &mut self,
        path: &str,
        run: Run,
        hasher: &mut blake3::Hasher,
        take: &mut Take<'_>,
    ) -> Result<(), PackError> {
        let mut at = run.offset;
        while at < run.end() {
            let piece = self.archive.piece(run.end() - at)?;
            hasher.update(piece);
            take(at, piece)?;
            at += piece.len() as u64;
            self.done_bytes += piece.len() as u64;
            let (done_bytes, total_bytes) = (self.done_bytes, self.total_bytes);
            (self.progress)(PackProgress { what: path, done_bytes, total_bytes });
        }
        Ok(())
    }

    /// The header of the member that is due.
    fn header(&mut self, path: &str) -> Result<Block, PackError> {
        self.archive.enter(path);
        let header = self.archive.block()?;
        self.seen.insert(path.to_owned());
        Ok(header)
    }

    /// Whether the header is that of something else than the sparse member `path`.
    fn is_another(&self, header: &Block, path: &str) -> bool {
        let (directory, name) = path.rsplit_once('/').unwrap_or((".", path));
        member::path_of(header) != format!("{directory}/PaxHeaders/{name}") || member::objection(header).is_some()
    }

    /// Why `header` is not that of the member at `due`.
    fn explain(&self, header: &Block, due: &str) -> PackError {
        if header.iter().all(|&byte| byte == 0) {
            return PackError::Missing { path: due.to_owned() };
        }
        if let Some(error) = member::objection(header) {
            return error;
        }
        let found = member::path_of(header);
        // A sparse member is known by its extended header.
        let found = found.replacen("/PaxHeaders/", "/", 1);
        let declared = self.manifest.paths().any(|path| path == found);
        match found {
            found if found == due => unlike_declared(due),
            found if self.seen.contains(&found) || found == MANIFEST_JSON || found == MANIFEST_SIG => {
                PackError::Duplicate { path: found }
            }
            _ if declared => PackError::Missing { path: due.to_owned() },
            found => PackError::Undeclared { path: found },
        }
    }

    pub(super) fn end(&mut self) -> Result<(), PackError> {
        self.archive.enter("its end");
        let header = self.archive.block()?;
        if header != END[..header.len()] {
            return Err(self.explain(&header, ""));
        }
        if self.archive.block()? != END[header.len()..] {
            return Err(PackError::TrailingBytes);
        }
        self.archive.end()
    }
}

fn expect(path: &str, expected: Digest, actual: Digest) -> Result<(), PackError> {
    if expected == actual { Ok(()) } else { Err(PackError::Digest { what: path.to_owned(), expected, actual }) }
}

/// A header that is not the one that the member must have.
pub(super) fn unlike_declared(path: &str) -> PackError {
    PackError::member(path, "has a header unlike what the manifest declares")
}
