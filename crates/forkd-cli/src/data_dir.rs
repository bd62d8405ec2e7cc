//! Where `forkd` keeps what it makes.
//!
//! ```text
//! <data>/                  $XDG_DATA_HOME/forkd, else $HOME/.local/share/forkd, else /tmp/forkd
//!   snapshots/ blobs/ …    the local daemon's store
//!   run/                   the local daemon's sockets and state
//!   forkd.sock             the local daemon's API
//!   daemon.log             what the local daemon said
//!   cache/disks/           built root disks
//!   cache/kernels/         unpacked guest kernels
//!   cache/initramfs/       built initramfs images
//!   cache/digests/         digests of files that were uploaded
//!   cache/bench/           the compiled floors of `forkd bench`
//!   cache/packs/           packs being downloaded or sent
//!   cache/scratch/         builds under way
//!   machine/               the `forkd machine`
//! ```

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::environment;

/// The data directory of this user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DataDir {
    root: PathBuf,
}

impl DataDir {
    /// The directory that `environment` asks for; a relative `XDG_DATA_HOME` is ignored, as its
    /// specification says.
    pub(crate) fn resolve(environment: impl Fn(&str) -> Option<OsString>) -> Self {
        let absolute = |name| environment(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let parent = absolute(environment::XDG_DATA_HOME)
            .or_else(|| absolute(environment::HOME).map(|home| home.join(".local/share")))
            .unwrap_or_else(std::env::temp_dir);
        Self { root: parent.join("forkd") }
    }

    /// The directory itself.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The state directory of a daemon that this program starts.
    pub(crate) fn daemon_state(&self) -> PathBuf {
        self.root.clone()
    }

    /// The unix socket of a daemon that this program starts.
    pub(crate) fn daemon_socket(&self) -> PathBuf {
        self.root.join("forkd.sock")
    }

    /// The log of a daemon that this program starts.
    pub(crate) fn daemon_log(&self) -> PathBuf {
        self.root.join("daemon.log")
    }

    /// Built root disks, kernels and initramfs images.
    pub(crate) fn cache(&self) -> PathBuf {
        self.root.join("cache")
    }

    /// Digests of files, so that they need not be computed again.
    pub(crate) fn digests(&self) -> PathBuf {
        self.root.join("cache/digests")
    }

    /// Programs and files of the benchmarks; the directory is there afterwards.
    pub(crate) fn bench(&self) -> anyhow::Result<PathBuf> {
        let directory = self.root.join("cache/bench");
        std::fs::create_dir_all(&directory).with_context(|| format!("could not create {}", directory.display()))?;
        Ok(directory)
    }

    /// Packs that are being downloaded or sent.
    pub(crate) fn packs(&self) -> PathBuf {
        self.root.join("cache/packs")
    }

    /// Scratch space for builds; the same file system as the cache.
    pub(crate) fn scratch(&self) -> PathBuf {
        self.root.join("cache/scratch")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(variables: &[(&str, &str)]) -> PathBuf {
        let lookup = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into());
        DataDir::resolve(lookup).root().to_owned()
    }

    #[test]
    fn the_documented_order_of_places() {
        assert_eq!(resolve(&[("XDG_DATA_HOME", "/x"), ("HOME", "/h")]), Path::new("/x/forkd"));
        assert_eq!(resolve(&[("HOME", "/h")]), Path::new("/h/.local/share/forkd"));
        assert_eq!(resolve(&[("XDG_DATA_HOME", "rel"), ("HOME", "/h")]), Path::new("/h/.local/share/forkd"));
        assert_eq!(resolve(&[]), std::env::temp_dir().join("forkd"));
    }
}
