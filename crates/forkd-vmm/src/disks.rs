//! The disks of a machine: from the descriptors that messages bring, and onto overlays of its own.

use std::fs::File;

use forkd_devices::block::{BlockDisk, DiskError, DiskImage, LayerExtent, SealedLayer};
use forkd_memory::layer::DATA_OFFSET;
use forkd_memory::{Layer, LayerError};
use forkd_types::PageCount;

use crate::carried::{Carried, CarriedDisk, CarriedError};

/// Why disks cannot be put together.
#[derive(Debug, thiserror::Error)]
pub enum AssemblyError {
    /// There are not the descriptors that there should be.
    #[error(transparent)]
    Carried(#[from] CarriedError),
    /// A layer cannot be opened, or is not one of its disk's size.
    #[error("cannot use a layer of disk {index}")]
    Layer {
        /// Which disk.
        index: usize,
        /// Why.
        source: LayerError,
    },
    /// A disk cannot be made of what was carried.
    #[error("cannot assemble disk {index}")]
    Disk {
        /// Which.
        index: usize,
        /// Why.
        source: DiskError,
    },
}

/// Puts together the disks of these sizes from what was carried, in the order in which it was.
///
/// # Errors
/// Another number of disks was carried, or one of them cannot be used.
pub fn assemble(sizes: &[u64], carried: &mut Carried) -> Result<Vec<DiskImage>, AssemblyError> {
    let disks = carried.disks(sizes.len())?;
    let image = |(index, (disk, &size)): (usize, (CarriedDisk, &u64))| {
        let disk_error = |source| AssemblyError::Disk { index, source };
        if disk.shared {
            return DiskImage::shared(disk.base, size).map_err(disk_error);
        }
        let mut sealed = Vec::new();
        for file in disk.layers {
            let layer_error = |source| AssemblyError::Layer { index, source };
            let layer = Layer::open(file).map_err(layer_error)?;
            layer.expect_pages(PageCount::covering(size)).map_err(layer_error)?;
            sealed.push(sealed_layer(layer).map_err(disk_error)?.into());
        }
        DiskImage::new(disk.base, size, sealed).map_err(disk_error)
    };
    disks.into_iter().zip(sizes).enumerate().map(image).collect()
}

/// A layer file as the block device reads it.
fn sealed_layer(layer: Layer) -> Result<SealedLayer, DiskError> {
    let stored = layer.data().iter().map(|&run| LayerExtent { run, offset: Some(DATA_OFFSET + run.offset()) });
    let zero = layer.zero().iter().map(|&run| LayerExtent { run, offset: None });
    let mut extents: Vec<_> = stored.chain(zero).collect();
    extents.sort_unstable_by_key(|extent| extent.run);
    SealedLayer::packed(layer.into_file(), extents)
}

/// How many overlays a machine with these disks needs.
pub fn overlays_of(images: &[DiskImage]) -> usize {
    images.iter().filter(|image| !image.is_read_only()).count()
}

/// The disks of one machine: those that it may write over `overlays`, of which there are
/// [as many as needed](overlays_of), and the others as they are.
pub fn over(images: impl IntoIterator<Item = DiskImage>, overlays: Vec<File>) -> Vec<BlockDisk> {
    let mut overlays = overlays.into_iter();
    let disk = |image: DiskImage| match image.is_read_only() {
        true => image.without_overlay(),
        false => image.with_overlay(overlays.next().expect("there is an overlay for each disk that can be written")),
    };
    images.into_iter().map(disk).collect()
}
