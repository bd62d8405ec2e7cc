//! The checks themselves, in the order in which they are shown.

use std::fs;
use std::path::{Path, PathBuf};

use forkd_machine::Status;
use forkd_types::ByteSize;

use super::Check;
use super::packages::{IMAGE_TOOLS, Package, QEMU};
use crate::commands::Context;
use crate::data_dir::DataDir;
use crate::ingredients::{self, DEFAULT_KERNEL};
use crate::machine::Verdict;
use crate::{endpoint, machine, programs};

/// Programs that belong to forkd.
const COMPANIONS: [&str; 3] = ["forkd-controller", "forkd-vmm", "forkd-agent"];

/// Free disk space below which a build is likely to fail.
const DISK_NEEDED: ByteSize = ByteSize::gib(5);

/// Free disk space below which nothing works.
const DISK_LEAST: ByteSize = ByteSize::gib(1);

/// Free memory that ten children and their zygote need comfortably.
const MEMORY_NEEDED: ByteSize = ByteSize::gib(2);

/// Runs every check.
pub(super) async fn all(context: &Context) -> Vec<Check> {
    let verdict = machine::probe().await;
    let given = context.daemon.url.is_some();
    let mut checks = vec![platform(), kvm(&verdict), engine(&verdict, given)];
    checks.push(qemu(&verdict, given));
    checks.extend(IMAGE_TOOLS.iter().map(|tool| image_tool(*tool)));
    checks.push(companions());
    checks.push(kernel(&context.data));
    checks.push(disk_space(&context.data));
    checks.push(memory());
    checks.push(cgroup());
    checks.push(huge_pages());
    checks.extend(super::network::checks(verdict.is_usable() && !given));
    checks.push(daemon(context).await);
    checks.push(machine_status(&verdict, context).await);
    checks
}

fn platform() -> Check {
    let uname = rustix::system::uname();
    let text = |field: &std::ffi::CStr| field.to_string_lossy().into_owned();
    let detail = format!("{} {} {}", text(uname.sysname()), text(uname.release()), text(uname.machine()));
    if text(uname.machine()) == "x86_64" {
        Check::pass("platform", detail)
    } else {
        Check::fail("platform", detail, "forkd runs on Linux, x86_64")
    }
}

fn kvm(verdict: &Verdict) -> Check {
    if verdict.is_usable() {
        Check::pass("kvm", verdict.reason())
    } else {
        Check::warn("kvm", verdict.reason(), "nothing needs doing: forkd machine is used instead, at lower speed")
    }
}

fn engine(verdict: &Verdict, given: bool) -> Check {
    let detail = match (given, verdict.is_usable()) {
        (true, _) => "the daemon that FORKD_URL or --daemon-url names",
        (false, true) => "a daemon on this host, because guest code runs at hardware speed",
        (false, false) => "forkd machine, because this host's KVM cannot run Linux guests in useful time",
    };
    Check::pass("guests run in", detail)
}

fn qemu(verdict: &Verdict, given: bool) -> Check {
    match programs::in_path(QEMU.program) {
        Some(path) => Check::pass("qemu", version_of(&path, "--version")),
        None if given || verdict.is_usable() => Check::skip("qemu", "not installed, not needed here"),
        None => Check::fail("qemu", format!("{} not found; it {}", QEMU.program, QEMU.purpose), QEMU.install_command()),
    }
}

fn image_tool(tool: Package) -> Check {
    match programs::in_path(tool.program) {
        Some(path) => Check::pass(tool.program, path.display().to_string()),
        None => Check::warn(tool.program, format!("not found; it {}", tool.purpose), tool.install_command()),
    }
}

/// The first line that `program` prints about itself.
fn version_of(program: &Path, flag: &str) -> String {
    let output = std::process::Command::new(program).arg(flag).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or("").to_owned());
    text.unwrap_or_else(|_| program.display().to_string())
}

fn companions() -> Check {
    let missing: Vec<&str> = COMPANIONS.into_iter().filter(|name| programs::companion(name).is_err()).collect();
    if missing.is_empty() {
        return Check::pass("programs", COMPANIONS.join(", "));
    }
    Check::fail("programs", format!("{} not found beside forkd", missing.join(", ")), "make build")
}

fn kernel(data: &DataDir) -> Check {
    match forkd_image::kernel::cached(&ingredients::default_kernel(), &data.cache()) {
        Some(kernel) => Check::pass("guest kernel", format!("{} ({DEFAULT_KERNEL})", kernel.release)),
        None => Check::warn("guest kernel", "none installed; it is fetched when needed", "forkd kernel install"),
    }
}

fn disk_space(data: &DataDir) -> Check {
    let existing: Option<PathBuf> = data.root().ancestors().find(|path| path.exists()).map(Path::to_owned);
    let Some(stat) = existing.and_then(|path| rustix::fs::statvfs(&path).ok()) else {
        return Check::warn("disk space", "could not be found out", format!("df -h {}", data.root().display()));
    };
    let free = ByteSize(stat.f_bavail * stat.f_frsize);
    let detail = format!("{free} free for {}", data.root().display());
    let hint = "free some space, or point XDG_DATA_HOME at a larger disk";
    match free {
        free if free >= DISK_NEEDED => Check::pass("disk space", detail),
        free if free >= DISK_LEAST => Check::warn("disk space", detail, hint),
        _ => Check::fail("disk space", detail, hint),
    }
}

fn memory() -> Check {
    match meminfo("MemAvailable") {
        Some(free) if free >= MEMORY_NEEDED => Check::pass("memory", format!("{free} available")),
        Some(free) => {
            Check::warn("memory", format!("{free} available"), format!("{MEMORY_NEEDED} or more is comfortable"))
        }
        None => Check::warn("memory", "could not be found out", "cat /proc/meminfo"),
    }
}

/// A field of `/proc/meminfo`.
fn meminfo(field: &str) -> Option<ByteSize> {
    forkd_size(&fs::read_to_string("/proc/meminfo").ok()?, field)
}

fn forkd_size(meminfo: &str, field: &str) -> Option<ByteSize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(ByteSize(kib << 10))
}

fn cgroup() -> Check {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        Check::pass("cgroup v2", "unified hierarchy")
    } else {
        Check::warn(
            "cgroup v2",
            "no unified hierarchy: memory limits are not enforced",
            "boot with systemd.unified_cgroup_hierarchy=1",
        )
    }
}

fn huge_pages() -> Check {
    let read = |name: &str| -> u64 {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}");
        fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    };
    let (total, free) = (read("nr_hugepages"), read("free_hugepages"));
    if total == 0 {
        return Check::skip("huge pages", "none reserved; --hugepages falls back to ordinary pages");
    }
    Check::pass("huge pages", format!("{total} of 2 MiB reserved, {free} free"))
}

async fn daemon(context: &Context) -> Check {
    match endpoint::find(&context.daemon, &context.data).await {
        Ok(Some(endpoint)) => match endpoint.client.probe().await {
            Ok(version) => {
                let place = endpoint.place.describe();
                Check::pass("daemon", format!("version {} at {} ({place})", version.version, endpoint.client.address()))
            }
            Err(error) => Check::fail("daemon", error.to_string(), "forkd doctor"),
        },
        Ok(None) => Check::skip("daemon", "none runs; the first command that needs one starts it"),
        Err(error) => Check::fail("daemon", format!("{error:#}"), "forkd-controller serve   (on the daemon's host)"),
    }
}

async fn machine_status(verdict: &Verdict, context: &Context) -> Check {
    match machine::status(&context.data).await.map(|status| (machine::describe(&status), status)) {
        Ok((Some(text), Status::NotAnswering { .. })) => Check::warn("machine", text, machine::RESTART),
        Ok((Some(text), _)) => Check::pass("machine", text),
        Ok((None, _)) if verdict.is_usable() => Check::skip("machine", "not running, not needed here"),
        Ok((None, _)) => Check::skip("machine", "not running; it is started when needed"),
        Err(error) => Check::warn("machine", format!("{error:#}"), "forkd machine rm   (it is made anew when needed)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_meminfo() {
        let text = "MemTotal:       24000000 kB\nMemAvailable:    1024 kB\nHugePages_Total:       0\n";
        assert_eq!(forkd_size(text, "MemAvailable"), Some(ByteSize(1 << 20)));
        assert_eq!(forkd_size(text, "HugePages_Total"), None);
        assert_eq!(forkd_size(text, "Mem"), None);
    }
}
