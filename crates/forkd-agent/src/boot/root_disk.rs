//! From the initramfs to the root disk.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::mount::MountFlags;

use super::{BootError, mounts};
use crate::console;

const NEW_ROOT: &str = "/newroot";
const PATIENCE: Duration = Duration::from_secs(10);

/// Waits for a device node; drivers find their devices in the background.
pub(super) fn wait_for(device: &Path) -> bool {
    let deadline = Instant::now() + PATIENCE;
    let mut pause = Duration::from_millis(1);
    while !device.exists() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
    true
}

/// Makes the file system on `device` the root directory of this process and all that follow, and
/// frees the files of the initramfs.
pub(super) fn switch_to(device: &Path, kind: &str) -> Result<(), BootError> {
    if !wait_for(device) {
        return Err(BootError::NoRootDisk {
            device: device.into(),
            seconds: PATIENCE.as_secs(),
            present: block_devices(),
        });
    }
    let mounted = fs::create_dir_all(NEW_ROOT).and_then(|()| {
        // Reading must not write: access times would make every copy's disk differ.
        Ok(rustix::mount::mount(device, NEW_ROOT, kind, MountFlags::NOATIME, None)?)
    });
    mounted.map_err(|source| BootError::Mount {
        what: format!("{} ({kind})", device.display()),
        target: NEW_ROOT.into(),
        source,
    })?;
    for name in mounts::MOVED {
        let target = format!("{NEW_ROOT}/{name}");
        step("moving the kernel's file systems", || {
            fs::create_dir_all(&target)?;
            Ok(rustix::mount::mount_move(format!("/{name}"), &target)?)
        })?;
    }
    free_initramfs();
    step("entering it", || Ok(rustix::process::chdir(NEW_ROOT)?))?;
    step("moving it to /", || Ok(rustix::mount::mount_move(".", "/")?))?;
    step("chroot", || Ok(rustix::process::chroot(".")?))?;
    step("chdir", || Ok(rustix::process::chdir("/")?))
}

fn step(step: &'static str, action: impl FnOnce() -> io::Result<()>) -> Result<(), BootError> {
    action().map_err(|source| BootError::SwitchRoot { step, source })
}

/// Gives the memory of the initramfs back, except for this program itself, which still runs from it.
fn free_initramfs() {
    let removed = fs::remove_dir_all("/lib/forkd").and_then(|()| fs::remove_file("/init"));
    match removed {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => console::warn(&format!("the initramfs keeps its memory: {error}")),
    }
}

fn block_devices() -> String {
    let names: Vec<String> = fs::read_dir("/sys/class/block")
        .map(|entries| {
            entries.filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned())).collect()
        })
        .unwrap_or_default();
    if names.is_empty() { "none".to_owned() } else { names.join(" ") }
}
