//! Steps that survive a power cut: synced files, renames whose directories are synced.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::fs::{CWD, RenameFlags};

use crate::{Result, StoreError};

/// Flushes a directory, so that names created or renamed in it are on disk.
pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(StoreError::io("sync directory", path))
}

/// Makes a finished file read-only and flushes its data and length.
pub(crate) fn seal_file(path: &Path) -> Result<()> {
    let file = File::open(path).map_err(StoreError::io("open", path))?;
    file.set_permissions(PermissionsExt::from_mode(0o444)).map_err(StoreError::io("make read-only", path))?;
    file.sync_all().map_err(StoreError::io("sync", path))
}

/// What a rename did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Moved {
    /// The new name is ours.
    Done,
    /// The new name was taken; nothing changed.
    Taken,
}

/// Renames `from` to `to` unless `to` exists, and flushes both directories. After an error the names are as
/// they were.
pub(crate) fn move_new(from: &Path, to: &Path) -> Result<Moved> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        Err(rustix::io::Errno::EXIST | rustix::io::Errno::NOTEMPTY) => return Ok(Moved::Taken),
        Err(error) => return Err(StoreError::io("rename into place as", to)(error)),
    }
    if let Err(error) = sync_parents(from, to) {
        // Nobody was told of the new name yet. If it cannot be taken back either, what has it is whole.
        let _ = rustix::fs::renameat_with(CWD, to, CWD, from, RenameFlags::NOREPLACE);
        return Err(error);
    }
    Ok(Moved::Done)
}

/// Swaps two names in one step and flushes both directories. After an error the names are as they were.
pub(crate) fn exchange(one: &Path, other: &Path) -> Result<()> {
    let swap = || rustix::fs::renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE);
    swap().map_err(StoreError::io("exchange with a new version", other))?;
    sync_parents(one, other).inspect_err(|_| {
        // As in `move_new`.
        let _ = swap();
    })
}

/// The new name first: if power fails between the two, the old name may come back as a leftover in
/// staging, but the new one is never lost.
fn sync_parents(from: &Path, to: &Path) -> Result<()> {
    for path in [to, from] {
        sync_dir(path.parent().expect("paths in a store have a directory"))?;
    }
    Ok(())
}
