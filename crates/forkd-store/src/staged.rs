//! Snapshots on their way in.
//!
//! ```text
//!            stage(tag)                 publish(meta)
//!   (nothing) ────────► staged ─────────────────────────► published
//!                         │  files written through its fd
//!                         └──── drop, crash, error ──────► (nothing; swept at open after a crash)
//! ```

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use forkd_types::Tag;
use rustix::fs::{Dir, FileType, Gid, Mode, OFlags, Uid};

use crate::durable::{self, Moved};
use crate::meta::{SIZE_LIMIT, SNAPSHOT_JSON, SnapshotMeta, VMSTATE};
use crate::snapshots::Snapshot;
use crate::store::Store;
use crate::{Result, StoreError};

/// A directory in which a snapshot is being written. Dropping it removes it.
#[derive(Debug)]
pub struct StagedSnapshot {
    store: Store,
    tag: Tag,
    path: PathBuf,
    dir: OwnedFd,
    /// Names of files that are a published snapshot's too.
    linked: Vec<String>,
}

impl Store {
    /// Begins a snapshot that will be called `tag`.
    ///
    /// Two may be staged for one tag; what counts is which is published first.
    pub fn stage(&self, tag: &Tag) -> Result<StagedSnapshot> {
        let path = self.shared.staging_path(tag.as_str());
        rustix::fs::mkdir(&path, Mode::RWXU).map_err(StoreError::io("create directory", &path))?;
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let opened = rustix::fs::open(&path, flags, Mode::empty()).map_err(StoreError::io("open", &path));
        let dir = opened.inspect_err(|_| self.shared.discard(path.clone()))?;
        self.shared.changes().writing.push(tag.clone());
        Ok(StagedSnapshot { store: self.clone(), tag: tag.clone(), path, dir, linked: Vec::new() })
    }

    /// Publishes a staged snapshot: checks it against `meta`, writes `snapshot.json`, flushes
    /// everything and gives it its name in one step. With `replace`, an earlier snapshot of the tag
    /// goes in the same step; without, or when others derive from the earlier one, that is an error.
    ///
    /// # Errors
    /// [`StoreError::AlreadyExists`], [`StoreError::HasChildren`]; [`StoreError::ParentMissing`] when the
    /// parent or any of its own is not there as recorded, [`StoreError::TooDeep`];
    /// [`StoreError::Inconsistent`] when the files or blobs that `meta` names are not there, or the parent
    /// is of another machine. After an error the staged snapshot is gone and the store is as it was.
    pub fn publish(&self, staged: StagedSnapshot, meta: SnapshotMeta, replace: bool) -> Result<Snapshot> {
        staged.check(&meta)?;
        let digest = staged.seal(&meta)?;
        let target = self.shared.snapshot(&staged.tag);
        // Dropped before `staged`, which takes the lock to leave the list of those being written.
        let _changes = self.shared.changes();
        if let [parent, ..] = self.ancestors(&meta.tag, meta.parent.as_ref())?.as_slice() {
            meta.check_over(&parent.meta)
                .map_err(|reason| StoreError::Inconsistent { tag: meta.tag.clone(), reason })?;
        }
        if durable::move_new(&staged.path, &target)? == Moved::Taken {
            if !replace {
                return Err(StoreError::AlreadyExists { tag: meta.tag });
            }
            self.refuse_children(&meta.tag)?;
            // The staged path then holds the earlier one, which goes when `staged` drops.
            durable::exchange(&staged.path, &target)?;
        }
        Ok(Snapshot { dir: target, meta, digest })
    }
}

impl StagedSnapshot {
    /// The tag it will have.
    pub fn tag(&self) -> &Tag {
        &self.tag
    }

    /// The directory to write into.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory to write into, for a writer that cannot see its path.
    pub fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Makes the file at `source`, which belongs to a published snapshot, also a file of this one, called
    /// `name`. Nothing is copied: published files never change, and stay while anyone has them. To be done
    /// when the writer has finished.
    pub fn link(&mut self, source: &Path, name: &str) -> Result<()> {
        let target = self.path.join(name);
        std::fs::hard_link(source, &target).map_err(StoreError::io("link", &target))?;
        self.linked.push(name.to_owned());
        Ok(())
    }

    /// Gives the directory to another user, so that a writer without privileges can create files
    /// in it. Publishing takes it and its files back.
    pub fn hand_to(&self, uid: u32, gid: u32) -> Result<()> {
        rustix::fs::fchown(&self.dir, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .map_err(StoreError::io("change the owner of", &self.path))
    }

    /// Length of the state file that was written.
    pub fn vmstate_bytes(&self) -> Result<u64> {
        let path = self.path.join(VMSTATE);
        Ok(path.symlink_metadata().map_err(StoreError::io("stat", &path))?.len())
    }

    /// Whether `meta` describes what is here.
    fn check(&self, meta: &SnapshotMeta) -> Result<()> {
        let inconsistent = |reason| StoreError::Inconsistent { tag: self.tag.clone(), reason };
        let version = meta.fitting_version();
        if meta.version != version {
            return Err(inconsistent(format!("its version is {}, {version} is written", meta.version)));
        }
        if meta.tag != self.tag {
            return Err(inconsistent(format!("it was staged as {} and described as {}", self.tag, meta.tag)));
        }
        meta.check().map_err(inconsistent)?;
        for digest in meta.blobs() {
            if self.store.blob(&digest)?.is_none() {
                return Err(inconsistent(format!("it needs blob {digest}, which is not in the store")));
            }
        }
        let failed = StoreError::io("list", &self.path);
        let entries = Dir::read_from(&self.dir).and_then(Iterator::collect::<rustix::io::Result<Vec<_>>>);
        for entry in entries.map_err(failed)? {
            let name = entry.file_name().to_string_lossy();
            if name != "." && name != ".." && !meta.files().any(|file| *file == *name) {
                return Err(inconsistent(format!("{name} was written but is not part of its description")));
            }
        }
        Ok(())
    }

    /// Writes the description, makes every file read-only and ours, and flushes it all.
    fn seal(&self, meta: &SnapshotMeta) -> Result<forkd_types::Digest> {
        let inconsistent = |reason| StoreError::Inconsistent { tag: self.tag.clone(), reason };
        for name in meta.files() {
            let path = self.path.join(name);
            // The writer may be a monitor that its guest took over: a link it left must not lead
            // anywhere, nor a FIFO hold us up.
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = rustix::fs::openat(&self.dir, name, flags, Mode::empty())
                .map_err(StoreError::io("open the written file", &path))?;
            let stat = rustix::fs::fstat(&file).map_err(StoreError::io("stat", &path))?;
            let shared = stat.st_nlink != 1 && !self.linked.iter().any(|linked| linked == name);
            if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || shared {
                return Err(inconsistent(format!("{name} is not a regular file of its own")));
            }
            if name == VMSTATE && stat.st_size as u64 != meta.vmstate.bytes {
                let (is, said) = (stat.st_size, meta.vmstate.bytes);
                return Err(inconsistent(format!("{name} holds {is} bytes, its description says {said}")));
            }
            seal_fd(&file, Mode::from_raw_mode(0o444)).map_err(StoreError::io("seal", &path))?;
        }
        let json = meta.encode().map_err(inconsistent)?;
        if json.len() as u64 > SIZE_LIMIT {
            return Err(inconsistent(format!("its description takes {} bytes, {SIZE_LIMIT} fit", json.len())));
        }
        let path = self.path.join(SNAPSHOT_JSON);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.dir, SNAPSHOT_JSON, flags, Mode::from_raw_mode(0o600))
            .map_err(StoreError::io("create", &path))?;
        let mut file = File::from(file);
        file.write_all(&json).map_err(StoreError::io("write", &path))?;
        seal_fd(&OwnedFd::from(file), Mode::from_raw_mode(0o444)).map_err(StoreError::io("seal", &path))?;
        seal_fd(&self.dir, Mode::from_raw_mode(0o700)).map_err(StoreError::io("seal", &self.path))?;
        Ok(forkd_types::Digest::from_bytes(*blake3::hash(&json).as_bytes()))
    }
}

/// Takes a file back from its writer, sets its mode and flushes it.
fn seal_fd(fd: &OwnedFd, mode: Mode) -> rustix::io::Result<()> {
    rustix::fs::fchown(fd, Some(rustix::process::geteuid()), Some(rustix::process::getegid()))?;
    rustix::fs::fchmod(fd, mode)?;
    rustix::fs::fsync(fd)
}

impl Drop for StagedSnapshot {
    /// Removes what is at the staged path: this snapshot, or after a replacement the earlier one,
    /// or nothing. What cannot be removed now is swept at the next opening.
    fn drop(&mut self) {
        self.store.shared.discard(self.path.clone());
        let mut changes = self.store.shared.changes();
        if let Some(at) = changes.writing.iter().position(|tag| *tag == self.tag) {
            changes.writing.swap_remove(at);
        }
    }
}
