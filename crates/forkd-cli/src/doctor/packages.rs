//! The distribution's tools that forkd runs, and the packages they come in.

use crate::programs;

/// A tool and its package.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Package {
    /// The program.
    pub(crate) program: &'static str,
    /// Debian's and Ubuntu's package.
    pub(crate) package: &'static str,
    /// What it is for.
    pub(crate) purpose: &'static str,
}

/// What builds root disks and guest kernels.
pub(super) const IMAGE_TOOLS: [Package; 4] = [
    Package { program: "mmdebstrap", package: "mmdebstrap", purpose: "builds Debian root disks" },
    Package { program: "mke2fs", package: "e2fsprogs", purpose: "makes the root disk's file system" },
    Package { program: "dpkg-deb", package: "dpkg", purpose: "unpacks guest kernels" },
    Package { program: "xz", package: "xz-utils", purpose: "unpacks kernel modules" },
];

/// What runs `forkd machine`.
pub(super) const QEMU: Package =
    Package { program: "qemu-system-x86_64", package: "qemu-system-x86", purpose: "runs forkd machine" };

/// The tools that are not there; QEMU counts only where the machine is needed.
pub(crate) fn missing(needs_machine: bool) -> Vec<Package> {
    let qemu = needs_machine.then_some(QEMU);
    IMAGE_TOOLS.into_iter().chain(qemu).filter(|package| programs::in_path(package.program).is_none()).collect()
}

impl Package {
    /// What to type to get it.
    pub(super) fn install_command(&self) -> String {
        format!("sudo apt-get install {}", self.package)
    }
}
