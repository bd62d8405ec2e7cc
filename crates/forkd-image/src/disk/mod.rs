//! Root disks: ext4 images from a Debian suite, a directory or an archive, without mounting.
//!
//! ```text
//! source ──► tree (a directory) ──► ext4 image ──► <cache>/disks/<recipe digest>.ext4
//!   debian: bootstrapped in scratch      mke2fs -d       one rename
//!   tar:    unpacked in scratch
//!   dir:    the directory itself
//! ```

pub(crate) mod archive;
pub(crate) mod correction;
pub(crate) mod debian;
mod ext4;
mod source;
mod tree;

use std::fs;
use std::path::{Path, PathBuf};

use forkd_types::{ByteSize, Digest};

use crate::error::require_space;
use crate::progress::Progress;
use crate::scratch::ScratchDir;
use crate::{ImageError, Result};

pub use source::RootDiskSource;

/// Changes when the same source would give another image.
const RECIPE_VERSION: u32 = 1;
/// Room for what a guest writes, when no size is asked for.
const SPARE: u64 = 512 << 20;
/// Sizes that are not asked for are multiples of this.
const SIZE_STEP: u64 = 64 << 20;
/// Part of the work that is done when the tree is there.
const TREE_PART: f64 = 0.9;

/// Where and how a root disk is built.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BuildOptions {
    /// Size of the disk as the guest sees it; by default what the content needs and room to write.
    /// The image is sparse: free space takes none.
    pub size: Option<ByteSize>,
    /// Where finished disks are kept, in `disks/`.
    pub cache_dir: PathBuf,
    /// Where trees are made; must allow device nodes and programs to run when root builds a suite.
    pub scratch_dir: PathBuf,
    /// Address of a Debian mirror, in place of the default one.
    pub mirror: Option<String>,
    /// Build again what is cached, to take in a suite's updates.
    pub refresh: bool,
}

/// A root disk in the cache.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BuiltDisk {
    /// The ext4 image.
    pub path: PathBuf,
    /// Its size as the guest sees it.
    pub logical_bytes: u64,
    /// Digest of all that the image was made from: what it is cached by. Not a digest of the image.
    pub recipe_digest: Digest,
    /// It was there already.
    pub cached: bool,
}

impl BuildOptions {
    /// Default size, default mirror, cached disks used.
    pub fn new(cache_dir: impl Into<PathBuf>, scratch_dir: impl Into<PathBuf>) -> Self {
        let (cache_dir, scratch_dir) = (cache_dir.into(), scratch_dir.into());
        Self { size: None, cache_dir, scratch_dir, mirror: None, refresh: false }
    }
}

/// Builds the root disk of `source`, or finds it in the cache.
///
/// # Errors
/// Every variant says what to do; whatever it is, nothing half-built is left.
pub fn build(
    source: &RootDiskSource,
    options: &BuildOptions,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<BuiltDisk> {
    if let Some(size) = options.size {
        ext4::check_size(size.bytes())?;
    }
    let recipe = recipe(source, options, progress)?;
    let recipe_digest = Digest::from_bytes(*blake3::hash(recipe.as_bytes()).as_bytes());
    let disks = options.cache_dir.join("disks");
    let path = disks.join(format!("{}.ext4", recipe_digest.hex()));
    if let (false, Ok(metadata)) = (options.refresh, path.metadata()) {
        return Ok(BuiltDisk { path, logical_bytes: metadata.len(), recipe_digest, cached: true });
    }

    let scratch = ScratchDir::new(&options.scratch_dir)?;
    // The image is made where it will stay, so that the last step is a rename.
    let nursery = ScratchDir::new(&disks)?;
    let root = scratch.path().join("root");
    let (tree, corrections) = match source {
        RootDiskSource::Directory(path) => (path, None),
        RootDiskSource::Archive(path) => {
            let corrections = archive::unpack(path, &root, &mut scaled(progress, TREE_PART))?;
            (&root, Some(corrections))
        }
        RootDiskSource::Debian { suite, include } => {
            let bootstrap = debian::Bootstrap { suite, include, mirror: options.mirror.as_deref() };
            let corrections = bootstrap.run(&root, &mut scaled(progress, TREE_PART))?;
            (&root, Some(corrections))
        }
    };
    progress(Progress { step: "measuring the tree", fraction: Some(TREE_PART) });
    let (summary, of_tree) = tree::inspect(tree, tree::Depth::Names)?;
    let corrections = corrections.unwrap_or(of_tree);
    let logical_bytes = disk_size(&summary, options.size)?;
    require_space(&disks, summary.bytes)?;
    progress(Progress { step: "writing the disk image", fraction: Some(TREE_PART + 0.02) });
    let image = nursery.path().join("disk.ext4");
    ext4::make(tree, &image, logical_bytes, &summary, &recipe_digest)?;
    correction::apply(&corrections, &image, scratch.path())?;
    ext4::sync(&image)?;
    fs::rename(&image, &path).map_err(ImageError::io("move into place as", &path))?;
    progress(Progress { step: "done", fraction: Some(1.0) });
    Ok(BuiltDisk { path, logical_bytes, recipe_digest, cached: false })
}

/// Everything that decides what the image will be, as text.
fn recipe(source: &RootDiskSource, options: &BuildOptions, progress: &mut dyn FnMut(Progress<'_>)) -> Result<String> {
    let size = options.size.map_or_else(|| "auto".to_owned(), |size| size.bytes().to_string());
    let content = match source {
        RootDiskSource::Debian { suite, include } => {
            let bootstrap = debian::Bootstrap { suite, include, mirror: options.mirror.as_deref() };
            bootstrap.recipe()?
        }
        RootDiskSource::Archive(path) => {
            progress(Progress::step("reading the archive"));
            format!("archive {}", file_digest(path)?)
        }
        RootDiskSource::Directory(path) => {
            progress(Progress::step("reading the directory"));
            let (summary, _) = tree::inspect(path, tree::Depth::Contents)?;
            let digest = summary.digest.expect("contents were asked for");
            format!("directory {digest}")
        }
    };
    Ok(format!("recipe {RECIPE_VERSION}\nsize {size}\n{}\n{content}\n", ext4::recipe()?))
}

fn disk_size(summary: &tree::Summary, asked: Option<ByteSize>) -> Result<u64> {
    let needed = summary.bytes + summary.bytes / 20 + (16 << 20);
    match asked {
        Some(size) if size.bytes() < needed => Err(ImageError::TooSmall { size, needed: ByteSize(needed) }),
        Some(size) => Ok(size.bytes()),
        None => Ok((summary.bytes + summary.bytes * 3 / 10 + SPARE).next_multiple_of(SIZE_STEP)),
    }
}

fn file_digest(path: &Path) -> Result<Digest> {
    let mut hasher = blake3::Hasher::new();
    fs::File::open(path).and_then(|file| hasher.update_reader(file).map(drop)).map_err(ImageError::io("read", path))?;
    Ok(Digest::from_bytes(*hasher.finalize().as_bytes()))
}

/// Progress of a part of the work, told as progress of the whole.
fn scaled(progress: &mut dyn FnMut(Progress<'_>), part: f64) -> impl FnMut(Progress<'_>) {
    move |of_part| progress(Progress { fraction: of_part.fraction.map(|fraction| fraction * part), ..of_part })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_leave_room_and_are_never_too_small() {
        let summary = tree::Summary { bytes: 280 << 20, entries: 9000, digest: None };
        assert_eq!(disk_size(&summary, None).expect("auto"), 896 << 20);
        assert_eq!(disk_size(&summary, Some(ByteSize::gib(2))).expect("asked"), 2 << 30);
        let error = disk_size(&summary, Some(ByteSize::mib(256))).expect_err("too small").to_string();
        assert!(error.contains("256 MiB") && error.contains("310 MiB"), "{error}");
    }
}
