//! From a pack to files that are checked.
//!
//! ```text
//! manifest ──► signature ──► descriptions ──► what is new, does it fit ──► layers ──► blobs ──► end ──► arrival
//! ```
//!
//! Before the first large file is written, everything that small ones can tell is known to be right: the
//! chain, the names, the sizes, the space, and that nothing is in the way.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::thread::ScopedJoinHandle;

use forkd_types::{Digest, Tag};

use super::PackProgress;
use super::archive::Archive;
use super::arrival::Arrival;
use super::description::{self, Described};
use super::error::PackError;
use super::head::read_manifest;
use super::manifest::{Manifest, PackedBlob, PackedFile};
use super::members::Members;
use super::settle::Fate;
use super::signature::VerifyingKey;
use crate::durable;
use crate::meta::SNAPSHOT_JSON;
use crate::sparse::SparseWriter;
use crate::store::Store;
use crate::{Result, StoreError};

/// How much of the file system stays free.
const RESERVE: u64 = 64 << 20;

/// How a pack is taken in.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct UnpackOptions {
    /// Another name for the snapshot that was packed; what it derives from keeps its names.
    pub rename: Option<Tag>,
    /// Replace snapshots of the same names that are others and that nothing else derives from.
    pub replace: bool,
    /// Take only what this key has signed.
    pub verify_key: Option<VerifyingKey>,
}

/// What came of a pack.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unpacked {
    /// The snapshot that was packed, by the name that it has here.
    pub tag: Tag,
    /// It and all that it derives from, the base first.
    pub snapshots: Vec<UnpackedSnapshot>,
    /// Blobs that are new to the store.
    pub new_blobs: usize,
    /// Blobs that it had.
    pub reused_blobs: usize,
    /// Bytes that were written.
    pub written_bytes: u64,
    /// Whether a signature was asked for and is good.
    pub verified: bool,
}

/// What came of one snapshot of a pack.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnpackedSnapshot {
    /// Its name here.
    pub tag: Tag,
    /// What came of it.
    pub fate: Fate,
}

impl Store {
    /// Takes in a pack. Either everything in it is there at the end, or nothing that was not there before.
    ///
    /// `layer_digest` checks a memory or disk layer and returns the digest it has, as for [`Store::verify`].
    ///
    /// # Errors
    /// What is wrong with the pack or in its way.
    pub fn unpack<E: fmt::Display>(
        &self,
        pack: impl Read + Send,
        options: &UnpackOptions,
        layer_digest: impl Fn(&Path) -> Result<Digest, E>,
        mut progress: impl FnMut(PackProgress<'_>),
    ) -> Result<Unpacked, PackError> {
        let check = |path: &Path| layer_digest(path).map_err(|error| error.to_string());
        std::thread::scope(|scope| {
            let mut archive = Archive::open(scope, pack)?;
            let (manifest, verified) = read_manifest(&mut archive, options.verify_key.as_ref())?;
            let (written, flush) = channel::<PathBuf>();
            let flushing = scope.spawn(move || flush.into_iter().try_for_each(|path| durable::seal_file(&path)));
            let unpacking = Unpacking {
                store: self,
                members: Members::new(archive, &manifest, &mut progress),
                manifest: &manifest,
                check: &check,
                written,
            };
            unpacking.run(options, verified, flushing)
        })
    }
}

struct Unpacking<'a> {
    store: &'a Store,
    members: Members<'a>,
    manifest: &'a Manifest,
    check: &'a dyn Fn(&Path) -> Result<Digest, String>,
    /// Files that are finished, to be flushed while the next ones come.
    written: Sender<PathBuf>,
}

impl<'a> Unpacking<'a> {
    fn run(
        mut self,
        options: &UnpackOptions,
        verified: bool,
        flushing: ScopedJoinHandle<'_, Result<()>>,
    ) -> Result<Unpacked, PackError> {
        let store = self.store;
        let described = description::read_all(&mut self.members, self.manifest, options.rename.as_ref())?;
        let named: Vec<(Tag, Digest)> = described.iter().map(|one| (one.meta.tag.clone(), one.digest)).collect();
        let fates = self.store.settle(&named, options.replace)?;
        let new_blobs = self.space(&fates)?;

        let mut arrival = Arrival::begin(self.store)?;
        let mut arriving = Vec::new();
        for (one, fate) in described.iter().zip(&fates) {
            let target = match fate {
                Fate::Reused => None,
                Fate::Published | Fate::Replaced => Some(arrival.snapshot(&one.meta.tag)?),
            };
            if let Some(dir) = &target {
                let path = dir.join(SNAPSHOT_JSON);
                fs::write(&path, &one.json).map_err(StoreError::io("write", &path))?;
                arriving.push((one.meta.tag.clone(), one.digest));
            }
            for file in &one.packed.files[1..] {
                self.file(one, file, target.as_deref())?;
            }
        }
        let manifest = self.manifest;
        for blob in &manifest.blobs {
            if new_blobs.contains(&blob.blob) {
                self.new_blob(blob, &arrival)?;
            } else {
                self.members.sparse(&blob.path(), blob.bytes, blob.data_bytes, blob.digest, &mut |_, _| Ok(()))?;
                arrival.keep(&blob.blob)?;
            }
        }
        self.members.end()?;

        let written_bytes = self.written_bytes(&fates, &new_blobs);
        drop(self.written);
        flushing.join().expect("flushing does not panic")?;
        if !arriving.is_empty() || !new_blobs.is_empty() {
            arrival.publish(arriving, || -> Result<(), PackError> {
                // What was settled may have changed while the files came in.
                if store.settle(&named, options.replace)? == fates { Ok(()) } else { Err(PackError::Changed) }
            })?;
        }
        let tag = named.last().expect("a chain has a head").0.clone();
        let snapshots = named.into_iter().zip(&fates).map(|((tag, _), &fate)| UnpackedSnapshot { tag, fate }).collect();
        let reused_blobs = manifest.blobs.len() - new_blobs.len();
        let new_blobs = new_blobs.len();
        Ok(Unpacked { tag, snapshots, new_blobs, reused_blobs, written_bytes, verified })
    }

    /// Which blobs are new, and that everything that is fits the file system.
    fn space(&self, fates: &[Fate]) -> Result<BTreeSet<Digest>, PackError> {
        let mut new_blobs = BTreeSet::new();
        for blob in &self.manifest.blobs {
            if self.store.blob(&blob.blob)?.is_none() {
                new_blobs.insert(blob.blob);
            }
        }
        let (needed, free) = (self.written_bytes(fates, &new_blobs), self.store.free_bytes()?);
        if needed.saturating_add(RESERVE) > free {
            return Err(PackError::NoSpace { needed, free });
        }
        Ok(new_blobs)
    }

    /// Bytes of data of what is new.
    fn written_bytes(&self, fates: &[Fate], new_blobs: &BTreeSet<Digest>) -> u64 {
        let new = self.manifest.snapshots.iter().zip(fates).filter(|(_, fate)| **fate != Fate::Reused);
        let files = new.flat_map(|(snapshot, _)| &snapshot.files).map(|file| file.data_bytes);
        let blobs = self.manifest.blobs.iter().filter(|blob| new_blobs.contains(&blob.blob));
        files.chain(blobs.map(|blob| blob.data_bytes)).sum()
    }

    /// Reads one file of a snapshot, into `dir` if it is new.
    fn file(&mut self, one: &Described<'_>, file: &PackedFile, dir: Option<&Path>) -> Result<(), PackError> {
        let member = one.packed.path(file);
        let Some(dir) = dir else {
            return if file.is_sparse() {
                self.members.sparse(&member, file.bytes, file.data_bytes, file.digest, &mut |_, _| Ok(())).map(drop)
            } else {
                self.members.plain(&member, file, &mut |_, _| Ok(()))
            };
        };
        let path = dir.join(&file.name);
        let target = create(&path)?;
        let mut write = |at, bytes: &[u8]| target.write_all_at(bytes, at).map_err(StoreError::io("write", &path));
        if !file.is_sparse() {
            return self.members.plain(&member, file, &mut write);
        }
        self.members.sparse(&member, file.bytes, file.data_bytes, file.digest, &mut write)?;
        target.set_len(file.bytes).map_err(StoreError::io("size", &path))?;
        let what = format!("{} of {}", file.name, one.packed.tag);
        let expected = one.layer_digest(&file.name);
        match (self.check)(&path) {
            Ok(actual) if actual == expected => {}
            Ok(actual) => return Err(PackError::Digest { what, expected, actual }),
            Err(reason) => return Err(PackError::Layer { what, reason }),
        }
        self.flush(path);
        Ok(())
    }

    fn new_blob(&mut self, blob: &PackedBlob, arrival: &Arrival) -> Result<(), PackError> {
        let path = arrival.blob(&blob.blob);
        let mut writer = SparseWriter::new(create(&path)?);
        let failed = |error| StoreError::io("write", &path)(error);
        self.members.sparse(&blob.path(), blob.bytes, blob.data_bytes, blob.digest, &mut |at, bytes| {
            let gap = at - writer.len();
            writer.zeros(gap).and_then(|()| writer.write_all(bytes)).map_err(failed)
        })?;
        let gap = blob.bytes - writer.len();
        let (_, actual, _) = writer.zeros(gap).and_then(|()| writer.finish()).map_err(failed)?;
        if actual != blob.blob {
            let what = format!("blob {}", blob.blob.hex());
            return Err(PackError::Digest { what, expected: blob.blob, actual });
        }
        self.flush(path);
        Ok(())
    }

    /// Begins to flush a file that is finished. What goes wrong with it is known when all are.
    fn flush(&self, path: PathBuf) {
        // A thread that has ended has found something wrong.
        let _ = self.written.send(path);
    }
}

fn create(path: &Path) -> Result<File> {
    File::options().read(true).write(true).create_new(true).open(path).map_err(StoreError::io("create", path))
}
