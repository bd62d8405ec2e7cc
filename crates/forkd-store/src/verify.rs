//! Recomputing every digest of a snapshot.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

use forkd_types::{Digest, Tag};

use crate::blobs::hash_sparse;
use crate::snapshots::Snapshot;
use crate::store::Store;
use crate::{Result, StoreError};

/// What was found out about one file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It is what was written.
    Good,
    /// It is something else.
    Differs {
        /// The digest it should have.
        expected: Digest,
        /// The digest it has.
        actual: Digest,
    },
    /// It cannot be read as what it should be.
    Unreadable {
        /// Why.
        reason: String,
    },
}

/// One file that was looked at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Checked {
    /// What it is, in words: `memory.layer of py`.
    pub what: String,
    /// Where it is.
    pub path: PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
    /// What was found.
    pub outcome: Outcome,
}

/// The outcome of a verification.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VerifyReport {
    /// The snapshot.
    pub tag: Tag,
    /// Every file of it, of the snapshots it derives from and of the blobs they name.
    pub checked: Vec<Checked>,
}

/// How far a verification is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VerifyProgress<'a> {
    /// What is looked at now.
    pub what: &'a str,
    /// Bytes done.
    pub done_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
}

impl VerifyReport {
    /// Whether every file is what was written.
    pub fn is_good(&self) -> bool {
        self.bad().next().is_none()
    }

    /// The files that are not.
    pub fn bad(&self) -> impl Iterator<Item = &Checked> {
        self.checked.iter().filter(|checked| checked.outcome != Outcome::Good)
    }
}

/// How the digest of a file is computed.
#[derive(Clone, Copy)]
enum Kind {
    /// BLAKE3 of its content.
    Whole,
    /// As the layer format defines it.
    Layer,
}

struct Subject {
    what: String,
    path: PathBuf,
    expected: Digest,
    kind: Kind,
}

impl Store {
    /// Recomputes the digest of every file that the snapshot `tag` needs: its own, those of the
    /// snapshots it derives from, and their blobs.
    ///
    /// `layer_digest` checks a memory or disk layer and returns the digest it has.
    ///
    /// # Errors
    /// As [`Store::chain`], when it is not even known which files there should be. A file that is
    /// missing or differs is part of the report.
    pub fn verify<E: fmt::Display>(
        &self,
        tag: &Tag,
        layer_digest: impl Fn(&Path) -> Result<Digest, E>,
        mut progress: impl FnMut(VerifyProgress<'_>),
    ) -> Result<VerifyReport> {
        let chain = self.chain(tag)?;
        let mut subjects: Vec<Subject> = chain.iter().flat_map(snapshot_files).collect();
        let blobs: BTreeSet<Digest> = chain.iter().flat_map(|snapshot| snapshot.meta.blobs()).collect();
        subjects.extend(blobs.into_iter().map(|expected| Subject {
            what: format!("blob {expected}"),
            path: self.blob_path(&expected),
            expected,
            kind: Kind::Whole,
        }));

        let size = |subject: &Subject| subject.path.metadata().map_or(0, |metadata| metadata.len());
        let sizes: Vec<u64> = subjects.iter().map(size).collect();
        let total_bytes = sizes.iter().sum();
        let mut done_bytes = 0;
        let mut checked = Vec::with_capacity(subjects.len());
        for (Subject { what, path, expected, kind }, bytes) in subjects.into_iter().zip(sizes) {
            progress(VerifyProgress { what: &what, done_bytes, total_bytes });
            let digest = match kind {
                Kind::Whole => whole_digest(&path).map_err(|error| match error {
                    StoreError::Io { source, .. } => source.to_string(),
                    other => other.to_string(),
                }),
                Kind::Layer => layer_digest(&path).map_err(|error| error.to_string()),
            };
            let outcome = match digest {
                Ok(actual) if actual == expected => Outcome::Good,
                Ok(actual) => Outcome::Differs { expected, actual },
                Err(reason) => Outcome::Unreadable { reason },
            };
            checked.push(Checked { what, path, bytes, outcome });
            done_bytes += bytes;
        }
        progress(VerifyProgress { what: "done", done_bytes, total_bytes });
        Ok(VerifyReport { tag: tag.clone(), checked })
    }
}

fn snapshot_files(snapshot: &Snapshot) -> Vec<Subject> {
    let Snapshot { dir, meta, .. } = snapshot;
    let subject = |file: &str, expected, kind| Subject {
        what: format!("{file} of {}", meta.tag),
        path: dir.join(file),
        expected,
        kind,
    };
    let mut files = vec![subject(crate::VMSTATE, meta.vmstate.digest, Kind::Whole)];
    files.extend(meta.memory_layers.iter().map(|layer| subject(&layer.file, layer.digest, Kind::Layer)));
    let disk_layers = meta.disks.iter().flat_map(|disk| &disk.layers);
    files.extend(disk_layers.map(|layer| subject(&layer.file, layer.digest, Kind::Layer)));
    files
}

fn whole_digest(path: &Path) -> Result<Digest> {
    let file = File::open(path).map_err(StoreError::io("open", path))?;
    let mut hasher = blake3::Hasher::new();
    hash_sparse(&file, &mut hasher).map_err(StoreError::io("hash", path))?;
    Ok(Digest::from_bytes(*hasher.finalize().as_bytes()))
}
