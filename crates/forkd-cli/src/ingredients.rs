//! What a machine is booted from, prepared on this host: kernel, initramfs, root disk.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use forkd_image::{BuildOptions, ImageError, Kernel, KernelChoice, Progress as News, RootDiskSource};
use forkd_types::ByteSize;

use crate::bake::Parts;
use crate::blob::Blob;
use crate::data_dir::DataDir;
use crate::failure::{UsageError, advised};
use crate::programs;
use crate::progress::{Progress, Step};

/// The kernel that guests get unless another is asked for.
pub(crate) const DEFAULT_KERNEL: &str = "debian-6.12-cloud";

/// The agent program that becomes `/init`.
const AGENT: &str = "forkd-agent";

/// Parts into which a fraction is divided for a bar.
const BAR_PARTS: u64 = 1000;

/// [`DEFAULT_KERNEL`] as a choice.
pub(crate) fn default_kernel() -> KernelChoice {
    DEFAULT_KERNEL.parse().expect("the constant names a kernel")
}

/// A root disk to be built, checked before anything is done.
#[derive(Debug)]
pub(crate) struct Plan {
    source: RootDiskSource,
    size: Option<ByteSize>,
    mirror: Option<String>,
    refresh: bool,
}

impl Plan {
    /// The disk that `source` names, with further packages if it is a Debian suite.
    pub(crate) fn new(source: &str, extra: &[String], size: Option<ByteSize>) -> anyhow::Result<Self> {
        let text = with_packages(source, extra)?;
        let source = RootDiskSource::parse(&text).map_err(|error| {
            advised(UsageError(error.to_string()), "forkd from-image 'debian:bookworm?include=python3' --tag NAME")
        })?;
        Ok(Self { source, size, mirror: None, refresh: false })
    }

    /// The same disk, from another Debian mirror, and built again although it is cached.
    pub(crate) fn with_mirror(self, mirror: Option<String>, refresh: bool) -> Self {
        Self { mirror, refresh, ..self }
    }

    /// Prepares everything: fetches, unpacks and builds what is not cached.
    pub(crate) async fn make(self, kernel: KernelChoice, data: &DataDir, progress: &Progress) -> anyhow::Result<Parts> {
        let (kernel, initramfs) = kernel_and_initramfs(kernel, data, progress).await?;
        let disk = self.build(data, progress).await?;
        let disk = Blob::of(disk, "root disk", &data.digests(), progress).await?;
        Ok(Parts { kernel, initramfs, disk, volumes: Vec::new() })
    }

    async fn build(self, data: &DataDir, progress: &Progress) -> anyhow::Result<PathBuf> {
        let options = BuildOptions {
            size: self.size,
            mirror: self.mirror,
            refresh: self.refresh,
            ..BuildOptions::new(data.cache(), data.scratch())
        };
        let (source, title) = (self.source, "Building the root disk");
        let work = move |news: &mut dyn FnMut(News<'_>)| forkd_image::build(&source, &options, news);
        let (built, step) = reported(title, progress, work).await?;
        step.done(format_args!(
            "{} root disk, {}",
            if built.cached { "Reused the" } else { "Built the" },
            ByteSize(built.logical_bytes)
        ));
        Ok(built.path)
    }
}

/// Fetches and unpacks a kernel unless it is there; `upgrade` looks for a newer one all the same.
pub(crate) async fn kernel(
    choice: KernelChoice,
    upgrade: bool,
    data: &DataDir,
    progress: &Progress,
) -> anyhow::Result<Kernel> {
    let cache = data.cache();
    let title = format!("Installing the guest kernel {choice}");
    if !upgrade && let Some(kernel) = forkd_image::kernel::cached(&choice, &cache) {
        return Ok(kernel);
    }
    let work = move |news: &mut dyn FnMut(News<'_>)| match upgrade {
        true => forkd_image::kernel::upgrade(&choice, &cache, news),
        false => forkd_image::kernel::install(&choice, &cache, news),
    };
    let (kernel, step) = reported(&title, progress, work).await?;
    step.done(format_args!("Installed the guest kernel {}", kernel.release));
    Ok(kernel)
}

/// A kernel and the initramfs that fits it.
pub(crate) async fn kernel_and_initramfs(
    choice: KernelChoice,
    data: &DataDir,
    progress: &Progress,
) -> anyhow::Result<(Blob, Blob)> {
    let kernel = kernel(choice, false, data, progress).await?;
    let blob = Blob::of(kernel.vmlinux.clone(), "kernel", &data.digests(), progress).await?;
    let agent = programs::companion(AGENT)?;
    let out = data.cache().join("initramfs").join(format!("{}.cpio", kernel.release));
    let step = progress.quick_step("Assembling the initramfs");
    let built = tokio::task::spawn_blocking(move || {
        forkd_image::build_initramfs(&agent, &kernel, &[], &out).map(|digest| (out, digest))
    });
    let (out, digest) = built.await.context("the background task was cancelled")?.map_err(explain)?;
    step.vanish();
    Ok((blob, Blob::known(out, digest)?))
}

/// What [`Plan::make`] for `source` would have to download and build, in words.
pub(crate) fn work_ahead(source: &str, data: &DataDir) -> Vec<String> {
    let mut work = Vec::new();
    if forkd_image::kernel::cached(&default_kernel(), &data.cache()).is_none() {
        work.push(format!("download the guest kernel {DEFAULT_KERNEL} from the distribution"));
    }
    if !has_disks(&data.cache()) {
        work.push(format!("download packages and build a root disk from {source}"));
    }
    work
}

fn has_disks(cache: &Path) -> bool {
    std::fs::read_dir(cache.join("disks")).is_ok_and(|mut entries| entries.next().is_some())
}

/// `source` with `extra` packages added to those it includes.
fn with_packages(source: &str, extra: &[String]) -> anyhow::Result<String> {
    if extra.is_empty() {
        return Ok(source.to_owned());
    }
    if !source.starts_with("debian:") {
        let error = UsageError(format!("--extra adds Debian packages, and {source:?} is no debian: source"));
        return Err(advised(error, "leave --extra out"));
    }
    let packages = extra.join(",");
    Ok(if source.contains("include=") {
        format!("{source},{packages}")
    } else {
        let separator = if source.contains('?') { '&' } else { '?' };
        format!("{source}{separator}include={packages}")
    })
}

/// Runs blocking work of the image crate on a thread and shows what it reports; the step is left to
/// the caller to end.
async fn reported<T: Send + 'static>(
    title: &str,
    progress: &Progress,
    work: impl FnOnce(&mut dyn FnMut(News<'_>)) -> Result<T, ImageError> + Send + 'static,
) -> anyhow::Result<(T, Step)> {
    let step = progress.step(title);
    let task = tokio::task::spawn_blocking(move || {
        let mut divisible = false;
        let outcome = work(&mut |news| show(&step, news, &mut divisible));
        (outcome, step)
    });
    let (outcome, step) = task.await.context("the background task was cancelled")?;
    let value = outcome.map_err(explain).with_context(|| format!("{title} failed"))?;
    Ok((value, step))
}

fn show(step: &Step, news: News<'_>, divisible: &mut bool) {
    step.detail(news.step.to_owned());
    if let Some(fraction) = news.fraction {
        if !*divisible {
            step.set_parts(BAR_PARTS);
            *divisible = true;
        }
        step.set_position((fraction.clamp(0.0, 1.0) * BAR_PARTS as f64) as u64);
    }
}

/// Adds what to type, where something helps.
fn explain(error: ImageError) -> anyhow::Error {
    let next = match &error {
        ImageError::MissingTool { package, .. } => format!("sudo apt-get install {package}"),
        ImageError::NoSpace { path, .. } => format!("df -h {}", path.display()),
        ImageError::MissingPackage { package, .. } => format!("apt-cache search {package}"),
        ImageError::NoNetwork { .. } => "sudo apt-get update   (shows whether the mirror can be reached)".to_owned(),
        ImageError::NeedsRoot { .. } => "the same with sudo".to_owned(),
        _ => return error.into(),
    };
    advised(error, next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extra_packages_join_the_included_ones() {
        let add = |source| with_packages(source, &["a".into(), "b".into()]).expect("a debian source");
        assert_eq!(add("debian:bookworm"), "debian:bookworm?include=a,b");
        assert_eq!(add("debian:bookworm?include=x"), "debian:bookworm?include=x,a,b");
        assert!(with_packages("tar:x.tar", &["a".into()]).is_err());
        assert_eq!(with_packages("tar:x.tar", &[]).expect("nothing to add"), "tar:x.tar");
    }
}
