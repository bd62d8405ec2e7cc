//! What a machine boots from: a kernel, an initramfs with the agent, and a small Debian root disk.
//! All three come from `forkd-image`, are cached, and are never written by a machine.

use std::path::{Path, PathBuf};

use forkd_image::{BuildOptions, KernelChoice, RootDiskSource, build_initramfs, kernel};
use forkd_types::Digest;

use crate::boot::{BOOTSTRAP, BOOTSTRAP_PATH};
use crate::error::MachineError;
use crate::options::{AGENT, Resolved};
use crate::progress::{Progress, Report, step};
use crate::root_files::{self, RootFile};

/// The machine's Debian: a shell, and what sets up networks. Everything else is forkd's own static programs.
const ROOT_RECIPE: &str = "debian:bookworm?include=iproute2,nftables,e2fsprogs";

/// Modules besides those that every forkd guest loads. All of them are loaded before the root disk
/// is mounted, so the machine needs neither a module directory nor `modprobe`.
const MODULES: [&str; 17] = [
    "virtio_pci",
    "virtio_net",
    "9p",
    "9pnet_virtio",
    "pvpanic_pci",
    "loop",
    // Networks of sandboxes.
    "tun",
    "veth",
    "nf_tables",
    "nf_conntrack",
    "nf_conntrack_netlink",
    "nft_ct",
    "nft_chain_nat",
    "nft_masq",
    "nft_limit",
    "nft_log",
    "nf_log_syslog",
];

/// What a machine boots from.
pub(crate) struct Assets {
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    pub(crate) root: PathBuf,
}

/// Makes or finds all of it. Minutes and a network the first time, milliseconds after that.
pub(crate) fn prepare(options: &Resolved, cache: &Path, report: Report<'_>) -> Result<Assets, MachineError> {
    let directory = cache.join("machine");
    std::fs::create_dir_all(&directory).map_err(MachineError::file("create", &directory))?;
    step(report, "preparing the machine's kernel");
    let choice: KernelChoice = options.kernel.parse().map_err(failed("kernel"))?;
    let kernel = kernel::install(&choice, cache, &mut relay(report)).map_err(failed("kernel"))?;
    let initramfs = prepare_initramfs(options, &kernel, &directory, report)?;
    let root = prepare_root(cache, &directory, report)?;
    Ok(Assets { kernel: kernel.vmlinux, initramfs, root })
}

fn prepare_initramfs(
    options: &Resolved,
    kernel: &forkd_image::Kernel,
    directory: &Path,
    report: Report<'_>,
) -> Result<PathBuf, MachineError> {
    let agent = options.programs.join(AGENT);
    step(report, "preparing the machine's initramfs");
    let kvm = if options.hardware { host_kvm_module() } else { "kvm_amd" };
    let modules: Vec<&str> = MODULES.into_iter().chain([kvm]).collect();
    let path = directory.join(format!("initramfs-{}-{kvm}.img", kernel.release));
    build_initramfs(&agent, kernel, &modules, &path).map_err(failed("initramfs"))?;
    Ok(path)
}

/// Nested hardware KVM shows the machine the host's own kind of processor.
fn host_kvm_module() -> &'static str {
    if Path::new("/sys/module/kvm_intel").exists() { "kvm_intel" } else { "kvm_amd" }
}

/// The root disk: Debian, and on it the one file by which forkd's part of the boot begins.
fn prepare_root(cache: &Path, directory: &Path, report: Report<'_>) -> Result<PathBuf, MachineError> {
    step(report, "preparing the machine's root disk");
    let source = RootDiskSource::parse(ROOT_RECIPE).map_err(failed("root disk"))?;
    let options = BuildOptions::new(cache, cache.join("scratch"));
    let debian = forkd_image::build(&source, &options, &mut relay(report)).map_err(failed("root disk"))?;
    let path = directory.join(format!("root-{}.img", root_name(&debian.recipe_digest)));
    if !path.exists() {
        let bootstrap = RootFile { path: BOOTSTRAP_PATH, contents: BOOTSTRAP, mode: 0o755 };
        root_files::copy_with(&debian.path, &path, &[bootstrap])?;
    }
    Ok(path)
}

/// Changes with the Debian recipe and with the file that is added.
fn root_name(recipe: &Digest) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(recipe.as_bytes()).update(BOOTSTRAP_PATH.as_bytes()).update(BOOTSTRAP.as_bytes());
    hasher.finalize().to_hex()[..16].to_owned()
}

/// Passes on the news of `forkd-image` in this crate's terms.
fn relay<'a>(report: Report<'a>) -> impl FnMut(forkd_image::Progress<'_>) + 'a {
    let mut last = String::new();
    move |news| {
        if news.step != last {
            news.step.clone_into(&mut last);
            report(Progress::Detail(last.clone()));
        }
        if let Some(fraction) = news.fraction {
            report(Progress::Fraction(fraction as f32));
        }
    }
}

fn failed<E: std::error::Error + Send + Sync + 'static>(what: &'static str) -> impl FnOnce(E) -> MachineError {
    move |source| MachineError::Image { what, source: Box::new(source) }
}
