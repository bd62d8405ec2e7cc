//! Writes a snapshot's files from the memory and disks of a process in which nothing runs.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use forkd_devices::block::{DiskError, DiskImage};
use forkd_memory::{LayerError, LayerSummary, LayerWriter, RamError};
use forkd_proto::monitor::{Contents, SnapshotFacts};
use forkd_types::{PAGE_SIZE, PageCount};
use rustix::fs::{Mode, OFlags};

use crate::seed::Seed;
use crate::stopwatch::Stopwatch;

/// CPU and device state.
pub const STATE_FILE: &str = "vmstate";
/// Guest memory.
pub const MEMORY_FILE: &str = "memory.layer";

/// The changed blocks of disk `index`.
pub fn disk_file(index: usize) -> String {
    format!("disk-{index}.layer")
}

/// Why a snapshot cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// A file cannot be created or written.
    #[error("cannot {attempt} {file}")]
    File {
        /// What was attempted.
        attempt: &'static str,
        /// Which file.
        file: String,
        /// Why it failed.
        source: io::Error,
    },
    /// Guest memory cannot be written.
    #[error("cannot write {MEMORY_FILE}")]
    Memory(#[from] RamError),
    /// A disk layer cannot be written.
    #[error("cannot write the layer of disk {index}")]
    DiskLayer {
        /// Which disk.
        index: usize,
        /// Why.
        source: LayerError,
    },
    /// A disk cannot be read.
    #[error("cannot read disk {index}")]
    Disk {
        /// Which disk.
        index: usize,
        /// Why.
        source: DiskError,
    },
}

/// Blocks that are compared at a time: 1 MiB.
const BATCH: u64 = 256;

/// Writes all files of a snapshot of `seed` into `directory`, synced.
///
/// There is a layer for the root disk, and for every other disk that was written to. With [`Contents::Changes`] they
/// go over those that the machine was made from: pages and blocks that are as they were are left out. A machine that
/// was booted was made from none and is written whole.
pub fn write(
    seed: &Seed,
    directory: &OwnedFd,
    contents: Contents,
    stopwatch: &mut Stopwatch,
) -> Result<SnapshotFacts, WriteError> {
    let mut stored_bytes = 0;
    let file = create(directory, MEMORY_FILE)?;
    let look = look_at(&file, MEMORY_FILE)?;
    let memory = match contents {
        Contents::Whole => seed.ram.write_base(file)?,
        Contents::Changes => seed.ram.write_changes(file)?,
    };
    stored_bytes += allocated(&look, MEMORY_FILE)?;
    stopwatch.lap("write_memory");
    let (mut disks, mut disk_numbers, mut disk_zero_blocks) = (Vec::new(), Vec::new(), Vec::new());
    for (index, image) in seed.disks.iter().enumerate() {
        let below = below(image, contents);
        if index > 0 && image.runs_over(&below).is_empty() {
            continue;
        }
        let name = disk_file(index);
        let file = create(directory, &name)?;
        let look = look_at(&file, &name)?;
        let layer = write_disk(file, index, image, &below)?;
        stored_bytes += allocated(&look, &name)?;
        disks.push((layer.digest, layer.pages.0));
        disk_numbers.push(index);
        disk_zero_blocks.push(layer.zero_pages.0);
    }
    stopwatch.lap("write_disks");
    let (bytes, vmstate_digest) = seed.state.encode();
    let mut file = create(directory, STATE_FILE)?;
    let failed = |source| WriteError::File { attempt: "write", file: STATE_FILE.to_owned(), source };
    file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(failed)?;
    stored_bytes += allocated(&file, STATE_FILE)?;
    stopwatch.lap("write_state");
    Ok(SnapshotFacts {
        vcpus: seed.state.config.vcpus,
        memory_bytes: seed.state.config.memory_bytes,
        vmstate_digest,
        memory_digest: memory.digest,
        memory_pages: memory.pages.0,
        memory_zero_pages: memory.zero_pages.0,
        disks,
        disk_numbers,
        disk_zero_blocks,
        stored_bytes,
    })
}

fn create(directory: &OwnedFd, name: &str) -> Result<File, WriteError> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    rustix::fs::openat(directory, name, flags, Mode::from_raw_mode(0o600))
        .map(File::from)
        .map_err(|error| WriteError::File { attempt: "create", file: name.to_owned(), source: error.into() })
}

/// A second descriptor of `file`, to measure it when its writer has finished.
fn look_at(file: &File, name: &str) -> Result<File, WriteError> {
    file.try_clone().map_err(|source| WriteError::File { attempt: "duplicate", file: name.to_owned(), source })
}

/// What `file` takes on disk; holes take nothing.
fn allocated(file: &File, name: &str) -> Result<u64, WriteError> {
    let metadata = file.metadata();
    let failed = |source| WriteError::File { attempt: "measure", file: name.to_owned(), source };
    Ok(metadata.map_err(failed)?.blocks() * 512)
}

/// What a layer of `image` lies over: its base image alone, or the layers it was put together from.
fn below(image: &DiskImage, contents: Contents) -> DiskImage {
    match contents {
        Contents::Whole => image.bare(),
        Contents::Changes => image.origin(),
    }
}

/// Writes the blocks of one disk that differ from those `below`.
fn write_disk(file: File, index: usize, image: &DiskImage, below: &DiskImage) -> Result<LayerSummary, WriteError> {
    let layer_error = |source| WriteError::DiskLayer { index, source };
    let disk_error = |source| WriteError::Disk { index, source };
    let mut writer = LayerWriter::new(file, PageCount::covering(image.size())).map_err(layer_error)?;
    let mut buffers = [vec![0; (BATCH * PAGE_SIZE) as usize], vec![0; (BATCH * PAGE_SIZE) as usize]];
    for run in image.runs_over(below) {
        for first in (run.first..run.end()).step_by(BATCH as usize) {
            let len = (BATCH.min(run.end() - first) * PAGE_SIZE) as usize;
            let [now, before] = buffers.each_mut().map(|buffer| &mut buffer[..len]);
            image.read_blocks(first, now).map_err(disk_error)?;
            below.read_blocks(first, before).map_err(disk_error)?;
            writer.store_changes(first, now, Some(before)).map_err(layer_error)?;
        }
    }
    writer.finish().map_err(layer_error)
}
