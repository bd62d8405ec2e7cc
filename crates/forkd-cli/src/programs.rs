//! Finding the programs that `forkd` runs: its own companions and the distribution's tools.

use std::path::{Path, PathBuf};

use crate::environment;
use crate::failure::advised;

/// Where a package puts the companions when they are not beside `forkd`.
const LIBRARY_DIRECTORIES: [&str; 2] = ["/usr/libexec/forkd", "/usr/local/libexec/forkd"];

/// One of forkd's own programs: beside this one, in the package's library directory, or in `PATH`.
pub(crate) fn companion(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let beside = own.parent().unwrap_or(Path::new("/"));
    let mut places = vec![beside.to_owned()];
    places.extend(LIBRARY_DIRECTORIES.map(PathBuf::from));
    places.iter().map(|place| place.join(name)).find(|path| is_program(path)).or_else(|| in_path(name)).ok_or_else(
        || {
            advised(
                anyhow::anyhow!("the program {name} was not found in {} or PATH", beside.display()),
                "make build   (or reinstall forkd: its programs belong in one directory)",
            )
        },
    )
}

/// A tool of the distribution, by its name.
pub(crate) fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os(environment::PATH)?;
    // Administrators' tools such as mke2fs are often not in a user's PATH.
    let places = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    places.map(|place| place.join(name)).find(|path| is_program(path))
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}
