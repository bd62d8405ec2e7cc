//! Sealed layers: blocks that were written once and never change again.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};

use forkd_types::{PAGE_SIZE, PageCount, PageRun};

use super::disk::DiskError;
use super::index::{BlockIndex, Source};

/// A run of blocks in a packed layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LayerExtent {
    /// The blocks of the disk.
    pub run: PageRun,
    /// Byte offset of their content in the layer's file; `None` for zeros, which are not stored.
    pub offset: Option<u64>,
}

/// One immutable set of blocks over everything below it.
#[derive(Debug)]
pub struct SealedLayer {
    file: File,
    placement: Placement,
}

#[derive(Debug)]
enum Placement {
    /// A former overlay: block n is at n × 4096. The index is that of the whole disk at the moment
    /// of sealing.
    Overlay { index: BlockIndex, own: Source },
    /// A file that holds its runs one after another.
    Packed(Vec<LayerExtent>),
}

impl SealedLayer {
    /// A layer from a file that holds only the layer's blocks, at the places `extents` name.
    ///
    /// # Errors
    /// The extents are not ascending and disjoint.
    pub fn packed(file: File, extents: Vec<LayerExtent>) -> Result<Self, DiskError> {
        let runs: Vec<PageRun> = extents.iter().map(|extent| extent.run).collect();
        PageRun::check(&runs, PageCount(1 << 52)).map_err(|source| DiskError::Layer { source })?;
        Ok(Self { file, placement: Placement::Packed(extents) })
    }

    pub(super) fn overlay(file: File, index: BlockIndex, own: Source) -> Self {
        Self { file, placement: Placement::Overlay { index, own } }
    }

    /// The blocks of this layer, ascending. A layer that was an overlay may list zero blocks of
    /// older layers again.
    pub fn runs(&self) -> Vec<PageRun> {
        match &self.placement {
            Placement::Overlay { index, own } => index.runs(|source| source == *own || source == Source::ZERO),
            Placement::Packed(extents) => extents.iter().map(|extent| extent.run).collect(),
        }
    }

    /// The descriptor of the layer's file, to keep open across a fork.
    pub fn raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Calls `note` with each run and whether its content is zeros.
    pub(super) fn for_each_run(&self, mut note: impl FnMut(PageRun, bool)) {
        match &self.placement {
            Placement::Overlay { index, own } => {
                index.runs(|source| source == *own).into_iter().for_each(|run| note(run, false));
                index.runs(|source| source == Source::ZERO).into_iter().for_each(|run| note(run, true));
            }
            Placement::Packed(extents) => {
                extents.iter().for_each(|extent| note(extent.run, extent.offset.is_none()));
            }
        }
    }

    /// Where in the file `block`, which is in this layer, is, and how many of the `limit` blocks
    /// from there follow it without a gap.
    pub(super) fn locate(&self, block: u64, limit: u64) -> Option<(u64, u64)> {
        match &self.placement {
            Placement::Overlay { .. } => Some((block * PAGE_SIZE, limit)),
            Placement::Packed(extents) => {
                let after = extents.partition_point(|extent| extent.run.first <= block);
                let extent = extents.get(after.checked_sub(1)?)?;
                if block >= extent.run.end() {
                    return None;
                }
                let offset = extent.offset? + (block - extent.run.first) * PAGE_SIZE;
                Some((offset, limit.min(extent.run.end() - block)))
            }
        }
    }
}
