//! Programs in other languages that use the daemon: their packages, installed once into `target/clients`, and where
//! they find the daemon under test.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use forkd_testkit::{Host, finish};
use serde::Deserialize;

/// Where clients without the REST API dial a guest.
const GUEST_IP: &str = "10.42.0.2";

/// The workspace's root.
pub(crate) fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Where packages are installed, kept between runs.
pub(crate) fn installed() -> PathBuf {
    workspace().join("target/clients")
}

/// A virtual environment with these packages, made when it is missing or was made for others.
pub(crate) fn python(name: &str, packages: &[&str]) -> Result<PathBuf> {
    // Tests of one program run at once, and each package is installed once.
    static INSTALLING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
    let environment = installed().join(name);
    let (interpreter, stamp) = (environment.join("bin/python"), environment.join("installed"));
    let wanted = packages.join("\n");
    if std::fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) && interpreter.exists() {
        return Ok(interpreter);
    }
    let directory = environment.to_str().context("the path is text")?;
    run(Command::new("python3").args(["-m", "venv", "--clear", directory])).context(
        "python3 cannot make a virtual environment; scripts/install-dependencies run test installs what is missing",
    )?;
    install(&interpreter, packages)?;
    std::fs::write(stamp, wanted)?;
    Ok(interpreter)
}

/// Installs packages with pip, from wherever this host is set to get them.
pub(crate) fn install(interpreter: &Path, packages: &[&str]) -> Result<String> {
    let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
    run(Command::new(interpreter).args(pip).args(packages))
}

/// Runs a command that must succeed and returns all that it says.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let text = format!("{command:?}");
    let said = tempfile::NamedTempFile::new()?;
    let child = command
        .stdin(Stdio::null())
        .stdout(said.reopen()?)
        .stderr(said.reopen()?)
        .spawn()
        .with_context(|| format!("cannot run {text}"))?;
    let status = finish(child, &text)?;
    let said = String::from_utf8_lossy(&std::fs::read(said.path())?).into_owned();
    if !status.success() {
        bail!("{text}: {status}\n{said}");
    }
    Ok(said)
}

/// What `forkd env --json` prints.
#[derive(Deserialize)]
struct Access {
    url: String,
    token: Option<String>,
}

/// The environment in which a client finds the daemon under test, and the `forkd` program on its path.
pub(crate) fn environment(host: &Host) -> Result<Vec<(&'static str, OsString)>> {
    let Access { url, token } = host.forkd(&["env", "--json"])?.json()?;
    let url = match url.strip_prefix("unix://") {
        Some(socket) => over_tcp(Path::new(socket))?,
        None => url,
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::iter::once(host.programs().to_owned()).chain(std::env::split_paths(&path));
    let mut variables = vec![
        ("FORKD_URL", url.into()),
        ("FORKD_TOKEN", token.unwrap_or_default().into()),
        ("PATH", std::env::join_paths(directories)?),
        ("PYTHONDONTWRITEBYTECODE", "1".into()),
    ];
    variables.extend(host.environment().map(|(name, value)| (name, value.to_owned())));
    Ok(variables)
}

/// The same for `forkd` itself on that path: it finds the daemon as any `forkd` does.
pub(crate) fn environment_of_forkd(host: &Host) -> Result<Vec<(&'static str, OsString)>> {
    let named = ["FORKD_URL", "FORKD_TOKEN"];
    Ok(environment(host)?.into_iter().filter(|(name, _)| !named.contains(name)).collect())
}

/// The guest's address as one of this host. Until `forkd fork` has made it so, connections to it would go wherever the
/// host's routes lead, and clients take whatever answers there for the agent.
pub(crate) struct GuestAddress {
    added: bool,
    _turn: MutexGuard<'static, ()>,
}

impl GuestAddress {
    /// Adds it unless it is there; one test at a time has it.
    pub(crate) fn add() -> Result<Self> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let there = TcpListener::bind((GUEST_IP, 0)).is_ok();
        if !there {
            run(Command::new("ip").args(["address", "add", GUEST_IP, "dev", "lo"]))
                .context("the published Sandbox dials a fixed address, which only root can give to this host")?;
        }
        Ok(Self { added: !there, _turn: turn })
    }
}

impl Drop for GuestAddress {
    fn drop(&mut self) {
        if self.added {
            let _ = run(Command::new("ip").args(["address", "del", &format!("{GUEST_IP}/32"), "dev", "lo"]));
        }
    }
}

/// A URL that leads to a unix socket, for clients that know none. It lives as long as this program.
fn over_tcp(socket: &Path) -> Result<String> {
    static SERVED: OnceLock<Mutex<Vec<(PathBuf, String)>>> = OnceLock::new();
    let mut served = SERVED.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, url)) = served.iter().find(|(path, _)| path == socket) {
        return Ok(url.clone());
    }
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}", listener.local_addr()?);
    let path = socket.to_owned();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let Ok(daemon) = UnixStream::connect(&path) else { continue };
            let (Ok(client_too), Ok(daemon_too)) = (client.try_clone(), daemon.try_clone()) else { continue };
            thread::spawn(move || {
                carry(client, &daemon);
                let _ = daemon.shutdown(Shutdown::Write);
            });
            thread::spawn(move || {
                carry(daemon_too, &client_too);
                let _ = client_too.shutdown(Shutdown::Write);
            });
        }
    });
    served.push((socket.to_owned(), url.clone()));
    Ok(url)
}

fn carry(mut from: impl Read, mut to: impl Write) {
    // A connection that breaks is its ends' affair.
    let _ = io::copy(&mut from, &mut to);
}

/// Copies a directory's tree, without what was built or installed in it.
pub(crate) fn copy_sources(from: &Path, to: &Path) -> Result<()> {
    const MADE: [&str; 5] = ["node_modules", "dist", "__pycache__", "build", "package-lock.json"];
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from).with_context(|| format!("cannot list {}", from.display()))? {
        let entry = entry?;
        if MADE.iter().any(|made| entry.file_name() == *made) {
            continue;
        }
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_sources(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// Fails unless `said` holds `part`.
pub(crate) fn expect(said: &str, part: &str) -> Result<()> {
    ensure!(said.contains(part), "expected to read {part:?} in:\n{said}");
    Ok(())
}
