//! Starting a fresh monitor process.
//!
//! A monitor gets its control socket as standard input and a log file as standard error, and a
//! session of its own: neither a terminal's hang-up nor the end of this process ends it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use forkd_proto::monitor::Launch;
use tokio::net::UnixStream;

use crate::control::{Answer, Control};
use crate::process::Process;

/// Why a monitor could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The program cannot be run.
    #[error(
        "cannot run the monitor program {path}: {source}; it belongs beside the daemon's own program, or name it with --vmm"
    )]
    Program {
        /// Where it was looked for.
        path: PathBuf,
        /// Why it cannot be run.
        source: io::Error,
    },
    /// Something that the monitor needs could not be made.
    #[error("cannot prepare monitor {name}: {what}: {source}")]
    Prepare {
        /// The monitor's name.
        name: String,
        /// What could not be made.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// A process that is ended when nobody holds it any more.
#[derive(Debug)]
pub(crate) struct Owned(pub(crate) Process);

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.kill();
    }
}

/// A monitor that was just started.
pub(crate) struct Launched {
    /// Its control connection.
    pub(crate) control: Arc<Control>,
    /// Its process.
    pub(crate) process: Owned,
    /// The answer to the launch.
    pub(crate) answer: Answer,
}

/// Starts `program` and sends it `launch` with `fds`; standard error is appended to `log`. Before it is told
/// anything, `place` is given its process id, to put it into a control group.
///
/// The process is reaped by a task when it ends.
pub(crate) fn launch(
    program: &Path,
    log: &Path,
    launch: &Launch,
    fds: Vec<OwnedFd>,
    place: impl FnOnce(i32),
) -> Result<Launched, LaunchError> {
    let prepare = |what| {
        let name = launch.name.clone();
        move |source| LaunchError::Prepare { name, what, source }
    };
    let (ours, theirs) = socket_pair().map_err(prepare("make its control socket"))?;
    let log = OpenOptions::new().create(true).append(true).open(log).map_err(prepare("open its log file"))?;
    let mut command = Command::new(program);
    command.current_dir("/").stdin(Stdio::from(theirs)).stdout(Stdio::null()).stderr(Stdio::from(log));
    detach_from_session(&mut command);
    let mut child = tokio::process::Command::from(command)
        .spawn()
        .map_err(|source| LaunchError::Program { path: program.to_owned(), source })?;
    let pid = child.id().expect("a child that was not waited for has an id") as i32;
    // The child is not reaped before this call, so the number is still its own.
    let process = Process::child(pid).map_err(|source| LaunchError::Program { path: program.to_owned(), source });
    tokio::spawn(async move {
        if let Err(error) = child.wait().await {
            tracing::error!(pid, %error, "cannot wait for monitor");
        }
    });
    place(pid);
    let control = Control::connected(&launch.name, ours);
    let answer = control.post(launch, fds);
    Ok(Launched { control, process: Owned(process?), answer })
}

/// A connected pair: our end for this runtime, the other for a process to be.
pub(crate) fn socket_pair() -> io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    Ok((UnixStream::from_std(ours)?, theirs.into()))
}

/// The last `limit` lines of a monitor's log, for error texts.
pub(crate) fn log_tail(path: &Path, limit: usize) -> String {
    use std::io::{Read, Seek, SeekFrom};
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let start = file.metadata()?.len().saturating_sub(16 << 10);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let text = String::from_utf8_lossy(&read().unwrap_or_default()).into_owned();
    crate::console::last_lines(&text, limit)
}

/// Makes the child the leader of a session of its own.
#[allow(unsafe_code)]
fn detach_from_session(command: &mut Command) {
    // SAFETY: the closure runs between fork and exec, where only async-signal-safe calls are
    // allowed; setsid(2) is one, and the closure allocates nothing. A process group of its own,
    // which std offers without unsafe, would still share the session.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_proto::monitor::{Backing, LaunchAction, ZygoteConfig};

    fn zygote() -> Launch {
        let action = LaunchAction::Zygote(ZygoteConfig { backing: Backing::File, prefetch: Vec::new() });
        Launch { fds: Vec::new(), name: "zygote-t".to_owned(), action }
    }

    #[tokio::test]
    async fn a_missing_program_is_named_with_the_remedy() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("no-such-vmm");
        let error =
            launch(&path, &dir.path().join("log"), &zygote(), Vec::new(), |_| {}).err().expect("missing").to_string();
        assert!(error.contains("no-such-vmm") && error.contains("--vmm"), "{error}");
    }

    #[tokio::test]
    async fn a_program_that_is_no_monitor_is_noticed_and_its_complaint_kept() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("tempdir");
        let program = dir.path().join("vmm");
        std::fs::write(&program, "#!/bin/sh\necho 'kvm is broken' >&2\nexit 3\n").expect("write");
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("chmod");
        let log = dir.path().join("log");
        let launched = launch(&program, &log, &zygote(), Vec::new(), |_| {}).expect("started");
        launched.answer.wait().await.expect_err("it never answers");
        launched.process.0.exited().await;
        assert_eq!(log_tail(&log, 5), "kvm is broken");
    }
}
