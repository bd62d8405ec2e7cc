//! A daemon of a test's own, beside the one that all tests share and on the same host, for what no test may
//! do to the others: fill the disk, take the monitor program away, shoot it.
//!
//! It runs on a file system of its own in memory, or beside the shared daemon's store, and finds the shared
//! daemon's blobs there. It is spoken to in plain HTTP over its socket, by Perl, which every Debian has.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;

use crate::relay::{EXCHANGE, Relays};
use crate::{Host, Snapshot};

/// Makes its directory and its monitor program. Arguments: its directory, the size of its file system if it is
/// to have one, the shared store, the programs.
const PREPARE: &str = r#"
set -eu
dir=$1 size=$2 store=$3 programs=$4
mkdir -p "$dir"
[ -z "$size" ] || mount -t tmpfs -o "size=$size,mode=700" forkd-test "$dir"
mkdir -m 700 "$dir/blobs" "$dir/snapshots"
ln -s "$store"/blobs/* "$dir/blobs/"
cp "$programs/forkd-vmm" "$dir.vmm"
"#;

/// Starts the daemon and prints its process id. Arguments: its directory, the programs, more options.
const START: &str = r#"
FORKD_NETWORK=off setsid "$2/forkd-controller" serve --no-tcp --kill-on-exit --state-dir "$1" --vmm "$1.vmm" \
    --cgroup "/sys/fs/cgroup/${1##*/}" $3 \
    </dev/null >>"$1.log" 2>&1 &
echo $!
"#;

/// Prints the process ids of its monitors. Argument: its directory.
const MONITORS: &str = r#"
for (glob '/proc/[0-9]*') { print "$1\n" if (readlink("$_/exe") // '') eq "$ARGV[0].vmm" && m{(\d+)$} }
"#;

/// Sends a request and shoots the daemon a while later, or when it has answered. Arguments: [`EXCHANGE`], seconds,
/// the process id, and what that is to be called with.
const SHOOT: &str = r#"
exchange=$1 seconds=$2 pid=$3; shift 3
perl -e "$exchange" -e 'exchange(@ARGV)' "$@" >/dev/null 2>&1 &
sleep "$seconds"
kill -9 "$pid"
while kill -0 "$pid" 2>/dev/null; do sleep 0.02; done
wait
"#;

/// Ends it and removes everything. Arguments: its directory, its process id, [`MONITORS`].
const STOP: &str = r#"
kill "$2"
for i in $(seq 100); do kill -0 "$2" 2>/dev/null || break; sleep 0.1; done
# Those of one that was shot and not started again.
kill -9 $(perl -e "$3" "$1") 2>/dev/null
while grep -q " $1" /proc/mounts; do umount -l "$(grep -o " $1[^ ]*" /proc/mounts | tail -n 1 | tr -d ' ')"; done
rm -rf "$1" "$1.vmm" "$1.log"
find "/sys/fs/cgroup/${1##*/}" -depth -type d -exec rmdir {} \; 2>/dev/null
"#;

/// A daemon that ends when this goes out of scope.
#[derive(Debug)]
pub struct Daemon<'a> {
    host: &'a Host,
    directory: String,
    programs: String,
    options: &'static str,
    pid: Mutex<String>,
    relays: Relays,
}

/// What a daemon answered.
#[derive(Debug)]
pub struct Answer {
    /// The status of the answer.
    pub status: u16,
    /// Its body.
    pub body: String,
}

impl Answer {
    /// Its body, if its status is `status`.
    pub fn expect(self, status: u16) -> Result<String> {
        if self.status == status {
            Ok(self.body)
        } else {
            bail!("answered {} instead of {status}: {}", self.status, self.body)
        }
    }

    /// Its body as JSON, if its status is `status`.
    pub fn json<T: DeserializeOwned>(self, status: u16) -> Result<T> {
        let body = self.expect(status)?;
        serde_json::from_str(&body).with_context(|| format!("answered unexpected JSON: {body}"))
    }
}

/// The body of a request.
#[derive(Debug, Clone, Copy)]
pub enum Body<'a> {
    /// As it is.
    Text(&'a str),
    /// The content of a file on the daemon's host.
    File(&'a str),
}

impl<'a> Daemon<'a> {
    /// Starts one whose file system has `size`, in the words of tmpfs: `64m`.
    pub fn start(host: &'a Host, size: &str) -> Result<Self> {
        Self::start_in(host, "/tmp", size, "")
    }

    /// Starts one on the shared daemon's file system, with `snapshot` of that, whose files it shares.
    pub fn start_beside(host: &'a Host, snapshot: &Snapshot) -> Result<Self> {
        Self::start_beside_with(host, snapshot, "")
    }

    /// Like [`start_beside`](Self::start_beside), with more options of `forkd-controller serve`.
    pub fn start_beside_with(host: &'a Host, snapshot: &Snapshot, options: &'static str) -> Result<Self> {
        let store = host.store()?;
        let parent = Path::new(&store).parent().unwrap_or(Path::new("/")).display().to_string();
        let daemon = Self::start_in(host, &parent, "", options)?;
        let (from, to) = (host.directory_of(snapshot)?, format!("{}/snapshots/", daemon.directory));
        host.on_daemon_host(&["cp", "-al", &from, &to])?.success()?;
        Ok(daemon)
    }

    fn start_in(host: &'a Host, parent: &str, size: &str, options: &'static str) -> Result<Self> {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let directory = format!("{parent}/forkd-test-{}-{serial:04}", std::process::id());
        let (store, programs) = (host.store()?, host.programs_of_daemon()?);
        let relays = Relays::to(format!("{directory}/forkd.sock"));
        let daemon = Self { host, directory, programs, options, pid: Mutex::new("0".to_owned()), relays };
        let prepare = ["sh", "-c", PREPARE, "prepare", &daemon.directory, size, &store, &daemon.programs];
        host.on_daemon_host(&prepare)?.success()?;
        daemon.start_again()?;
        Ok(daemon)
    }

    /// Starts it after it was shot.
    pub fn start_again(&self) -> Result<()> {
        let start = ["sh", "-c", START, "start", &self.directory, &self.programs, self.options];
        *self.pid() = self.host.on_daemon_host(&start)?.success()?.trim().to_owned();
        let answers = || Ok(self.call("GET", "/healthz", Body::Text("")).is_ok_and(|answer| answer.status == 200));
        self.host.wait_until("the daemon of the test answers", answers).with_context(|| self.log())
    }

    /// Sends it a request and shoots it `after` that time, whether it has answered or not.
    pub fn shoot(&self, after: Duration, method: &str, target: &str, body: &str) -> Result<()> {
        let (seconds, pid) = (format!("{:.3}", after.as_secs_f64()), self.pid().clone());
        let socket = format!("{}/forkd.sock", self.directory);
        let shoot = ["sh", "-c", SHOOT, "shoot", EXCHANGE, &seconds, &pid, &socket, method, target, "text", body];
        self.host.on_daemon_host(&shoot)?.success().map(drop)
    }

    /// Process ids of all its monitors: of sandboxes, zygotes and snapshot writers.
    pub fn monitors(&self) -> Result<Vec<u32>> {
        let said = self.host.on_daemon_host(&["perl", "-e", MONITORS, &self.directory])?.success()?;
        Ok(said.lines().map(str::parse).collect::<Result<_, _>>()?)
    }

    fn pid(&self) -> MutexGuard<'_, String> {
        self.pid.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its directory, which is a file system.
    pub fn directory(&self) -> &str {
        &self.directory
    }

    /// Lets it also have a snapshot of the shared daemon, to fork and not to change.
    pub fn borrow(&self, snapshot: &Snapshot) -> Result<()> {
        let (from, to) = (self.host.directory_of(snapshot)?, format!("{}/snapshots/{}", self.directory, snapshot.tag));
        let script = r#"mkdir -m 700 "$2" && mount --bind -o ro "$1" "$2""#;
        self.host.on_daemon_host(&["sh", "-c", script, "borrow", &from, &to])?.success().map(drop)
    }

    /// Takes its monitor program away and says where that was.
    pub fn lose_monitor(&self) -> Result<String> {
        let path = format!("{}.vmm", self.directory);
        self.host.on_daemon_host(&["rm", &path])?.success()?;
        Ok(path)
    }

    /// The request that bakes anew what `snapshot` was baked of, as `tag`; steps that warmed it are left out.
    pub fn bake_request(&self, snapshot: &Snapshot, tag: &str) -> Result<serde_json::Value> {
        let path = format!("{}/snapshot.json", self.host.directory_of(snapshot)?);
        let description: serde_json::Value = self.host.on_daemon_host(&["cat", &path])?.json()?;
        Ok(serde_json::json!({
            "tag": tag,
            "disk": description["disks"][0]["base"],
            "kernel": description["kernel"],
            "initramfs": description["initramfs"],
            "boot_timeout_secs": 120,
        }))
    }

    /// Bakes, and returns everything that was told of it, one event a line.
    pub fn bake(&self, request: &serde_json::Value) -> Result<String> {
        let _turn = self.host.turn_to_boot();
        Ok(self.call("POST", "/v1/bakes", Body::Text(&request.to_string()))?.body)
    }

    /// Sends it a request and waits for the whole answer.
    pub fn call(&self, method: &str, target: &str, body: Body<'_>) -> Result<Answer> {
        self.relays.call(self.host, method, target, body)
    }

    /// Fails unless it is well: it answers, and nothing half-made lies in its directory.
    pub fn is_well_and_tidy(&self) -> Result<()> {
        let health = self.call("GET", "/healthz", Body::Text(""))?;
        if health.status != 200 {
            bail!("the daemon is not well: {health:?}");
        }
        let (staging, scratch) = (format!("{}/staging", self.directory), format!("{}/scratch", self.directory));
        let left = self.host.on_daemon_host(&["find", &staging, &scratch, "-mindepth", "1"])?.success()?;
        if !left.is_empty() {
            bail!("this was left behind:\n{left}");
        }
        Ok(())
    }

    /// Puts the local file `path` where the daemon can read it, and says where.
    pub fn receive(&self, path: &std::path::Path) -> Result<String> {
        let target = format!("{}/received", self.directory);
        self.host.copy_to_daemon_host(path, &target)?;
        Ok(target)
    }

    /// What it said about its work.
    fn log(&self) -> String {
        let path = format!("{}.log", self.directory);
        let text = self.host.on_daemon_host(&["cat", &path]).map(|output| output.stdout).unwrap_or_default();
        format!("its log is:\n{text}")
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        // The machine around it may be gone, and then it is too.
        let _ = self.host.on_daemon_host(&["sh", "-c", STOP, "stop", &self.directory, &self.pid(), MONITORS]);
    }
}

impl Host {
    /// Where a snapshot is, on the daemon's host.
    pub fn directory_of(&self, snapshot: &Snapshot) -> Result<String> {
        let found = self.snapshots()?.into_iter().find(|info| info.tag.as_str() == snapshot.tag);
        Ok(found.with_context(|| format!("there is no snapshot {}", snapshot.tag))?.dir)
    }

    /// The store of the shared daemon, on its host.
    pub fn store(&self) -> Result<String> {
        let directory = PathBuf::from(self.directory_of(self.numpy()?)?);
        let store = directory.ancestors().nth(2).context("a snapshot lies in a store's `snapshots`")?;
        Ok(store.display().to_string())
    }

    /// Where the programs under test are for the daemon's host.
    fn programs_of_daemon(&self) -> Result<String> {
        Ok(if self.in_machine()? { "/forkd/bin".to_owned() } else { self.programs().display().to_string() })
    }
}
