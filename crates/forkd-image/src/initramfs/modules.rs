//! Which kernel modules a guest needs, in the order in which they load.
//!
//! Dependencies are read from the modules themselves (`depends=` and `softdep=` in `.modinfo`): a
//! package's `modules.dep` is made only when it is installed.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::kernel::{Elf, Kernel, decode};
use crate::{ImageError, Result};

/// A module to load.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Module {
    /// Its name, with underscores.
    pub(crate) name: String,
    /// The uncompressed module; its signature, at the end, is kept.
    pub(crate) bytes: Vec<u8>,
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wanted<'a> {
    /// The guest cannot work without it: module or built in.
    Needed(&'a str),
    /// Taken where there is a module of that name.
    Welcome(&'a str),
}

/// The modules of one kernel.
struct Library<'a> {
    release: &'a str,
    files: HashMap<String, PathBuf>,
    built_in: HashSet<String>,
}

/// The modules that `wanted` needs, each after what it depends on.
///
/// A kernel that came as an image alone has none; what it needs must be built in.
pub(crate) fn resolve(kernel: &Kernel, wanted: &[Wanted<'_>]) -> Result<Vec<Module>> {
    let Some(dir) = &kernel.modules_dir else { return Ok(Vec::new()) };
    let library = Library::open(dir, &kernel.release)?;
    let mut loaded = Vec::new();
    let mut visited = HashSet::new();
    for &want in wanted {
        match want {
            Wanted::Needed(name) => library.add(&normal(name), true, &mut visited, &mut loaded)?,
            Wanted::Welcome(name) => library.add(&normal(name), false, &mut visited, &mut loaded)?,
        }
    }
    Ok(loaded)
}

impl<'a> Library<'a> {
    fn open(dir: &Path, release: &'a str) -> Result<Self> {
        let mut files = HashMap::new();
        let mut pending = vec![dir.to_owned()];
        while let Some(dir) = pending.pop() {
            for entry in dir.read_dir().map_err(ImageError::io("list", &dir))? {
                let entry = entry.map_err(ImageError::io("list", &dir))?;
                let kind = entry.file_type().map_err(ImageError::io("stat", entry.path()))?;
                if kind.is_dir() {
                    pending.push(entry.path());
                } else if let Some(name) = module_name(&entry.path()) {
                    files.insert(name, entry.path());
                }
            }
        }
        let list = dir.join("modules.builtin");
        let built_in = match fs::read_to_string(&list) {
            Ok(text) => text.lines().filter_map(|line| module_name(Path::new(line))).collect(),
            Err(error) => return Err(ImageError::io("read", &list)(error)),
        };
        Ok(Self { release, files, built_in })
    }

    fn add(&self, name: &str, needed: bool, visited: &mut HashSet<String>, loaded: &mut Vec<Module>) -> Result<()> {
        if self.built_in.contains(name) || visited.contains(name) {
            return Ok(());
        }
        let Some(path) = self.files.get(name) else {
            let reason = "has no such module and does not have it built in".to_owned();
            let (module, release) = (name.to_owned(), self.release.to_owned());
            return if needed { Err(ImageError::MissingModule { module, release, reason }) } else { Ok(()) };
        };
        visited.insert(name.to_owned());
        let malformed = |reason: String| ImageError::malformed(path, "a kernel module", reason);
        let packed = fs::read(path).map_err(ImageError::io("read", path))?;
        let bytes = decode(&packed).map_err(malformed)?;
        let information = Elf::parse(&bytes).map_err(malformed)?.section(".modinfo");
        let information = information.ok_or_else(|| malformed("it has no .modinfo section".to_owned()))?;
        let Dependencies { hard, soft } = Dependencies::parse(information);
        for dependency in soft {
            self.add(&dependency, false, visited, loaded)?;
        }
        for dependency in hard {
            self.add(&dependency, true, visited, loaded)?;
        }
        loaded.push(Module { name: name.to_owned(), bytes });
        Ok(())
    }
}

/// What must and what should be loaded before a module.
struct Dependencies {
    hard: Vec<String>,
    soft: Vec<String>,
}

impl Dependencies {
    fn parse(information: &[u8]) -> Self {
        let mut found = Self { hard: Vec::new(), soft: Vec::new() };
        for entry in information.split(|&byte| byte == 0) {
            let entry = String::from_utf8_lossy(entry);
            if let Some(list) = entry.strip_prefix("depends=") {
                found.hard.extend(list.split(',').filter(|name| !name.is_empty()).map(normal));
            } else if let Some(list) = entry.strip_prefix("softdep=pre:") {
                let before = list.split_whitespace().take_while(|word| !word.ends_with(':'));
                found.soft.extend(before.map(normal));
            }
        }
        found
    }
}

/// `kernel/net/vmw_vsock/vsock.ko.xz` is the module `vsock`.
fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let (stem, extension) = name.split_once(".ko")?;
    matches!(extension, "" | ".xz" | ".zst" | ".gz").then(|| normal(stem))
}

/// The kernel takes dashes and underscores in module names for the same.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_from_paths_and_information() {
        assert_eq!(module_name(Path::new("kernel/char/virtio-rng.ko.xz")).as_deref(), Some("virtio_rng"));
        assert_eq!(module_name(Path::new("kernel/vsock.ko")).as_deref(), Some("vsock"));
        assert_eq!(module_name(Path::new("modules.order")), None);
        let found =
            Dependencies::parse(b"depends=jbd2,mbcache,crc-16\0softdep=pre: crypto-crc32c x post: y\0depends=\0");
        assert_eq!(found.hard, ["jbd2", "mbcache", "crc_16"]);
        assert_eq!(found.soft, ["crypto_crc32c", "x"]);
    }

    #[test]
    fn a_bare_image_has_no_modules_and_a_missing_one_is_named() {
        let mut kernel = Kernel { vmlinux: "/vmlinux".into(), release: "6.1-test".into(), modules_dir: None };
        assert_eq!(resolve(&kernel, &[Wanted::Needed("virtio_blk")]).expect("none"), []);
        let dir = tempfile::tempdir().expect("tempdir");
        fs::write(dir.path().join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").expect("write");
        kernel.modules_dir = Some(dir.path().to_owned());
        let wanted = [Wanted::Needed("ext4"), Wanted::Welcome("overlay")];
        assert_eq!(resolve(&kernel, &wanted).expect("built in"), []);
        let error = resolve(&kernel, &[Wanted::Needed("virtio-blk")]).expect_err("missing").to_string();
        assert!(error.contains("virtio_blk") && error.contains("6.1-test"), "{error}");
    }
}
