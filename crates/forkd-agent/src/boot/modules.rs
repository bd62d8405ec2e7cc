//! Kernel modules from the initramfs.

use std::ffi::CString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::console;

const LIST: &str = "/lib/forkd/modules.list";
const DIRECTORY: &str = "/lib/forkd/modules";

/// Loads the modules that the initramfs lists, in its order, with the parameters that the kernel's command
/// line has for them (`module.parameter=value`, as modprobe takes them). One that cannot be loaded is reported
/// and the others are tried: what it was for will say more.
pub(super) fn load_all(command_line: &str) {
    let Ok(list) = fs::read_to_string(LIST) else { return };
    for name in names(&list) {
        if let Err(problem) = load(&file_of(name), &parameters(name, command_line)) {
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

/// What `command_line` has for the module `name`, in the form in which the kernel wants it. `-` and `_` are
/// one in a module's name.
fn parameters(name: &str, command_line: &str) -> String {
    let plain = |name: &str| name.trim_end_matches(".ko").replace('-', "_");
    let own = |word: &&str| word.split_once('.').is_some_and(|(module, _)| plain(module) == plain(name));
    let words = command_line.split_ascii_whitespace().filter(own).filter_map(|word| word.split_once('.'));
    words.map(|(_, parameter)| parameter).collect::<Vec<_>>().join(" ")
}

fn load(path: &Path, parameters: &str) -> Result<(), String> {
    let parameters = CString::new(parameters).expect("a command line has no NUL");
    let file = File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
    match rustix::system::finit_module(&file, &parameters, 0) {
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
    #[test]
    fn parameters_are_the_words_for_that_module() {
        let line = "quiet kvm.halt_poll_ns=0 kvm_amd.npt=0 kvm.nx_huge_pages=never a.b.c=1";
        assert_eq!(parameters("kvm", line), "halt_poll_ns=0 nx_huge_pages=never");
        assert_eq!(parameters("kvm-amd.ko", line), "npt=0");
        assert_eq!(parameters("virtio_mmio", line), "");
    }
}
