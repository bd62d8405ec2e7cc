//! What a guest is called before it takes on an identity, and the places where an identity is put.
//!
//! Every copy writes its names on its way up. On the root disk each such write would make the copy's kernel
//! keep blocks and inodes of its own and write them out seconds later; so the files lie in memory, bound
//! over the image's own, which stay as they are.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::console;
use crate::identity::{BOOT_ID_FILE, write_in_place};

/// The kernel's own boot id, which cannot be changed.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const HOSTNAME: &str = "/etc/hostname";
const MACHINE_ID: &str = "/etc/machine-id";

/// Names the guest as its image says, else `fallback`, and makes the places for an identity.
pub(super) fn prepare(fallback: &str) {
    let image_name = fs::read_to_string(HOSTNAME).ok().map(|name| name.trim().to_owned());
    let name = image_name.filter(|name| !name.is_empty()).unwrap_or_else(|| fallback.to_owned());
    if let Err(error) = rustix::system::sethostname(name.as_bytes()) {
        console::warn(&format!("cannot set the host name to {name:?}: {error}"));
    }
    for directory in ["/etc", "/run/forkd"] {
        if let Err(error) = fs::create_dir_all(directory) {
            console::warn(&format!("cannot make {directory}: {error}"));
        }
    }
    if let Err(error) = bind_over(Path::new(BOOT_ID), Path::new(BOOT_ID_FILE), 0o444) {
        console::warn(&format!("copies of this guest will share its boot id: {error}"));
    }
    // An image need not have a name of its own; but programs count on a machine id.
    let machine_id = || {
        write_in_place(Path::new(MACHINE_ID), &fs::read_to_string(MACHINE_ID).unwrap_or_default(), 0o444)?;
        bind_over(Path::new(MACHINE_ID), Path::new("/run/forkd/machine-id"), 0o444)
    };
    let hostname = || match fs::exists(HOSTNAME)? {
        true => bind_over(Path::new(HOSTNAME), Path::new("/run/forkd/hostname"), 0o644),
        false => Ok(()),
    };
    for (path, bound) in [(MACHINE_ID, machine_id()), (HOSTNAME, hostname())] {
        if let Err(error) = bound {
            console::warn(&format!("copies of this guest will write {path} on the root disk: {error}"));
        }
    }
}

/// Puts a copy of `target` at `place` and binds that over it.
fn bind_over(target: &Path, place: &Path, mode: u32) -> io::Result<()> {
    write_in_place(place, &fs::read_to_string(target)?, mode)?;
    fs::set_permissions(place, Permissions::from_mode(mode))?;
    Ok(rustix::mount::mount_bind(place, target)?)
}
