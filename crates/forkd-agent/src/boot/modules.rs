//! Kernel modules from the initramfs.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::console;

const LIST: &str = "/lib/forkd/modules.list";
const DIRECTORY: &str = "/lib/forkd/modules";

/// Loads the modules that the initramfs lists, in its order. One that cannot be loaded is reported and
/// the others are tried: what it was for will say more.
pub(super) fn load_all() {
    let Ok(list) = fs::read_to_string(LIST) else { return };
    for name in names(&list) {
        if let Err(problem) = load(&file_of(name)) {
            console::warn(&format!("kernel module {name} was not loaded: {problem}"));
        }
    }
}

fn names(list: &str) -> impl Iterator<Item = &str> {
    list.lines().map(str::trim).filter(|name| !name.is_empty() && !name.starts_with('#'))
}

fn file_of(name: &str) -> PathBuf {
    let file = if name.ends_with(".ko") { name.to_owned() } else { format!("{name}.ko") };
    Path::new(DIRECTORY).join(file)
}

fn load(path: &Path) -> Result<(), String> {
    let file = File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
    match rustix::system::finit_module(&file, c"", 0) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(Errno::NOENT) => {
            Err("it needs a symbol that no loaded module has; is its dependency listed before it?".into())
        }
        Err(Errno::NOEXEC) => Err("it is not a module for this kernel (or is compressed)".into()),
        Err(Errno::NODEV) => Err("the machine does not have its device".into()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_name_modules_with_or_without_their_suffix() {
        let listed: Vec<_> = names("virtio_mmio\n\n# a comment\n  vsock.ko \n").map(file_of).collect();
        assert_eq!(listed, ["virtio_mmio.ko", "vsock.ko"].map(|name| Path::new(DIRECTORY).join(name)));
    }
}
