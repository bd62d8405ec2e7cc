//! One daemon per state directory.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde::Serialize;

/// Where a daemon can be reached, for whoever looks into its state directory.
#[derive(Debug, Serialize)]
pub(crate) struct Whereabouts {
    /// Its process id.
    pub(crate) pid: u32,
    /// Its TCP address, if it listens on one.
    pub(crate) address: Option<String>,
    /// Its unix socket.
    pub(crate) socket: PathBuf,
}

/// The right to use a state directory; ends with the process at the latest.
#[derive(Debug)]
pub(crate) struct Claim {
    file: File,
}

impl Claim {
    /// Claims `dir`, which is made when missing. `daemon.json` in it is the lock and, from
    /// [`Claim::announce`] on, tells where the daemon is.
    pub(crate) fn stake(dir: &Path) -> anyhow::Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .with_context(|| format!("cannot make the state directory {}", dir.display()))?;
        let path = dir.join("daemon.json");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                file.set_len(0).with_context(|| format!("cannot write {}", path.display()))?;
                Ok(Self { file })
            }
            Err(Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                let _ = file.read_to_string(&mut holder);
                let holder = if holder.is_empty() { "still starting".to_owned() } else { holder.trim().to_owned() };
                bail!(
                    "another daemon uses the state directory {} ({holder}); stop it, or choose another with --state-dir",
                    dir.display()
                )
            }
            Err(error) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
        }
    }

    /// Writes down where the daemon can be reached.
    pub(crate) fn announce(&mut self, whereabouts: &Whereabouts) -> anyhow::Result<()> {
        let text = serde_json::to_string(whereabouts)?;
        self.file.rewind()?;
        self.file.set_len(0)?;
        self.file.write_all(text.as_bytes()).context("cannot write daemon.json in the state directory")
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // The file stays, so that its lock is the same for everybody; empty, it names nobody.
        let _ = self.file.set_len(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_claim_is_refused_with_the_holder_until_the_first_ends() {
        let dir = tempfile::tempdir().expect("tempdir");
        let state = dir.path().join("state");
        let mut claim = Claim::stake(&state).expect("free");
        let whereabouts = Whereabouts { pid: 4242, address: Some("127.0.0.1:8889".to_owned()), socket: "/s".into() };
        claim.announce(&whereabouts).expect("announce");
        let refusal = Claim::stake(&state).expect_err("taken").to_string();
        assert!(refusal.contains("4242") && refusal.contains("--state-dir"), "{refusal}");
        drop(claim);
        Claim::stake(&state).expect("free again");
    }
}
