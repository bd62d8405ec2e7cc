//! The initramfs of a guest: the agent, and the modules it needs to reach its root disk and host.
//!
//! ```text
//! /init                            the agent
//! /dev/console                     so that it has somewhere to speak before /dev is mounted
//! /lib/forkd/modules/NAME.ko       uncompressed
//! /lib/forkd/modules.list          NAME, one a line, in the order in which they load
//! ```
//!
//! Not compressed: an emulated processor would spend longer on unpacking it than a disk on reading.

mod cpio;
mod modules;

use std::fs;
use std::io::{self, BufWriter};
use std::path::Path;

use forkd_types::Digest;

use crate::kernel::Kernel;
use crate::{ImageError, Result};
use modules::{Module, Wanted};

/// What every guest takes. The order matters where loading one makes another work better.
const MODULES: [Wanted<'_>; 11] = [
    Wanted::Needed("virtio_mmio"),
    Wanted::Needed("virtio_blk"),
    // ext4 looks for the checksum when it mounts; the processor's own instruction is the quicker one.
    Wanted::Welcome("crc32c_generic"),
    Wanted::Welcome("crc32c_intel"),
    Wanted::Needed("ext4"),
    Wanted::Needed("vmw_vsock_virtio_transport"),
    Wanted::Welcome("virtio_net"),
    Wanted::Welcome("virtio_balloon"),
    Wanted::Welcome("virtio_rng"),
    Wanted::Welcome("pvpanic_mmio"),
    Wanted::Welcome("overlay"),
];

/// Builds the initramfs for `kernel` with `agent_binary` as its `/init` and writes it to `out`.
///
/// The same inputs give the same bytes. A file at `out` is replaced in one step; one that is the
/// same already is left alone. `extra_modules` are loaded after what every guest takes. Returns the
/// digest of the file.
///
/// # Errors
/// [`ImageError::MissingModule`] when the kernel has one that is needed neither as a module nor
/// built in; [`ImageError::Malformed`] when `agent_binary` could not be an `/init`.
pub fn build_initramfs(agent_binary: &Path, kernel: &Kernel, extra_modules: &[&str], out: &Path) -> Result<Digest> {
    let agent = fs::read(agent_binary).map_err(ImageError::io("read the agent", agent_binary))?;
    check_agent(&agent).map_err(|reason| ImageError::malformed(agent_binary, "an /init", reason))?;
    let extra = extra_modules.iter().map(|&name| Wanted::Needed(name));
    let wanted: Vec<Wanted<'_>> = MODULES.into_iter().chain(extra).collect();
    let modules = modules::resolve(kernel, &wanted)?;

    let archive = write_archive(&agent, &modules, Vec::new()).map_err(ImageError::io("assemble", out))?;
    let digest = Digest::from_bytes(*blake3::hash(&archive).as_bytes());
    if !is_file_with(out, &archive) {
        replace(out, &archive)?;
    }
    Ok(digest)
}

/// An `/init` that needs a dynamic loader would only be found out by a guest that panics.
fn check_agent(agent: &[u8]) -> Result<(), String> {
    const INTERPRETER: u32 = 3;
    let elf = crate::kernel::Elf::parse(agent)?;
    match elf.segments().iter().any(|segment| segment.kind == INTERPRETER) {
        true => Err("it is linked dynamically; the initramfs has no libraries, link it statically".to_owned()),
        false => Ok(()),
    }
}

fn write_archive<W: io::Write>(agent: &[u8], modules: &[Module], out: W) -> io::Result<W> {
    let mut archive = cpio::Archive::new(out);
    for directory in ["dev", "lib", "lib/forkd", "lib/forkd/modules"] {
        archive.directory(directory)?;
    }
    archive.character_device("dev/console", 5, 1)?;
    archive.file("init", 0o755, agent)?;
    let mut list = String::new();
    for Module { name, bytes } in modules {
        archive.file(&format!("lib/forkd/modules/{name}.ko"), 0o644, bytes)?;
        list.push_str(name);
        list.push('\n');
    }
    archive.file("lib/forkd/modules.list", 0o644, list.as_bytes())?;
    archive.finish()
}

fn is_file_with(path: &Path, content: &[u8]) -> bool {
    let same_size = path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.len() == content.len() as u64);
    same_size && fs::read(path).is_ok_and(|bytes| bytes == content)
}

fn replace(out: &Path, content: &[u8]) -> Result<()> {
    use std::io::Write;
    let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(ImageError::io("create directory", parent))?;
    let mut name = out.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let temporary = parent.join(name);
    let written = fs::File::create(&temporary).and_then(|file| {
        let mut file = BufWriter::new(file);
        file.write_all(content)?;
        file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
    });
    let placed = written.and_then(|()| fs::rename(&temporary, out));
    placed.map_err(|error| {
        let _ = fs::remove_file(&temporary);
        ImageError::io("write", out)(error)
    })
}
