//! A daemon of a test's own, beside the one that all tests share and on the same host, for what no test may
//! do to the others: fill the disk, take the monitor program away.
//!
//! It runs on a file system of its own in memory and finds the shared daemon's blobs there. It is spoken to in
//! plain HTTP over its socket, by Perl, which every Debian has.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};

use crate::{Host, Snapshot};

/// Starts the daemon and prints its process id. Arguments: its directory, the size of its file system, the
/// shared store, the programs.
const START: &str = r#"
set -eu
dir=$1 size=$2 store=$3 programs=$4
mkdir -p "$dir"
mount -t tmpfs -o "size=$size,mode=700" forkd-test "$dir"
mkdir -m 700 "$dir/blobs" "$dir/snapshots"
ln -s "$store"/blobs/* "$dir/blobs/"
cp "$programs/forkd-vmm" "$dir.vmm"
setsid "$programs/forkd-controller" serve --no-tcp --kill-on-exit --state-dir "$dir" --vmm "$dir.vmm" \
    </dev/null >"$dir.log" 2>&1 &
echo $!
"#;

/// Ends it and removes everything. Arguments: its directory, its process id.
const STOP: &str = r#"
kill "$2"
for i in $(seq 100); do kill -0 "$2" 2>/dev/null || break; sleep 0.1; done
while grep -q " $1" /proc/mounts; do umount -l "$(grep -o " $1[^ ]*" /proc/mounts | tail -n 1 | tr -d ' ')"; done
rm -rf "$1" "$1.vmm" "$1.log"
"#;

/// One exchange. Arguments: socket, method, target, `text` or `file`, and the body or its file.
const CALL: &str = r#"
use IO::Socket::UNIX;
$SIG{PIPE} = 'IGNORE';
my ($path, $method, $target, $kind, $body) = @ARGV;
my $socket = IO::Socket::UNIX->new(Peer => $path) or die "cannot connect to $path: $!\n";
open my $in, '<', $kind eq 'file' ? $body : \$body or die "cannot read $body: $!\n";
my $length = $kind eq 'file' ? -s $in : length $body;
print $socket "$method $target HTTP/1.0\r\nHost: forkd\r\nContent-Type: application/json\r\nContent-Length: $length\r\n\r\n";
while (read $in, my $piece, 65536) { print $socket $piece or last }
print while <$socket>;
"#;

/// A daemon that ends when this goes out of scope.
#[derive(Debug)]
pub struct Daemon<'a> {
    host: &'a Host,
    directory: String,
    pid: String,
}

/// What a daemon answered.
#[derive(Debug)]
pub struct Answer {
    /// The status of the answer.
    pub status: u16,
    /// Its body.
    pub body: String,
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
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let directory = format!("/tmp/forkd-test-{}-{serial:04}", std::process::id());
        let (store, programs) = (host.store()?, host.programs_of_daemon()?);
        let start = ["sh", "-c", START, "start", &directory, size, &store, &programs];
        let pid = host.on_daemon_host(&start)?.success()?.trim().to_owned();
        let daemon = Self { host, directory, pid };
        host.wait_until("the daemon of the test answers", || {
            Ok(daemon.call("GET", "/healthz", Body::Text("")).is_ok_and(|answer| answer.status == 200))
        })
        .with_context(|| daemon.log())?;
        Ok(daemon)
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
        let socket = format!("{}/forkd.sock", self.directory);
        let (kind, body) = match body {
            Body::Text(text) => ("text", text),
            Body::File(path) => ("file", path),
        };
        let said = self.host.on_daemon_host(&["perl", "-e", CALL, &socket, method, target, kind, body])?.success()?;
        let (head, body) = said.split_once("\r\n\r\n").with_context(|| format!("{method} {target}: {said:?}"))?;
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        Ok(Answer { status: status.with_context(|| format!("{method} {target}: {head}"))?, body: body.to_owned() })
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
        let _ = self.host.on_daemon_host(&["sh", "-c", STOP, "stop", &self.directory, &self.pid]);
    }
}

impl Host {
    /// Where a snapshot is, on the daemon's host.
    pub fn directory_of(&self, snapshot: &Snapshot) -> Result<String> {
        let found = self.snapshots()?.into_iter().find(|info| info.tag.as_str() == snapshot.tag);
        Ok(found.with_context(|| format!("there is no snapshot {}", snapshot.tag))?.dir)
    }

    /// The store of the shared daemon, on its host.
    fn store(&self) -> Result<String> {
        let directory = PathBuf::from(self.directory_of(self.numpy()?)?);
        let store = directory.ancestors().nth(2).context("a snapshot lies in a store's `snapshots`")?;
        Ok(store.display().to_string())
    }

    /// Where the programs under test are for the daemon's host.
    fn programs_of_daemon(&self) -> Result<String> {
        Ok(if self.in_machine()? { "/forkd/bin".to_owned() } else { self.programs().display().to_string() })
    }
}
