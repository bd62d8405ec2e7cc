//! What can go wrong when images are made.

use std::io;
use std::path::{Path, PathBuf};

use forkd_types::ByteSize;

/// A result of this crate.
pub type Result<T, E = ImageError> = std::result::Result<T, E>;

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A file system call failed; the cause is the source.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was attempted, as a verb phrase.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file system is full.
    #[error(
        "no space left on the file system of {}: {}{} free; free some space or choose another directory",
        path.display(),
        needed.map_or_else(String::new, |bytes| format!("about {bytes} needed, ")),
        free
    )]
    NoSpace {
        /// The directory being written.
        path: PathBuf,
        /// How much the whole step needs, as far as it is known.
        needed: Option<ByteSize>,
        /// How much is free.
        free: ByteSize,
    },
    /// The text names no source.
    #[error("{text:?} is not an image source: {reason}; write debian:SUITE?include=PKG,PKG or dir:PATH or tar:PATH")]
    Source {
        /// What was written.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The text names no kernel.
    #[error(
        "{text:?} is not a kernel: {reason}; write debian-6.12-cloud, debian-6.1-generic, \
         apt:PACKAGE, or the path of a .deb, bzImage or vmlinux"
    )]
    KernelChoice {
        /// What was written.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A program that does part of the work is not installed.
    #[error("the program {tool} is not installed; install it, for example with: apt-get install {package}")]
    MissingTool {
        /// The program.
        tool: &'static str,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// A program that does part of the work failed.
    #[error("{tool} failed ({status}): {message}")]
    Tool {
        /// The program.
        tool: String,
        /// How it ended.
        status: String,
        /// The end of what it said.
        message: String,
    },
    /// The distribution has no package of this name.
    #[error("there is no package {package} in {suite}; check its name, or add the suite that has it")]
    MissingPackage {
        /// The name asked for.
        package: String,
        /// The suite it was looked for in.
        suite: String,
    },
    /// The distribution has no such suite.
    #[error("there is no Debian suite {suite}; bookworm and trixie are examples")]
    UnknownSuite {
        /// The name asked for.
        suite: String,
    },
    /// The package mirror cannot be reached.
    #[error("cannot reach the package mirror while {action}: {detail}; check the network, or the proxy settings")]
    NoNetwork {
        /// What was attempted.
        action: String,
        /// What the package tool said.
        detail: String,
    },
    /// An archive or directory holds something a root disk is not made from.
    #[error("{}: member {member:?} {reason}", source_path.display())]
    Member {
        /// The archive or directory.
        source_path: PathBuf,
        /// The member.
        member: String,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// An archive cannot be read as one.
    #[error("{} is not a readable archive: {reason}", path.display())]
    Archive {
        /// The archive.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The size asked for does not hold the content.
    #[error("a disk of {size} is too small: the content needs at least {needed}; ask for more or leave the size out")]
    TooSmall {
        /// The size asked for.
        size: ByteSize,
        /// What is needed.
        needed: ByteSize,
    },
    /// The size asked for is no whole number of blocks, or beyond what the format holds.
    #[error("a disk of {size} bytes is not possible: {reason}")]
    Size {
        /// The size asked for, bytes.
        size: u64,
        /// What would be right.
        reason: &'static str,
    },
    /// A file is not the kernel, package or module it should be.
    #[error("{} cannot be used as {what}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What it should be.
        what: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// No way of getting a kernel package worked.
    #[error(
        "cannot get the kernel package {package}: {reason}; fetch it on a machine that can \
         (apt-get download {package}) and give the .deb file as the kernel"
    )]
    KernelUnavailable {
        /// The package.
        package: String,
        /// Why each way failed.
        reason: String,
    },
    /// The kernel has no modules to take from.
    #[error("module {module} is asked for, but the kernel {release} {reason}")]
    MissingModule {
        /// The module.
        module: String,
        /// Release of the kernel.
        release: String,
        /// Why it is not there.
        reason: String,
    },
    /// Something this user may not do is needed.
    #[error("{action} needs root: {reason}")]
    NeedsRoot {
        /// What was attempted.
        action: &'static str,
        /// Why.
        reason: String,
    },
}

impl ImageError {
    /// A stable machine-readable code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Io { .. } => "image_io",
            Self::NoSpace { .. } => "no_space",
            Self::Source { .. } => "bad_image_source",
            Self::KernelChoice { .. } => "bad_kernel_choice",
            Self::MissingTool { .. } => "missing_tool",
            Self::Tool { .. } => "tool_failed",
            Self::MissingPackage { .. } => "missing_package",
            Self::UnknownSuite { .. } => "unknown_suite",
            Self::NoNetwork { .. } => "no_network",
            Self::Member { .. } => "bad_member",
            Self::Archive { .. } => "bad_archive",
            Self::TooSmall { .. } => "disk_too_small",
            Self::Size { .. } => "bad_disk_size",
            Self::Malformed { .. } => "malformed_file",
            Self::KernelUnavailable { .. } => "kernel_unavailable",
            Self::MissingModule { .. } => "missing_module",
            Self::NeedsRoot { .. } => "needs_root",
        }
    }

    /// For `map_err`: the failure of `action` on `path`. A full file system becomes
    /// [`ImageError::NoSpace`].
    pub(crate) fn io<E: Into<io::Error>>(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(E) -> Self {
        let path = path.as_ref().to_owned();
        move |source| {
            let source = source.into();
            if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
                return Self::no_space(&path, None);
            }
            Self::Io { action, path, source }
        }
    }

    /// That the file system of `path` is full.
    pub(crate) fn no_space(path: &Path, needed: Option<u64>) -> Self {
        Self::NoSpace {
            path: path.to_owned(),
            needed: needed.map(ByteSize),
            free: ByteSize(free_bytes(path).unwrap_or(0)),
        }
    }

    pub(crate) fn malformed(path: &Path, what: &'static str, reason: impl Into<String>) -> Self {
        Self::Malformed { path: path.to_owned(), what, reason: reason.into() }
    }
}

/// Bytes free to this process on the file system that holds `path` or its nearest existing parent.
pub(crate) fn free_bytes(path: &Path) -> Option<u64> {
    let stat = path.ancestors().find_map(|at| rustix::fs::statvfs(at).ok())?;
    Some(stat.f_bavail * stat.f_frsize)
}

/// Fails with [`ImageError::NoSpace`] when fewer than `needed` bytes are free at `path`.
pub(crate) fn require_space(path: &Path, needed: u64) -> Result<()> {
    match free_bytes(path) {
        Some(free) if free < needed => Err(ImageError::no_space(path, Some(needed))),
        _ => Ok(()),
    }
}
