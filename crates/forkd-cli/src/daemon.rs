//! Starting a daemon on this host, in the background.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::client::{Address, Client};
use crate::data_dir::DataDir;
use crate::failure::advised;
use crate::programs;
use crate::progress::Progress;

/// Where clients that were told nothing look for a daemon.
const USUAL: &str = "127.0.0.1:8889";

/// How long a daemon may take until it answers.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a socket may still come alive after our own daemon gave up, because another `forkd` has
/// started one at the same moment.
const RIVAL_TIMEOUT: Duration = Duration::from_secs(3);

/// How often the socket is tried.
const POLL: Duration = Duration::from_millis(20);

/// How much of the log is worth quoting.
const LOG_TAIL: u64 = 2048;

/// Starts a daemon and waits until it answers on its socket.
pub(crate) async fn start(data: &DataDir, token: Option<&str>, progress: &Progress) -> anyhow::Result<PathBuf> {
    let step = progress.quick_step("Waiting for the daemon");
    let socket = data.daemon_socket();
    let log = data.daemon_log();
    fs::create_dir_all(data.root()).with_context(|| format!("could not create {}", data.root().display()))?;
    let began = log.metadata().map_or(0, |metadata| metadata.len());
    let mut child = launch(data, &socket, &log)?;
    let client = Client::new(Address::Unix(socket.clone()), token.map(str::to_owned));
    let mut deadline = Instant::now() + START_TIMEOUT;
    let mut ended = None;
    loop {
        if client.probe().await.is_ok() {
            step.vanish();
            return Ok(socket);
        }
        if ended.is_none()
            && let Some(status) = child.try_wait()?
        {
            ended = Some(status);
            deadline = Instant::now() + RIVAL_TIMEOUT;
        }
        if Instant::now() >= deadline {
            let said = tail(&log, began);
            let what = match ended {
                Some(status) => format!("the daemon did not start ({status})"),
                None => format!("the daemon does not answer after {} s", START_TIMEOUT.as_secs()),
            };
            let error = if said.is_empty() { what } else { format!("{what}; it said:\n{said}") };
            return Err(advised(anyhow::anyhow!(error), format!("forkd doctor   (the log is {})", log.display())));
        }
        tokio::time::sleep(POLL).await;
    }
}

fn launch(data: &DataDir, socket: &Path, log: &Path) -> anyhow::Result<Child> {
    let controller = programs::companion("forkd-controller")?;
    let monitor = programs::companion("forkd-vmm")?;
    let log_file: File = OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("could not open the daemon's log {}", log.display()))?;
    let errors = log_file.try_clone().context("could not duplicate the log's descriptor")?;
    Command::new(&controller)
        .arg("serve")
        .args(tcp())
        .arg("--socket")
        .arg(socket)
        .arg("--state-dir")
        .arg(data.daemon_state())
        .arg("--vmm")
        .arg(&monitor)
        .stdin(Stdio::null())
        .stdout(log_file)
        .stderr(errors)
        // The terminal's Ctrl-C is meant for this program, not for the daemon.
        .process_group(0)
        .spawn()
        .with_context(|| format!("could not run {}", controller.display()))
}

/// The usual TCP address, for clients that know no other; none when somebody else has it.
fn tcp() -> &'static [&'static str] {
    if TcpListener::bind(USUAL).is_ok() { &["--bind", USUAL] } else { &["--no-tcp"] }
}

/// What was added to `log` since it was `from` bytes long, at most its last part.
fn tail(log: &Path, from: u64) -> String {
    let read = || {
        let mut file = File::open(log)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(from.max(len.saturating_sub(LOG_TAIL))))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        std::io::Result::Ok(bytes)
    };
    read().map_or_else(|_| String::new(), |bytes| String::from_utf8_lossy(&bytes).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_new_end_of_the_log_is_quoted() {
        let directory = tempfile::tempdir().expect("scratch directory");
        let log = directory.path().join("log");
        fs::write(&log, "old\nnew\n").expect("write");
        assert_eq!(tail(&log, 4), "new");
        assert_eq!(tail(&log, 0), "old\nnew");
        assert_eq!(tail(&directory.path().join("none"), 0), "");
    }
}
