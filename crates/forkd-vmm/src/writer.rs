//! Writes a snapshot's files from the memory and disks of a process in which nothing runs.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use forkd_devices::block::{BlockDisk, DiskError, DiskImage};
use forkd_memory::{LayerError, LayerWriter, RamError};
use forkd_proto::monitor::{Contents, SnapshotFacts};
use forkd_types::{Digest, PAGE_SIZE, PageCount};
use rustix::fs::{MemfdFlags, Mode, OFlags};

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

/// Writes all files of a snapshot of `seed` into `directory`, synced.
pub fn write(
    seed: &Seed,
    directory: &OwnedFd,
    contents: Contents,
    stopwatch: &mut Stopwatch,
) -> Result<SnapshotFacts, WriteError> {
    let _ = contents;
    let memory = seed.ram.write_base(create(directory, MEMORY_FILE)?)?;
    stopwatch.lap("write_memory");
    let mut disks = Vec::new();
    for (index, image) in seed.disks.iter().enumerate() {
        disks.push(write_disk(directory, index, image)?);
    }
    stopwatch.lap("write_disks");
    let (bytes, vmstate_digest) = seed.state.encode();
    let mut file = create(directory, STATE_FILE)?;
    let failed = |source| WriteError::File { attempt: "write", file: STATE_FILE.to_owned(), source };
    file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(failed)?;
    stopwatch.lap("write_state");
    Ok(SnapshotFacts {
        vcpus: seed.state.config.vcpus,
        memory_bytes: seed.state.config.memory_bytes,
        vmstate_digest,
        memory_digest: memory.digest,
        memory_pages: memory.pages.0,
        disks,
    })
}

fn create(directory: &OwnedFd, name: &str) -> Result<File, WriteError> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    rustix::fs::openat(directory, name, flags, Mode::from_raw_mode(0o600))
        .map(File::from)
        .map_err(|error| WriteError::File { attempt: "create", file: name.to_owned(), source: error.into() })
}

/// Writes the blocks of one disk that differ from its base.
fn write_disk(directory: &OwnedFd, index: usize, image: &DiskImage) -> Result<(Digest, u64), WriteError> {
    let name = disk_file(index);
    let layer_error = |source| WriteError::DiskLayer { index, source };
    let scratch = rustix::fs::memfd_create(c"unused-overlay", MemfdFlags::CLOEXEC).map_err(|error| {
        WriteError::File { attempt: "create an overlay for", file: name.clone(), source: error.into() }
    })?;
    let disk: BlockDisk = image.clone().with_overlay(scratch.into());
    let mut writer =
        LayerWriter::new(create(directory, &name)?, PageCount::covering(disk.size())).map_err(layer_error)?;
    let mut block = [0; PAGE_SIZE as usize];
    for run in disk.changed_runs() {
        for number in run.first..run.end() {
            disk.read_block(number, &mut block).map_err(|source| WriteError::Disk { index, source })?;
            if block.iter().all(|byte| *byte == 0) {
                writer.mark_zero(forkd_types::PageRun { first: number, count: 1 });
            } else {
                writer.store(number, &block).map_err(layer_error)?;
            }
        }
    }
    let summary = writer.finish().map_err(layer_error)?;
    Ok((summary.digest, summary.pages.0))
}
