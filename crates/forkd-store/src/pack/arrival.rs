//! Several snapshots and blobs that become visible together.
//!
//! ```text
//!             files written, checked,             renamed as one           moved to their places
//!  begin ──► staging/N-pack/ ──► arrival.json ──► arriving/N-pack/ ──────► snapshots/ blobs/
//!               │                                    │
//!               └ drop, crash: nothing happened      ├ crash: finished at the next opening
//!                                                    └ error: moved back and removed, nothing happened
//! ```
//!
//! The rename into `arriving/` is the instant at which it has happened. Moving what is in there to its place
//! can be repeated from any point: what is gone from the directory has been moved.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use forkd_types::{Digest, Tag};
use serde::{Deserialize, Serialize};

use crate::durable::{self, Moved};
use crate::meta::SNAPSHOT_JSON;
use crate::store::{Shared, Store, make_dir};
use crate::{Result, StoreError};

/// Which snapshots arrive.
const ARRIVAL_JSON: &str = "arrival.json";

/// Files on their way in; dropping it removes them.
#[derive(Debug)]
pub(super) struct Arrival {
    store: Store,
    path: PathBuf,
    writing: Vec<Tag>,
}

/// The contents of [`ARRIVAL_JSON`].
#[derive(Serialize, Deserialize)]
struct Record {
    /// The base first.
    snapshots: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    tag: Tag,
    /// Tells the new one from one that it took the place of.
    digest: Digest,
}

impl Arrival {
    /// Begins with nothing in it.
    pub(super) fn begin(store: &Store) -> Result<Self> {
        let path = store.shared.staging_path("pack");
        make_dir(&path)?;
        let arrival = Self { store: store.clone(), path, writing: Vec::new() };
        make_dir(&arrival.snapshots())?;
        make_dir(&arrival.blobs())?;
        Ok(arrival)
    }

    /// Makes the directory of a snapshot, which is listed as being written from now on.
    pub(super) fn snapshot(&mut self, tag: &Tag) -> Result<PathBuf> {
        let dir = self.snapshots().join(tag);
        make_dir(&dir)?;
        self.store.shared.changes().writing.push(tag.clone());
        self.writing.push(tag.clone());
        Ok(dir)
    }

    /// Where the blob's file goes.
    pub(super) fn blob(&self, digest: &Digest) -> PathBuf {
        self.blobs().join(digest.hex())
    }

    /// Takes a blob of the store along, so that it is there at the end even if it is removed meanwhile.
    pub(super) fn keep(&self, digest: &Digest) -> Result<()> {
        let kept = self.blob(digest);
        fs::hard_link(self.store.blob_path(digest), &kept).map_err(StoreError::io("link", &kept))
    }

    /// Makes everything visible, if `allow` has nothing against it while nothing else is published or removed.
    /// `snapshots` are those whose directories were made.
    pub(super) fn publish<E: From<StoreError>>(
        self,
        snapshots: Vec<(Tag, Digest)>,
        allow: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let entries = snapshots.into_iter().map(|(tag, digest)| Entry { tag, digest }).collect();
        let record = serde_json::to_vec(&Record { snapshots: entries }).expect("plain data");
        let record_path = self.path.join(ARRIVAL_JSON);
        fs::write(&record_path, record).map_err(StoreError::io("write", &record_path))?;
        self.seal(&self.path)?;

        let shared = &self.store.shared;
        let arriving = shared.arriving().join(self.path.file_name().expect("a path in staging has a name"));
        let changes = shared.changes();
        allow()?;
        // The number in the name is of this process; one of an earlier process was finished at the opening.
        if durable::move_new(&self.path, &arriving)? == Moved::Taken {
            let source = io::Error::from(io::ErrorKind::AlreadyExists);
            return Err(StoreError::io("rename into place as", &arriving)(source).into());
        }
        let mut moves = Vec::new();
        let finished = finish(shared, &arriving, &mut moves).inspect_err(|_| {
            // Nobody has seen any of it yet. What cannot be moved back is whole, and the rest follows it at the
            // next opening.
            if moves.iter().rev().try_for_each(Move::undo).is_ok() {
                let _ = durable::move_new(&arriving, &self.path);
            }
        });
        drop(changes);
        shared.discard(finished?);
        Ok(())
    }

    /// Makes every file read-only and flushes files and directories, from the inside out.
    fn seal(&self, dir: &Path) -> Result<()> {
        let failed = |error: io::Error| StoreError::io("list", dir)(error);
        for entry in dir.read_dir().map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_type().map_err(failed)?.is_dir() {
                self.seal(&entry.path())?;
            } else {
                durable::seal_file(&entry.path())?;
            }
        }
        durable::sync_dir(dir)
    }

    fn snapshots(&self) -> PathBuf {
        self.path.join("snapshots")
    }

    fn blobs(&self) -> PathBuf {
        self.path.join("blobs")
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        // What cannot be removed now is swept at the next opening.
        self.store.shared.discard(self.path.clone());
        let mut changes = self.store.shared.changes();
        for tag in &self.writing {
            if let Some(at) = changes.writing.iter().position(|writing| writing == tag) {
                changes.writing.swap_remove(at);
            }
        }
    }
}

/// Finishes what a process that ended had begun to make visible.
pub(crate) fn finish_all(shared: &Shared) -> Result<()> {
    let dir = shared.arriving();
    let failed = |error: io::Error| StoreError::io("list", &dir)(error);
    for entry in dir.read_dir().map_err(failed)? {
        finish(shared, &entry.map_err(failed)?.path(), &mut Vec::new())?;
    }
    Ok(())
}

/// Something that took its place.
enum Move {
    /// A place that was free: from where, to where.
    Moved(PathBuf, PathBuf),
    /// That of an earlier snapshot, which is now where this one was.
    Exchanged(PathBuf, PathBuf),
}

impl Move {
    fn undo(&self) -> Result<()> {
        match self {
            Self::Moved(from, to) => durable::move_new(to, from).map(drop),
            Self::Exchanged(one, other) => durable::exchange(one, other),
        }
    }
}

/// Moves what is in `arriving` to its place, noting each move; what then is left of it, to be removed, is where is
/// returned.
fn finish(shared: &Shared, arriving: &Path, moves: &mut Vec<Move>) -> Result<PathBuf> {
    let record_path = arriving.join(ARRIVAL_JSON);
    let record = fs::read(&record_path).map_err(StoreError::io("read", &record_path))?;
    let record: Record = serde_json::from_slice(&record)
        .map_err(|error| StoreError::io("understand", &record_path)(io::Error::from(error)))?;
    let blobs = arriving.join("blobs");
    let failed = |error: io::Error| StoreError::io("list", &blobs)(error);
    for entry in blobs.read_dir().map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let (own, place) = (entry.path(), shared.blobs().join(entry.file_name()));
        // One that is there already has the same content.
        if durable::move_new(&own, &place)? == Moved::Done {
            moves.push(Move::Moved(own, place));
        }
    }
    for Entry { tag, digest } in &record.snapshots {
        let own = arriving.join("snapshots").join(tag);
        let json = own.join(SNAPSHOT_JSON);
        match fs::read(&json) {
            Ok(json) if blake3::hash(&json) == *digest.as_bytes() => {}
            // What is here and is not the new one was exchanged for it.
            Ok(_) => continue,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(StoreError::io("read", &json)(error)),
        }
        let place = shared.snapshot(tag);
        match durable::move_new(&own, &place)? {
            Moved::Done => moves.push(Move::Moved(own, place)),
            Moved::Taken => {
                durable::exchange(&own, &place)?;
                moves.push(Move::Exchanged(own, place));
            }
        }
    }
    shared.bury(arriving, "arrived")
}
