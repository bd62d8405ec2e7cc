//! The host under test: where the programs are, and what has been prepared on it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use forkd_types::rest::{SandboxInfo, SnapshotInfo, SpawnReport};

use crate::{Output, Sandbox};

/// Names the directory with the programs under test.
const BIN_DIR: &str = "FORKD_BIN_DIR";
/// Environment variable that names the directory of the tests' data, the machine among it.
const DATA_DIR: &str = "FORKD_TESTKIT_DATA";
/// The root disk of the tests: Python and numpy, as in the quick start.
pub const NUMPY_DISK: &str = "debian:bookworm?include=python3-numpy";
/// Seconds that a guest may take until its agent answers: several times what the slowest needs.
const BOOT_TIMEOUT: &str = "90";
/// The snapshot made of it.
const NUMPY_TAG: &str = "testkit-numpy";

/// The programs under test with a data directory of their own.
#[derive(Debug)]
pub struct Host {
    forkd: PathBuf,
    data: PathBuf,
    numpy: OnceLock<Snapshot>,
    baking: Mutex<()>,
    booting: Mutex<()>,
}

/// A snapshot to spawn from.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Its tag.
    pub tag: String,
}

impl Host {
    /// The one host of this test run.
    ///
    /// Its data directory, `target/testkit`, is kept between runs: downloaded kernels and built disks
    /// are reused, snapshots are made anew by each program under test.
    pub fn shared() -> Result<&'static Self> {
        static SHARED: OnceLock<std::result::Result<Host, String>> = OnceLock::new();
        SHARED
            .get_or_init(|| Self::find().map_err(|error| format!("{error:#}")))
            .as_ref()
            .map_err(|error| anyhow::anyhow!("{error}"))
    }

    fn find() -> Result<Self> {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize()?;
        let bin = std::env::var_os(BIN_DIR).map_or_else(|| workspace.join("target/forkd"), PathBuf::from);
        let forkd = bin.join("forkd");
        if !forkd.is_file() {
            bail!("{} does not exist; `make build` makes it, or set {BIN_DIR}", forkd.display());
        }
        let data = std::env::var_os(DATA_DIR).map_or_else(|| workspace.join("target/testkit"), PathBuf::from);
        std::fs::create_dir_all(&data)?;
        Ok(Self { forkd, data, numpy: OnceLock::new(), baking: Mutex::default(), booting: Mutex::default() })
    }

    /// What is kept between runs.
    pub(crate) fn data(&self) -> &Path {
        &self.data
    }

    /// The directory of the programs under test.
    pub fn programs(&self) -> &Path {
        self.forkd.parent().unwrap_or(Path::new("/"))
    }

    /// Environment that makes `forkd` use this host's data directory.
    pub fn environment(&self) -> [(&'static str, &std::ffi::OsStr); 1] {
        [("XDG_DATA_HOME", self.data.as_os_str())]
    }

    /// A `forkd` command to be run; its standard input is empty unless that is changed.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.forkd);
        command.args(arguments).envs(self.environment()).stdin(Stdio::null());
        for name in ["FORKD_URL", "FORKD_TOKEN"] {
            command.env_remove(name);
        }
        command
    }

    /// Runs `forkd` and collects what it says.
    pub fn forkd(&self, arguments: &[&str]) -> Result<Output> {
        let command = format!("forkd {}", arguments.join(" "));
        let child = self
            .command(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", self.forkd.display()))?;
        crate::patience::output(child, command)
    }

    /// Runs a program on the host of the daemon: in the machine if there is one, else here.
    pub fn on_daemon_host(&self, command: &[&str]) -> Result<Output> {
        if self.in_machine()? {
            let mut arguments = vec!["machine", "exec", "--"];
            arguments.extend(command);
            return self.forkd(&arguments);
        }
        let output = self.command_on_daemon_host(command)?.stdin(Stdio::null()).output()?;
        Ok(Output::new(command.join(" "), output.status, output.stdout, output.stderr))
    }

    /// A program to be run on the host of the daemon, which gets the standard input that it is given.
    pub(crate) fn command_on_daemon_host(&self, command: &[&str]) -> Result<Command> {
        if self.in_machine()? {
            return Ok(self.command(&[&["machine", "exec", "-i", "--"], command].concat()));
        }
        let (program, arguments) = command.split_first().context("no program given")?;
        let mut command = Command::new(program);
        command.args(arguments);
        Ok(command)
    }

    /// Copies the local file `from` to `to` on the daemon's host.
    pub fn copy_to_daemon_host(&self, from: &Path, to: &str) -> Result<()> {
        if !self.in_machine()? {
            std::fs::copy(from, to).with_context(|| format!("cannot copy {} to {to}", from.display()))?;
            return Ok(());
        }
        let command = ["machine", "exec", "-i", "--", "sh", "-c", "cat > \"$0\"", to];
        let file = std::fs::File::open(from).with_context(|| format!("cannot open {}", from.display()))?;
        let child = self.command(&command).stdin(file).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        crate::patience::output(child, format!("forkd {}", command.join(" ")))?.success().map(drop)
    }

    /// Whether the daemon runs inside `forkd machine`.
    pub fn in_machine(&self) -> Result<bool> {
        Ok(self.data.join("forkd/machine/default").is_dir())
    }

    /// The snapshot with numpy imported, made on first use.
    pub fn numpy(&self) -> Result<&Snapshot> {
        let _one_at_a_time = self.baking.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(snapshot) = self.numpy.get() {
            return Ok(snapshot);
        }
        let snapshot = self.bake_numpy().context("the snapshot all tests use could not be made")?;
        Ok(self.numpy.get_or_init(|| snapshot))
    }

    fn bake_numpy(&self) -> Result<Snapshot> {
        // A snapshot that other programs made is not what is tested.
        let (made_by, programs) = (self.data.join("made-by"), self.fingerprint()?);
        self.forkd(&["kill", "--all"])?;
        let usable = |info: &SnapshotInfo| info.tag.as_str() == NUMPY_TAG && info.bootable;
        if std::fs::read_to_string(&made_by).is_ok_and(|by| by == programs) && self.snapshots()?.iter().any(usable) {
            return Ok(Snapshot { tag: NUMPY_TAG.to_owned() });
        }
        let snapshot = self.bake(NUMPY_TAG, &["--replace", "--warm", "import numpy, random"])?;
        std::fs::write(made_by, programs)?;
        Ok(snapshot)
    }

    /// Tells one build of the programs from another.
    fn fingerprint(&self) -> Result<String> {
        let mut lines = String::new();
        for name in ["forkd", "forkd-controller", "forkd-vmm", "forkd-agent"] {
            let metadata = self.programs().join(name).metadata().with_context(|| format!("{name} is missing"))?;
            lines.push_str(&format!("{name} {} {:?}\n", metadata.len(), metadata.modified()?));
        }
        Ok(lines)
    }

    /// Bakes the numpy disk into the snapshot `tag` with further options of `from-image`.
    pub fn bake(&self, tag: &str, options: &[&str]) -> Result<Snapshot> {
        self.bake_of(NUMPY_DISK, tag, options)
    }

    /// Bakes the disk `source` into the snapshot `tag` with further options of `from-image`.
    pub fn bake_of(&self, source: &str, tag: &str, options: &[&str]) -> Result<Snapshot> {
        let mut arguments = vec!["from-image", source, "--tag", tag, "--boot-timeout-secs", BOOT_TIMEOUT];
        arguments.extend(options);
        let _turn = self.turn_to_boot();
        self.forkd(&arguments)?.success()?;
        Ok(Snapshot { tag: tag.to_owned() })
    }

    /// Kernels that boot at the same time are what the translated machine dies of most often.
    pub(crate) fn turn_to_boot(&self) -> MutexGuard<'_, ()> {
        self.booting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forks `n` children, all of which must come up.
    pub fn spawn(&self, snapshot: &Snapshot, n: u32) -> Result<Vec<Sandbox<'_>>> {
        self.collect_children(n, &["spawn", "--tag", &snapshot.tag, "-n", &n.to_string(), "--json"])
    }

    /// Runs a `forkd` command that makes `n` sandboxes, all of which must come up.
    pub(crate) fn collect_children(&self, n: u32, command: &[&str]) -> Result<Vec<Sandbox<'_>>> {
        let report: SpawnReport = self.forkd(command)?.json()?;
        let sandboxes: Vec<_> = report.sandboxes.into_iter().map(|info| self.adopt(info)).collect();
        if sandboxes.len() != n as usize {
            bail!("{} of {n} children came up; failures: {:?}", sandboxes.len(), report.failures);
        }
        Ok(sandboxes)
    }

    /// A sandbox that a test made by hand; it is killed when it goes out of scope.
    pub fn adopt(&self, info: SandboxInfo) -> Sandbox<'_> {
        Sandbox::new(self, info)
    }

    /// Bakes as [`Self::bake_of`] does, spawns one copy, asks it, and removes the snapshot.
    pub fn once(
        &self,
        source: &str,
        tag: &str,
        options: &[&str],
        ask: impl Fn(&Sandbox<'_>) -> Result<()>,
    ) -> Result<()> {
        // First, because a run of new programs clears away what older ones left.
        self.numpy()?;
        let options = [&["--replace"], options].concat();
        let snapshot = self.bake_of(source, tag, &options)?;
        let outcome = self.spawn_one(&snapshot).and_then(|sandbox| ask(&sandbox));
        self.forkd(&["rmi", tag])?.success()?;
        outcome
    }

    /// The snapshot `tag`, to be spawned from; whether it is there is found then.
    pub fn snapshot(&self, tag: &str) -> Snapshot {
        Snapshot { tag: tag.to_owned() }
    }

    /// Forks one child.
    pub fn spawn_one(&self, snapshot: &Snapshot) -> Result<Sandbox<'_>> {
        Ok(self.spawn(snapshot, 1)?.remove(0))
    }

    /// All sandboxes there are.
    pub fn sandboxes(&self) -> Result<Vec<SandboxInfo>> {
        self.forkd(&["ls", "--json"])?.json()
    }

    /// All snapshots there are.
    pub fn snapshots(&self) -> Result<Vec<SnapshotInfo>> {
        self.forkd(&["images", "--json"])?.json()
    }

    /// Waits until `condition` holds; `what` is for the message when it never does.
    pub fn wait_until(&self, what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(60);
        while !condition()? {
            if Instant::now() > end {
                bail!("waited a minute in vain until {what}");
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    }
}
