//! Published snapshots: reading, listing, removing.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use forkd_types::{Digest, Tag};

use crate::disk_usage;
use crate::meta::{ParentRef, SIZE_LIMIT, SNAPSHOT_JSON, SnapshotMeta, VMSTATE};
use crate::store::Store;
use crate::{Result, StoreError};

/// The most ancestors of a snapshot. A zygote opens every layer between the base and its snapshot.
pub const DEPTH_LIMIT: usize = 64;

/// A published snapshot. It never changes; it may be removed or replaced while this value lives.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Snapshot {
    /// Its directory.
    pub dir: PathBuf,
    /// What `snapshot.json` says.
    pub meta: SnapshotMeta,
    /// BLAKE3 of `snapshot.json`: what a child records of its parent.
    pub digest: Digest,
}

/// One entry of a listing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Listed {
    /// Whole and usable.
    Ready {
        /// The snapshot.
        snapshot: Box<Snapshot>,
        /// What its directory occupies on disk; its blobs and parents are not counted.
        stored_bytes: u64,
    },
    /// Being written for the first time.
    Writing {
        /// The tag it will have.
        tag: Tag,
    },
    /// There, but not usable.
    Failed {
        /// Its tag.
        tag: Tag,
        /// Its directory.
        dir: PathBuf,
        /// What is wrong.
        reason: String,
        /// What its directory occupies on disk, as far as it could be read.
        stored_bytes: u64,
    },
}

impl Listed {
    /// The tag of the entry.
    pub fn tag(&self) -> &Tag {
        match self {
            Self::Ready { snapshot, .. } => &snapshot.meta.tag,
            Self::Writing { tag } | Self::Failed { tag, .. } => tag,
        }
    }
}

impl Snapshot {
    /// Path of the CPU and device state.
    pub fn vmstate(&self) -> PathBuf {
        self.dir.join(VMSTATE)
    }

    /// Paths of this snapshot's own memory layers, oldest first; its parent's come before them.
    pub fn memory_layers(&self) -> impl Iterator<Item = PathBuf> + '_ {
        self.meta.memory_layers.iter().map(|layer| self.dir.join(&layer.file))
    }

    /// Paths of this snapshot's own layers of disk `index`, oldest first; its parent's come before them.
    pub fn disk_layers(&self, index: usize) -> impl Iterator<Item = PathBuf> + '_ {
        self.meta.disks.get(index).into_iter().flat_map(|disk| &disk.layers).map(|layer| self.dir.join(&layer.file))
    }

    fn load(dir: PathBuf, tag: &Tag) -> Result<Self> {
        let damaged = |reason| StoreError::Damaged { tag: tag.clone(), dir: dir.clone(), reason };
        let json = dir.join(SNAPSHOT_JSON);
        let bytes = match read_limited(&json) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Err(damaged(format!("{SNAPSHOT_JSON} exceeds {SIZE_LIMIT} bytes"))),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !dir.exists() => {
                return Err(StoreError::NotFound { tag: tag.clone() });
            }
            Err(error) if is_absence(&error) => {
                return Err(damaged(format!("{SNAPSHOT_JSON} cannot be read: {error}")));
            }
            // Too many open files, say: that is no word about the snapshot.
            Err(error) => return Err(StoreError::io("read", &json)(error)),
        };
        let meta = SnapshotMeta::parse(&bytes).map_err(&damaged)?;
        if meta.tag != *tag {
            return Err(damaged(format!("{SNAPSHOT_JSON} is that of a snapshot {}", meta.tag)));
        }
        for file in meta.files() {
            let path = dir.join(file);
            match path.symlink_metadata() {
                Ok(metadata) if !metadata.is_file() => return Err(damaged(format!("{file} is not a regular file"))),
                Ok(metadata) if file == VMSTATE && metadata.len() != meta.vmstate.bytes => {
                    let (is, was) = (metadata.len(), meta.vmstate.bytes);
                    return Err(damaged(format!("{file} holds {is} bytes, {was} were written")));
                }
                Ok(_) => {}
                Err(error) if is_absence(&error) => return Err(damaged(format!("{file} cannot be found: {error}"))),
                Err(error) => return Err(StoreError::io("look for", &path)(error)),
            }
        }
        let digest = Digest::from_bytes(*blake3::hash(&bytes).as_bytes());
        Ok(Self { dir, meta, digest })
    }
}

impl Store {
    /// The snapshot `tag`.
    ///
    /// Reads its description and looks for its files; no digest is computed.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Damaged`].
    pub fn get(&self, tag: &Tag) -> Result<Snapshot> {
        Snapshot::load(self.shared.snapshot(tag), tag)
    }

    /// The snapshot `tag` and all it derives from, the base first: the order in which memory and
    /// disk layers are laid over one another.
    ///
    /// Every parent is checked to have the digest that its child recorded, which covers its description
    /// and thereby the digests of its files; the files themselves are not read.
    ///
    /// # Errors
    /// As [`Store::get`], and [`StoreError::ParentMissing`], [`StoreError::TooDeep`].
    pub fn chain(&self, tag: &Tag) -> Result<Vec<Snapshot>> {
        let newest = self.get(tag)?;
        let mut chain = self.ancestors(tag, newest.meta.parent.as_ref())?;
        chain.insert(0, newest);
        chain.reverse();
        Ok(chain)
    }

    /// What a snapshot `tag` over `parent` derives from, its parent first.
    pub(crate) fn ancestors(&self, tag: &Tag, parent: Option<&ParentRef>) -> Result<Vec<Snapshot>> {
        let mut ancestors: Vec<Snapshot> = Vec::new();
        let mut child = tag.clone();
        let mut next = parent.cloned();
        // A cycle would need a snapshot.json that holds its own BLAKE3, so this ends.
        while let Some(parent) = next {
            if ancestors.len() == DEPTH_LIMIT {
                return Err(StoreError::TooDeep { tag: tag.clone(), limit: DEPTH_LIMIT });
            }
            let found = self.parent(&child, &parent)?;
            next = found.meta.parent.clone();
            child = parent.tag;
            ancestors.push(found);
        }
        Ok(ancestors)
    }

    /// All snapshots in the order of their tags. A broken one is an entry, not an error.
    pub fn list(&self) -> Result<Vec<Listed>> {
        let mut writing = self.shared.changes().writing.clone();
        let mut all = self.published()?;
        writing.retain(|tag| all.iter().all(|listed| listed.tag() != tag));
        writing.sort();
        writing.dedup();
        all.extend(writing.into_iter().map(|tag| Listed::Writing { tag }));
        all.sort_by(|one, other| one.tag().cmp(other.tag()));
        Ok(all)
    }

    /// Removes the snapshot `tag`, whole or broken. Its files are unlinked: what runs from them
    /// runs on.
    ///
    /// # Errors
    /// [`StoreError::HasChildren`] while others derive from it, [`StoreError::NotFound`]. It is still there
    /// after each of them, and also when another snapshot cannot be read just now, which may derive from it.
    pub fn remove(&self, tag: &Tag) -> Result<()> {
        self.remove_if(tag, || self.refuse_children(tag))
    }

    /// Removes the snapshot `tag` although others may derive from it, and returns those that do so
    /// directly. They stay, and with everything that derives from them are of no use any more:
    /// [`Store::chain`] says of each which parent is missing.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub fn remove_forced(&self, tag: &Tag) -> Result<Vec<Tag>> {
        let mut orphans = Vec::new();
        self.remove_if(tag, || {
            // Those that cannot be read just now are not told of; they lose their parent all the same.
            orphans = children_among(&self.whole(|_, _| Ok(()))?, tag);
            orphans.sort();
            Ok(())
        })?;
        Ok(orphans)
    }

    /// Removes `tag` if `allow` does not object; nothing is published or removed meanwhile.
    fn remove_if(&self, tag: &Tag, allow: impl FnOnce() -> Result<()>) -> Result<()> {
        let changes = self.shared.changes();
        let dir = self.shared.snapshot(tag);
        if dir.symlink_metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            return Err(StoreError::NotFound { tag: tag.clone() });
        }
        allow()?;
        let grave = self.shared.bury(&dir, tag.as_str())?;
        drop(changes);
        self.shared.discard(grave);
        Ok(())
    }

    /// Every snapshot that derives from `tag`, directly or not, in an order in which they can be
    /// removed: children before their parents. `tag` itself is not among them.
    pub fn descendants(&self, tag: &Tag) -> Result<Vec<Tag>> {
        let published = self.whole(|_, error| Err(error))?;
        let mut found = vec![tag.clone()];
        let mut next = 0;
        while next < found.len() {
            // Each has one parent, but one that is broken counts as whatever its tag is named for.
            let mut children = children_among(&published, &found[next]);
            children.retain(|child| !found.contains(child));
            found.extend(children);
            next += 1;
        }
        found.reverse();
        found.pop();
        Ok(found)
    }

    /// The tags of published snapshots, whole and broken, in no order.
    fn tags(&self) -> Result<Vec<Tag>> {
        let root = self.shared.snapshots();
        let failed = |error: io::Error| StoreError::io("list", &root)(error);
        let names = root.read_dir().map_err(failed)?.map(|entry| Ok(entry.map_err(failed)?.file_name()));
        // What is no tag was not put here by a store.
        let tags = names.filter_map(|name: Result<_>| name.map(|name| name.to_string_lossy().parse().ok()).transpose());
        tags.collect()
    }

    /// Published snapshots that are whole, in no order. `unknown` says what to do about one that cannot be read
    /// just now.
    fn whole(&self, unknown: impl Fn(&Tag, StoreError) -> Result<()>) -> Result<Vec<Snapshot>> {
        let mut whole = Vec::new();
        for tag in self.tags()? {
            match self.get(&tag) {
                Ok(snapshot) => whole.push(snapshot),
                Err(StoreError::NotFound { .. } | StoreError::Damaged { .. }) => {}
                Err(error) => unknown(&tag, error)?,
            }
        }
        Ok(whole)
    }

    /// Published snapshots, whole and broken, in no order.
    pub(crate) fn published(&self) -> Result<Vec<Listed>> {
        let root = self.shared.snapshots();
        let mut all = Vec::new();
        for tag in self.tags()? {
            let dir = root.join(&tag);
            let measured = disk_usage::of_dir(&dir);
            match (self.get(&tag), measured) {
                (Ok(snapshot), Ok(stored_bytes)) => {
                    all.push(Listed::Ready { snapshot: Box::new(snapshot), stored_bytes });
                }
                // Removed since the directory was read.
                (Err(StoreError::NotFound { .. }), _) => {}
                (Err(StoreError::Damaged { reason, .. }), measured) => {
                    all.push(Listed::Failed { tag, dir, reason, stored_bytes: measured.unwrap_or(0) });
                }
                (Ok(_), Err(_)) if !dir.exists() => {}
                (Err(error), _) | (Ok(_), Err(error)) => {
                    let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
                    let reason = format!("{error}{}", cause.unwrap_or_default());
                    all.push(Listed::Failed { tag, dir, reason, stored_bytes: 0 });
                }
            }
        }
        Ok(all)
    }

    /// The parent that `child` names, or why it is not there.
    pub(crate) fn parent(&self, child: &Tag, parent: &ParentRef) -> Result<Snapshot> {
        let missing = |actual| StoreError::ParentMissing {
            tag: child.clone(),
            parent: parent.tag.clone(),
            expected: parent.digest,
            actual,
        };
        match self.get(&parent.tag) {
            Ok(snapshot) if snapshot.digest == parent.digest => Ok(snapshot),
            Ok(snapshot) => Err(missing(Some(snapshot.digest))),
            Err(StoreError::NotFound { .. }) => Err(missing(None)),
            Err(error) => Err(error),
        }
    }

    /// Fails while another snapshot derives from `tag`, which then can neither be removed nor replaced.
    ///
    /// # Errors
    /// [`StoreError::HasChildren`], or why it cannot be told.
    pub fn refuse_children(&self, tag: &Tag) -> Result<()> {
        let children = self.children(tag)?;
        if children.is_empty() { Ok(()) } else { Err(StoreError::HasChildren { tag: tag.clone(), children }) }
    }

    /// The snapshots that derive directly from the one published as `tag`, in the order of their tags.
    ///
    /// # Errors
    /// When one cannot be read just now, which may be among them.
    pub(crate) fn children(&self, tag: &Tag) -> Result<Vec<Tag>> {
        // What `tag` is itself is not the question: it must be possible to remove it when it cannot be read.
        let whole = self.whole(|of, error| if of == tag { Ok(()) } else { Err(error) })?;
        let mut children = children_among(&whole, tag);
        children.sort();
        Ok(children)
    }
}

/// The children of `parent`. Those of an earlier snapshot of the same tag, which was removed by force, are
/// not among them; of a broken one the digest is not known, and all that name the tag are.
fn children_among(whole: &[Snapshot], parent: &Tag) -> Vec<Tag> {
    let digest = whole.iter().find(|snapshot| snapshot.meta.tag == *parent).map(|snapshot| snapshot.digest);
    let derives = |named: &ParentRef| named.tag == *parent && digest.is_none_or(|digest| named.digest == digest);
    let children = whole.iter().filter(|snapshot| snapshot.meta.parent.as_ref().is_some_and(derives));
    children.map(|snapshot| snapshot.meta.tag.clone()).collect()
}

/// Whether a file is not there, or is something that no store made.
fn is_absence(error: &io::Error) -> bool {
    use io::ErrorKind::{IsADirectory, NotADirectory, NotFound};
    matches!(error.kind(), NotFound | NotADirectory | IsADirectory)
        || rustix::io::Errno::from_io_error(error) == Some(rustix::io::Errno::LOOP)
}

/// The bytes of a file, or `None` when there are more than a description may have.
fn read_limited(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(SIZE_LIMIT + 1).read_to_end(&mut bytes)?;
    Ok((bytes.len() as u64 <= SIZE_LIMIT).then_some(bytes))
}
