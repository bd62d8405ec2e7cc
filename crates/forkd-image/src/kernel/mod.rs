//! Guest kernels: an uncompressed `vmlinux` and the modules that belong to it.
//!
//! ```text
//! <cache>/kernels/<content>/vmlinux, kernel.json, lib/modules/<release>/…   immutable
//!                 <choice>.json      which of these a choice by name led to last
//! ```

mod bzimage;
mod compressed;
mod elf;
mod package;

use std::fmt;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::progress::Progress;
use crate::scratch::{ScratchDir, remove_tree};
use crate::{ImageError, Result};
use package::{Fetched, Wanted};

pub(crate) use compressed::{Compression, Streams, decode};
pub(crate) use elf::Elf;

/// The version of `kernel.json`, and of how a `vmlinux` is made.
const CURRENT: u32 = 1;
/// The largest `kernel.json` that is read.
const RECORD_LIMIT: u64 = 1 << 16;
/// The largest kernel image that is read; with debug information one may have a gigabyte.
const IMAGE_LIMIT: u64 = 2 << 30;

/// Which kernel to install.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum KernelChoice {
    /// Debian's 6.12 for clouds: small, and tells a guest of its copying (VMGENID). The default.
    DebianCloud612,
    /// Debian's 6.1 with drivers for everything.
    Debian61Generic,
    /// Another package of the distribution, by name.
    Package(String),
    /// A kernel package file.
    Deb(PathBuf),
    /// A bzImage or `vmlinux`. Its modules are those in a `lib/modules` beside it, as in a package or on an
    /// installed system; where there are none, what a guest needs must be built in.
    Image(PathBuf),
}

/// An installed kernel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Kernel {
    /// The uncompressed ELF kernel.
    pub vmlinux: PathBuf,
    /// Its release, as `uname -r` shows it.
    pub release: String,
    /// `lib/modules/<release>`; none for a kernel that came as an image without them.
    pub modules_dir: Option<PathBuf>,
}

/// `kernel.json`.
#[derive(Serialize, Deserialize)]
struct Record {
    version: u32,
    release: String,
    /// Relative to the directory of the record.
    modules: Option<PathBuf>,
}

/// `<choice>.json`.
#[derive(Serialize, Deserialize)]
struct Alias {
    version: u32,
    directory: String,
}

impl fmt::Display for KernelChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DebianCloud612 => f.write_str("debian-6.12-cloud"),
            Self::Debian61Generic => f.write_str("debian-6.1-generic"),
            Self::Package(name) => write!(f, "apt:{name}"),
            Self::Deb(path) | Self::Image(path) => write!(f, "{}", path.display()),
        }
    }
}

impl FromStr for KernelChoice {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |reason: &str| ImageError::KernelChoice { text: text.to_owned(), reason: reason.to_owned() };
        if let Some(name) = text.strip_prefix("apt:") {
            return match crate::disk::debian::is_package_name(name) {
                true => Ok(Self::Package(name.to_owned())),
                false => Err(wrong("that is not the name of a package")),
            };
        }
        match text {
            "debian-6.12-cloud" => Ok(Self::DebianCloud612),
            "debian-6.1-generic" => Ok(Self::Debian61Generic),
            path if path.ends_with(".deb") => Ok(Self::Deb(path.into())),
            path if Path::new(path).is_file() => Ok(Self::Image(path.into())),
            _ => Err(wrong("there is no such name and no such file")),
        }
    }
}

/// Where a kernel comes from.
enum Origin<'a> {
    Packages(Wanted<'a>),
    Deb(&'a Path),
    Image(&'a Path),
}

impl KernelChoice {
    fn origin(&self) -> Origin<'_> {
        let packages = |package, prefix| Origin::Packages(Wanted { package, prefix });
        match self {
            Self::DebianCloud612 => packages("linux-image-6.12-cloud-amd64", "linux-image-6.12."),
            Self::Debian61Generic => packages("linux-image-amd64", "linux-image-6.1."),
            Self::Package(name) => packages(name, ""),
            Self::Deb(path) => Origin::Deb(path),
            Self::Image(path) => Origin::Image(path),
        }
    }

    /// The record of what a choice by name led to last.
    fn alias_path(&self, kernels: &Path) -> Option<PathBuf> {
        let file = || kernels.join(format!("{}.json", self.to_string().replace(':', "-")));
        matches!(self.origin(), Origin::Packages(_)).then(file)
    }
}

/// Installs a kernel in `cache_dir` unless it is there, and says where it is.
///
/// A choice by name that was installed before is not looked up again; [`upgrade`] does that.
pub fn install(choice: &KernelChoice, cache_dir: &Path, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Kernel> {
    match cached(choice, cache_dir) {
        Some(kernel) => Ok(kernel),
        None => upgrade(choice, cache_dir, progress),
    }
}

/// The kernel of a choice by name if it is installed; nothing is fetched.
pub fn cached(choice: &KernelChoice, cache_dir: &Path) -> Option<Kernel> {
    let kernels = cache_dir.join("kernels");
    let alias: Alias = read_record(&choice.alias_path(&kernels)?)?;
    // One path component, whatever the file says.
    let sound = alias.version == CURRENT && alias.directory.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if sound { load(&kernels.join(alias.directory)) } else { None }
}

/// Installs the newest kernel that a choice leads to.
pub fn upgrade(choice: &KernelChoice, cache_dir: &Path, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Kernel> {
    let kernels = cache_dir.join("kernels");
    let scratch = ScratchDir::new(&kernels)?;
    let (directory, kernel) = match choice.origin() {
        Origin::Image(path) => {
            let (directory, kernel) = from_image(path, &kernels, &scratch, progress)?;
            let modules_dir = modules_beside(path, &kernel.release);
            (directory, Kernel { modules_dir, ..kernel })
        }
        Origin::Deb(path) => from_deb(path, &kernels, &scratch, progress)?,
        Origin::Packages(wanted) => match package::fetch(wanted, scratch.path(), progress)? {
            Fetched::Deb(path) => from_deb(&path, &kernels, &scratch, progress)?,
            Fetched::Unpacked(root) => from_unpacked(&root, &kernels, &scratch, progress)?,
        },
    };
    if let Some(path) = choice.alias_path(&kernels) {
        write_json(&Alias { version: CURRENT, directory }, &path, &scratch)?;
    }
    Ok(kernel)
}

fn from_image(
    path: &Path,
    kernels: &Path,
    scratch: &ScratchDir,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(String, Kernel)> {
    let directory = directory_name(path)?;
    let target = kernels.join(&directory);
    if let Some(kernel) = load(&target) {
        return Ok((directory, kernel));
    }
    let made = scratch.path().join("made");
    fs::create_dir(&made).map_err(ImageError::io("create directory", &made))?;
    finish(path, None, &made, &target, scratch, progress).map(|kernel| (directory, kernel))
}

/// The modules of `release` that lie where they do beside the image at `path`: under the parent of its `boot`,
/// or under its own directory.
fn modules_beside(path: &Path, release: &str) -> Option<PathBuf> {
    let own = std::path::absolute(path).ok()?.parent()?.to_owned();
    let above = own.parent().unwrap_or(&own).to_owned();
    let places = [above.join("lib/modules"), above.join("usr/lib/modules"), own.join("lib/modules")];
    places.into_iter().map(|place| place.join(release)).find(|modules| modules.join("modules.builtin").is_file())
}

fn from_deb(
    deb: &Path,
    kernels: &Path,
    scratch: &ScratchDir,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(String, Kernel)> {
    let directory = directory_name(deb)?;
    let target = kernels.join(&directory);
    if let Some(kernel) = load(&target) {
        return Ok((directory, kernel));
    }
    let unpacked = scratch.path().join("unpacked");
    package::unpack(deb, &unpacked, progress)?;
    let kernel = from_root(&unpacked, deb, &target, scratch, progress)?;
    Ok((directory, kernel))
}

fn from_unpacked(
    root: &Path,
    kernels: &Path,
    scratch: &ScratchDir,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(String, Kernel)> {
    let (image, _) = package::contents(root, root)?;
    let directory = directory_name(&image)?;
    let target = kernels.join(&directory);
    if let Some(kernel) = load(&target) {
        return Ok((directory, kernel));
    }
    let kernel = from_root(root, root, &target, scratch, progress)?;
    Ok((directory, kernel))
}

fn from_root(
    root: &Path,
    package: &Path,
    target: &Path,
    scratch: &ScratchDir,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Kernel> {
    let (image, modules) = package::contents(root, package)?;
    let made = scratch.path().join("made");
    let parent = made.join("lib/modules");
    fs::create_dir_all(&parent).map_err(ImageError::io("create directory", &parent))?;
    let relative = match modules {
        Some(modules) => {
            let release = modules.file_name().expect("a module directory is named for its release");
            let kept = parent.join(release);
            fs::rename(&modules, &kept).map_err(ImageError::io("move into place as", &kept))?;
            Some(Path::new("lib/modules").join(release))
        }
        None => None,
    };
    finish(&image, relative, &made, target, scratch, progress)
}

/// Puts the kernel of `image` into `made`, describes it and moves it to `target`.
fn finish(
    image: &Path,
    modules: Option<PathBuf>,
    made: &Path,
    target: &Path,
    scratch: &ScratchDir,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Kernel> {
    progress(Progress::step("extracting the kernel"));
    let malformed = |reason: String| ImageError::malformed(image, "a kernel", reason);
    let size = image.metadata().map_err(ImageError::io("read", image))?.len();
    if size > IMAGE_LIMIT {
        return Err(malformed(format!("it has {size} bytes, {IMAGE_LIMIT} are the most that is read")));
    }
    let bytes = fs::read(image).map_err(ImageError::io("read", image))?;
    let kernel = bzimage::vmlinux(bytes).map_err(malformed)?;
    let release = bzimage::release(&kernel).ok_or_else(|| malformed("it has no version banner".to_owned()))?;
    write_synced(&made.join("vmlinux"), &kernel)?;
    let record = Record { version: CURRENT, release, modules };
    write_json(&record, &made.join("kernel.json"), scratch)?;

    // The same may have been made by another process meanwhile; what is damaged gives way.
    if let Some(kernel) = load(target) {
        return Ok(kernel);
    }
    remove_tree(target).map_err(ImageError::io("remove", target))?;
    fs::rename(made, target).map_err(ImageError::io("move into place as", target))?;
    load(target).ok_or_else(|| malformed(format!("it did not arrive whole in {}", target.display())))
}

/// A name for what is made from the file at `path`: the beginning of its BLAKE3.
fn directory_name(path: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&CURRENT.to_le_bytes());
    File::open(path).and_then(|file| hasher.update_reader(file).map(drop)).map_err(ImageError::io("read", path))?;
    Ok(hasher.finalize().to_hex()[..32].to_owned())
}

/// The kernel in a directory, if one is there, whole and of the current version.
fn load(directory: &Path) -> Option<Kernel> {
    let record: Record = read_record(&directory.join("kernel.json"))?;
    let vmlinux = directory.join("vmlinux");
    let modules_dir = record.modules.map(|relative| directory.join(relative));
    let whole = vmlinux.is_file() && modules_dir.as_ref().is_none_or(|dir| dir.is_dir());
    (record.version == CURRENT && whole).then_some(Kernel { vmlinux, release: record.release, modules_dir })
}

fn read_record<T: for<'de> Deserialize<'de>>(path: &Path) -> Option<T> {
    let bytes = if path.metadata().ok()?.len() <= RECORD_LIMIT { fs::read(path).ok()? } else { return None };
    serde_json::from_slice(&bytes).ok()
}

fn write_json(value: &impl Serialize, path: &Path, scratch: &ScratchDir) -> Result<()> {
    let text = serde_json::to_vec_pretty(value).expect("a record of texts and numbers is JSON");
    let temporary = scratch.path().join("record.json");
    write_synced(&temporary, &text)?;
    fs::rename(&temporary, path).map_err(ImageError::io("move into place as", path))
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    File::create(path)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .map_err(ImageError::io("write", path))
}
