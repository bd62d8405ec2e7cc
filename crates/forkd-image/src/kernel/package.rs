//! Getting a kernel package from the distribution, and what is in it.

use std::path::{Path, PathBuf};

use crate::progress::Progress;
use crate::tool::Tool;
use crate::{ImageError, Result};

/// The Debian suite that has the packages known by name.
const SUITE: &str = "bookworm";

/// A kernel package on this host's disk.
pub(super) enum Fetched {
    /// A `.deb` file.
    Deb(PathBuf),
    /// A directory in which it is already unpacked.
    Unpacked(PathBuf),
}

/// Which packages hold a kernel that is known by a name of ours.
#[derive(Clone, Copy)]
pub(super) struct Wanted<'a> {
    /// A package that depends on the newest real one, or is a real one.
    pub(super) package: &'a str,
    /// What the real package's name begins with; empty when any will do.
    pub(super) prefix: &'a str,
}

/// Gets the package into `dir`.
///
/// First by the host's own apt, which works unprivileged and honours its mirrors and proxies. Where
/// that has no such package (another release, another distribution) mmdebstrap unpacks it from
/// Debian, without touching the host's package lists.
pub(super) fn fetch(wanted: Wanted<'_>, dir: &Path, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Fetched> {
    progress(Progress::step("looking for the kernel package"));
    let by_apt = match newest(wanted) {
        Ok(package) => download(&package, dir, progress),
        Err(error) => Err(error),
    };
    let by_apt = match by_apt {
        Ok(deb) => return Ok(Fetched::Deb(deb)),
        Err(error) => error,
    };
    let by_mmdebstrap = match unpack_from_suite(wanted, dir, progress) {
        Ok(root) => return Ok(Fetched::Unpacked(root)),
        // Its wording is the better one when nothing can be reached at all.
        Err(error @ (ImageError::NoNetwork { .. } | ImageError::NoSpace { .. })) => return Err(error),
        Err(error) => error,
    };
    Err(ImageError::KernelUnavailable {
        package: wanted.package.to_owned(),
        reason: format!("apt: {by_apt}; mmdebstrap: {by_mmdebstrap}"),
    })
}

/// The real package that `wanted` stands for.
fn newest(wanted: Wanted<'_>) -> Result<String> {
    let unavailable = |reason: String| ImageError::KernelUnavailable { package: wanted.package.to_owned(), reason };
    let listing = Tool::new("apt-cache", "apt").args(["depends", "--important", wanted.package]).output()?;
    match real_package(wanted, &listing) {
        Some(package) => Ok(package),
        None => Err(unavailable(format!("this host's package lists have no {}…", wanted.prefix))),
    }
}

/// Reads `apt-cache depends`: the kernel image it depends on, or itself when it is one.
fn real_package(wanted: Wanted<'_>, listing: &str) -> Option<String> {
    let depended = listing.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    let mut images = depended.filter(|name| name.starts_with("linux-image-"));
    match images.next() {
        Some(name) => name.starts_with(wanted.prefix).then(|| name.to_owned()),
        None => {
            let is_listed = listing.lines().next() == Some(wanted.package);
            (is_listed && wanted.package.starts_with(wanted.prefix)).then(|| wanted.package.to_owned())
        }
    }
}

fn download(package: &str, dir: &Path, progress: &mut dyn FnMut(Progress<'_>)) -> Result<PathBuf> {
    progress(Progress::step(&format!("downloading {package}")));
    let ended = Tool::new("apt-get", "apt").args(["download", package]).current_dir(dir).run_lines(|_| {})?;
    if !ended.status.success() {
        return Err(crate::disk::debian::explain(&ended, SUITE, dir, &format!("downloading {package}"), None));
    }
    let is_deb = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "deb");
    let mut entries = dir.read_dir().map_err(ImageError::io("list", dir))?.filter_map(|entry| Some(entry.ok()?.path()));
    entries.find(is_deb).ok_or_else(|| ImageError::KernelUnavailable {
        package: package.to_owned(),
        reason: "apt-get download left no .deb file".to_owned(),
    })
}

fn unpack_from_suite(wanted: Wanted<'_>, dir: &Path, progress: &mut dyn FnMut(Progress<'_>)) -> Result<PathBuf> {
    progress(Progress::step(&format!("fetching {} from Debian {SUITE}", wanted.package)));
    let root = dir.join("suite");
    // An ordinary user gets an archive, for a directory would belong to users of the namespace.
    let (mode, out) = match rustix::process::geteuid().is_root() {
        true => ("--mode=root", root.clone()),
        false => ("--mode=unshare", dir.join("suite.tar")),
    };
    let ended = Tool::new("mmdebstrap", "mmdebstrap")
        .args([mode, "--variant=extract", "--architectures=amd64", "--skip=output/dev"])
        .arg(format!("--include={}", wanted.package))
        .arg(SUITE)
        .arg(&out)
        .run_lines(|_| {})?;
    if !ended.status.success() {
        let action = format!("fetching {}", wanted.package);
        return Err(crate::disk::debian::explain(&ended, SUITE, dir, &action, None));
    }
    if out != root {
        crate::disk::archive::unpack(&out, &root, progress)?;
    }
    Ok(root)
}

/// Unpacks a `.deb` file into `dir`.
pub(super) fn unpack(deb: &Path, dir: &Path, progress: &mut dyn FnMut(Progress<'_>)) -> Result<()> {
    progress(Progress::step("unpacking the kernel package"));
    let ended = Tool::new("dpkg-deb", "dpkg").arg("--extract").arg(deb).arg(dir).run_lines(|_| {})?;
    if ended.status.success() {
        return Ok(());
    }
    if ended.tail.iter().any(|line| line.contains("No space left on device")) {
        return Err(ImageError::no_space(dir, None));
    }
    Err(ImageError::malformed(deb, "a kernel package", ended.tail.join("; ")))
}

/// Finds the kernel image and the module directory in an unpacked package.
pub(super) fn contents(root: &Path, package: &Path) -> Result<(PathBuf, Option<PathBuf>)> {
    let malformed = |reason: &str| ImageError::malformed(package, "a kernel package", reason);
    let mut images: Vec<PathBuf> = match root.join("boot").read_dir() {
        Ok(entries) => entries.filter_map(|entry| Some(entry.ok()?.path())).collect(),
        Err(_) => Vec::new(),
    };
    images.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinu")));
    images.sort();
    let image = match images.as_slice() {
        [image] => image.clone(),
        [] => return Err(malformed("it holds no boot/vmlinuz-…; a meta package or a package of modules does not")),
        _ => return Err(malformed("it holds more than one kernel")),
    };
    let release = image.file_name().unwrap_or_default().to_string_lossy();
    let release = release.split_once('-').map_or("", |(_, release)| release);
    let modules = ["lib/modules", "usr/lib/modules"].map(|parent| root.join(parent).join(release));
    Ok((image, modules.into_iter().find(|dir| dir.is_dir())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLOUD: Wanted<'_> = Wanted { package: "linux-image-6.12-cloud-amd64", prefix: "linux-image-6.12." };

    #[test]
    fn a_meta_package_leads_to_the_kernel_it_stands_for() {
        let listing = "linux-image-6.12-cloud-amd64\n  Depends: linux-image-6.12.117+deb12-cloud-amd64\n";
        assert_eq!(real_package(CLOUD, listing).as_deref(), Some("linux-image-6.12.117+deb12-cloud-amd64"));
        let newer = "linux-image-6.12-cloud-amd64\n  Depends: linux-image-6.19.1-cloud-amd64\n";
        assert_eq!(real_package(CLOUD, newer), None);
        assert_eq!(real_package(CLOUD, ""), None);
    }

    #[test]
    fn a_real_package_is_itself() {
        let wanted = Wanted { package: "linux-image-6.1.0-56-amd64", prefix: "" };
        let listing = "linux-image-6.1.0-56-amd64\n  Depends: kmod\n  Depends: linux-base\n";
        assert_eq!(real_package(wanted, listing).as_deref(), Some("linux-image-6.1.0-56-amd64"));
    }
}
