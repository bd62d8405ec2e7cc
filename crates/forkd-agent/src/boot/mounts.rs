//! The file systems that every Linux program expects.

use std::ffi::CStr;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::MountFlags;

use super::BootError;
use crate::console;
use crate::options::Volume;

/// One file system of the kernel's.
struct Mount {
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: &'static CStr,
}

const NO_PROGRAMS: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC).union(MountFlags::NODEV);

/// Needed before anything else, parents first; they move along into the root disk.
const FIRST: [Mount; 6] = [
    Mount { kind: "proc", target: "/proc", flags: NO_PROGRAMS, data: c"" },
    Mount { kind: "sysfs", target: "/sys", flags: NO_PROGRAMS, data: c"" },
    Mount { kind: "devtmpfs", target: "/dev", flags: MountFlags::NOSUID, data: c"mode=0755" },
    Mount {
        kind: "devpts",
        target: "/dev/pts",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        data: c"gid=5,mode=0620,ptmxmode=0666",
    },
    Mount { kind: "tmpfs", target: "/dev/shm", flags: MountFlags::NOSUID.union(MountFlags::NODEV), data: c"mode=1777" },
    Mount { kind: "tmpfs", target: "/run", flags: MountFlags::NOSUID.union(MountFlags::NODEV), data: c"mode=0755" },
];

/// The top-level mount points among them.
pub(super) const MOVED: [&str; 4] = ["dev", "proc", "sys", "run"];

/// Mounts what everything else needs.
pub(super) fn first() -> Result<(), BootError> {
    for mount in FIRST {
        let mounted = mount_kernel_file_system(&mount);
        mounted.map_err(|source| BootError::Mount { what: mount.kind.into(), target: mount.target.into(), source })?;
    }
    // Usually made by udev; shells and tests of terminals look for them.
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        let _ = symlink(target, link);
    }
    Ok(())
}

/// Mounts what is good to have, once the root is in place.
pub(super) fn rest(volumes: &[Volume]) {
    let cgroups = Mount { kind: "cgroup2", target: "/sys/fs/cgroup", flags: NO_PROGRAMS, data: c"" };
    if let Err(error) = mount_kernel_file_system(&cgroups) {
        console::warn(&format!("cannot mount cgroup2 on /sys/fs/cgroup: {error}"));
    }
    if !Path::new("/tmp").exists() {
        let made = fs::create_dir("/tmp").and_then(|()| fs::set_permissions("/tmp", Permissions::from_mode(0o1777)));
        if let Err(error) = made {
            console::warn(&format!("cannot make /tmp: {error}"));
        }
    }
    for volume in volumes {
        if let Err(error) = mount_volume(volume) {
            let (device, path) = (volume.device.display(), volume.path.display());
            console::error(&format!("cannot mount the volume {device} on {path}: {error}"));
        }
    }
}

fn mount_kernel_file_system(mount: &Mount) -> io::Result<()> {
    fs::create_dir_all(mount.target)?;
    match rustix::mount::mount(mount.kind, mount.target, mount.kind, mount.flags, mount.data) {
        // The kernel may have mounted devtmpfs itself.
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn mount_volume(volume: &Volume) -> io::Result<()> {
    super::root_disk::wait_for(&volume.device).then_some(()).ok_or(io::ErrorKind::NotFound)?;
    fs::create_dir_all(&volume.path)?;
    let mut flags = MountFlags::NOATIME;
    flags.set(MountFlags::RDONLY, volume.read_only);
    Ok(rustix::mount::mount(&volume.device, &volume.path, "ext4", flags, None)?)
}
