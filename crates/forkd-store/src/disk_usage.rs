//! What files occupy, holes not counted.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::{Result, StoreError};

/// Bytes that a file occupies on disk (`st_blocks` counts 512-byte units on every Linux file system).
pub(crate) fn of_file(metadata: &Metadata) -> u64 {
    metadata.blocks() * 512
}

/// Bytes that a flat directory and its files occupy.
pub(crate) fn of_dir(dir: &Path) -> Result<u64> {
    let failed = |error| StoreError::io("measure", dir)(error);
    let mut total = of_file(&dir.metadata().map_err(failed)?);
    for entry in dir.read_dir().map_err(failed)? {
        total += of_file(&entry.and_then(|entry| entry.metadata()).map_err(failed)?);
    }
    Ok(total)
}
