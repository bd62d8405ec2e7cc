//! Files that a sandbox has while it lives: sockets, its console, scratch space for its disks.
//!
//! ```text
//! <state>/run/<id>.control    listening socket on which a restarted daemon finds the monitor again
//!             <id>.vsock      listening socket through which the guest's agent is reached
//!             <id>.console    what the guest wrote to its console
//!             <name>.log      what a monitor wrote to standard error
//! <state>/scratch             private disk blocks, in files that never have a name
//! ```

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// Makes and removes these files.
#[derive(Clone, Debug)]
pub(crate) struct RunFiles {
    run: PathBuf,
    scratch: PathBuf,
}

/// The kinds of files below `run`.
const SUFFIXES: [&str; 3] = ["control", "vsock", "console"];

impl RunFiles {
    /// Makes the directories below `state_dir`.
    pub(crate) fn open(state_dir: &Path) -> io::Result<Self> {
        let files = Self { run: state_dir.join("run"), scratch: state_dir.join("scratch") };
        for dir in [&files.run, &files.scratch] {
            DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        // Scratch files that had to be made with a name and were not unlinked in time.
        for entry in files.scratch.read_dir()? {
            std::fs::remove_file(entry?.path())?;
        }
        Ok(files)
    }

    /// Where the control socket of `name` is.
    pub(crate) fn control(&self, name: &str) -> PathBuf {
        self.run.join(format!("{name}.control"))
    }

    /// Where the vsock socket of `name` is.
    pub(crate) fn vsock(&self, name: &str) -> PathBuf {
        self.run.join(format!("{name}.vsock"))
    }

    /// Where the console of `name` is.
    pub(crate) fn console(&self, name: &str) -> PathBuf {
        self.run.join(format!("{name}.console"))
    }

    /// Where the log of monitor `name` is.
    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.run.join(format!("{name}.log"))
    }

    /// A listening socket at `path`.
    pub(crate) fn listen(&self, path: &Path) -> io::Result<OwnedFd> {
        Ok(UnixListener::bind(path)?.into())
    }

    /// An empty file without a name for one disk's private blocks.
    pub(crate) fn overlay(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        match rustix::fs::open(&self.scratch, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => Ok(file),
            // File systems without O_TMPFILE, overlayfs before Linux 6.1 among them.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT) => self.unlinked_file(),
            Err(error) => Err(error.into()),
        }
    }

    fn unlinked_file(&self) -> io::Result<OwnedFd> {
        use std::sync::atomic::{AtomicU64, Ordering};
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let path = self.scratch.join(format!("{}-{}", std::process::id(), SERIAL.fetch_add(1, Ordering::Relaxed)));
        let file: File = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        std::fs::remove_file(&path)?;
        Ok(file.into())
    }

    /// Removes the sockets and, unless it is to be kept for its reader, the console of `name`.
    pub(crate) fn remove(&self, name: &str, keep_console: bool) {
        for suffix in SUFFIXES {
            if !(keep_console && suffix == "console") {
                remove_quietly(&self.run.join(format!("{name}.{suffix}")));
            }
        }
    }

    /// Gives the files of `from` the names of those of `to`, which they replace. A listening socket goes on
    /// listening under its new name.
    pub(crate) fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        for suffix in SUFFIXES {
            std::fs::rename(self.run.join(format!("{from}.{suffix}")), self.run.join(format!("{to}.{suffix}")))?;
        }
        Ok(())
    }

    /// Removes the log of monitor `name`.
    pub(crate) fn remove_log(&self, name: &str) {
        remove_quietly(&self.log(name));
    }

    /// Removes every run file whose name `keep` does not claim. `keep` is told the name without its
    /// suffix, and the suffix.
    pub(crate) fn sweep(&self, keep: impl Fn(&str, &str) -> bool) -> io::Result<()> {
        for entry in self.run.read_dir()? {
            let entry = entry?;
            let file = entry.file_name();
            let kept =
                file.to_str().and_then(|file| file.rsplit_once('.')).is_some_and(|(name, kind)| keep(name, kind));
            if !kept {
                remove_quietly(&entry.path());
            }
        }
        Ok(())
    }
}

fn remove_quietly(path: &Path) {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "cannot remove run file");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlays_are_private_empty_and_leave_no_name() {
        let dir = tempfile::tempdir().expect("tempdir");
        let files = RunFiles::open(dir.path()).expect("open");
        for overlay in [files.overlay().expect("tmpfile"), files.unlinked_file().expect("unlinked")] {
            let overlay = File::from(overlay);
            assert_eq!(overlay.metadata().expect("stat").len(), 0);
            overlay.set_len(4096).expect("grow");
        }
        assert_eq!(dir.path().join("scratch").read_dir().expect("list").count(), 0);
    }

    #[test]
    fn a_socket_goes_on_listening_under_the_name_it_took_over() {
        let dir = tempfile::tempdir().expect("tempdir");
        let files = RunFiles::open(dir.path()).expect("open");
        let make = |name: &str| {
            drop(crate::console::create(&files.console(name)).expect("console"));
            [files.control(name), files.vsock(name)].map(|path| files.listen(&path).expect("listen"))
        };
        let _old = make("sb-1");
        let [new, _] = make("sb-1-rewinding").map(UnixListener::from);
        files.rename("sb-1-rewinding", "sb-1").expect("rename");
        let client = std::os::unix::net::UnixStream::connect(files.control("sb-1")).expect("connect");
        new.set_nonblocking(true).expect("nonblocking");
        new.accept().expect("the connection came to the one that took the name over");
        drop(client);
        assert_eq!(files.run.read_dir().expect("list").count(), 3, "nothing is left of the name before");
    }

    #[test]
    fn a_sweep_takes_what_nobody_claims() {
        let dir = tempfile::tempdir().expect("tempdir");
        let files = RunFiles::open(dir.path()).expect("open");
        for name in ["sb-1", "sb-2"] {
            drop(files.listen(&files.vsock(name)).expect("listen"));
            crate::console::create(&files.console(name)).expect("console");
        }
        files.sweep(|name, kind| name == "sb-1" && kind == "console").expect("sweep");
        let left: Vec<_> = files.run.read_dir().expect("list").map(|e| e.expect("entry").file_name()).collect();
        assert_eq!(left, ["sb-1.console"]);
        files.remove("sb-1", true);
        assert!(files.console("sb-1").exists());
        files.remove("sb-1", false);
        assert!(!files.console("sb-1").exists());
    }
}
