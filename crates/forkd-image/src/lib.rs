//! Root disks, guest kernels and initramfs images from what a user has.
//!
//! - [`disk`]: a Debian suite, a directory or an archive becomes an ext4 image, without mounting
//!   anything.
//! - [`kernel`]: a distribution's kernel package or image becomes an uncompressed `vmlinux` and the
//!   modules that belong to it.
//! - [`initramfs`]: the agent and the modules a guest needs before its root disk is there.
//!
//! Everything is cached by the content of its recipe, appears in the cache by one `rename`, and is
//! made in a scratch directory that is removed when making it fails and swept after a crash.

pub mod disk;
mod error;
pub mod initramfs;
pub mod kernel;
mod progress;
mod scratch;
mod tool;

pub use disk::{BuildOptions, BuiltDisk, RootDiskSource, build};
pub use error::{ImageError, Result};
pub use initramfs::build_initramfs;
pub use kernel::{Kernel, KernelChoice};
pub use progress::Progress;
