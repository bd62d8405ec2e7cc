//! A kernel as a distribution installs it: an image in `boot`, its modules in `lib/modules`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::Host;

/// The package that leads to the newest kernel for clouds.
const PACKAGE: &str = "linux-image-6.12-cloud-amd64";

/// The bzImage of an installed kernel.
#[derive(Debug, Clone)]
pub struct InstalledKernel {
    /// `…/boot/vmlinuz-RELEASE`.
    pub image: PathBuf,
    /// `uname -r` of it.
    pub release: String,
}

impl Host {
    /// Debian's kernel for clouds, installed below this host's data directory on first use.
    pub fn installed_kernel(&self) -> Result<InstalledKernel> {
        let root = self.data().join("installed-kernel");
        if let Ok(kernel) = find(&root) {
            return Ok(kernel);
        }
        let unfinished = self.data().join(format!("installed-kernel.{}", std::process::id()));
        let output = Command::new("mmdebstrap")
            .args(["--variant=extract", "--architectures=amd64", "--skip=output/dev", "--include", PACKAGE, "bookworm"])
            .arg(&unfinished)
            .output()
            .context("mmdebstrap runs")?;
        ensure!(output.status.success(), "mmdebstrap: {}", String::from_utf8_lossy(&output.stderr));
        std::fs::rename(&unfinished, &root).context("the kernel moves into place")?;
        find(&root)
    }
}

fn find(root: &Path) -> Result<InstalledKernel> {
    for entry in root.join("boot").read_dir()? {
        let image = entry?.path();
        let name = image.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(release) = name.strip_prefix("vmlinuz-") {
            return Ok(InstalledKernel { image, release: release.to_owned() });
        }
    }
    anyhow::bail!("{} holds no boot/vmlinuz-…", root.display())
}
