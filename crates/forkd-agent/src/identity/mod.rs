//! Who this copy is.
//!
//! A copy of a machine wakes up with its source's name, clock and randomness. Taking on an identity
//! replaces them. It is on the path of every spawn, so it makes no process, writes to no disk (the files
//! lie in memory, see `boot`), and rewrites only what differs; the warm runtimes are reseeded side by side.

mod entropy;
pub mod hooks;
pub mod seed;

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use forkd_proto::agent::{Failure, Identity};
use rustix::time::{ClockId, Timespec};

use crate::agent::{Agent, Role};
use crate::runtimes::Reseed;
use crate::{failure, poison};

/// Where programs find the sandbox's id.
pub const SANDBOX_ID_FILE: &str = "/run/forkd/sandbox-id";
/// Mounted over the kernel's own boot id, which cannot be changed.
pub const BOOT_ID_FILE: &str = "/run/forkd/boot-id";
/// Programs that run after a fork.
pub const HOOKS: &str = "/etc/forkd/post-fork.d";

/// How long after a reset connection an identity may come that explains it.
pub const RESET_PATIENCE: Duration = Duration::from_secs(5);

const HOOK_LIMIT: Duration = Duration::from_secs(5);
/// Clocks closer than this are left alone.
const CLOCK_TOLERANCE_NS: u64 = 1_000_000;

/// The identity last taken on.
#[derive(Debug, Default)]
pub struct CurrentIdentity {
    sandbox_id: Mutex<String>,
    /// Held while an identity is taken on, so that two are never mixed.
    changing: Mutex<()>,
    /// How often one was taken on.
    taken: Mutex<u64>,
    taken_again: Condvar,
}

impl CurrentIdentity {
    /// The sandbox's id, empty before the first identity.
    pub fn sandbox_id(&self) -> String {
        poison::lock(&self.sandbox_id).clone()
    }

    /// How many identities were taken on so far. A machine that is copied takes on another, so a
    /// number that has changed since means that this machine is a copy.
    pub fn count(&self) -> u64 {
        *poison::lock(&self.taken)
    }

    /// Waits for an identity after the first `count`; false when none comes in time.
    ///
    /// A copy wakes up with all its connections reset, and is told who it is a moment later. Whoever
    /// finds a connection reset asks here whether its client went away or was never this machine's.
    pub fn changes(&self, count: u64, patience: Duration) -> bool {
        let taken = poison::lock(&self.taken);
        let waited = self.taken_again.wait_timeout_while(taken, patience, |taken| *taken == count);
        *waited.unwrap_or_else(PoisonError::into_inner).0 != count
    }
}

/// Takes on `identity`; returns what could not be done. Nothing is done when a part of it is malformed.
pub fn take_on(agent: &Agent, identity: &Identity) -> Result<Vec<String>, Failure> {
    let seed = check(identity)?;
    let _changing = poison::lock(&agent.identity.changing);
    let mut warnings = Vec::new();
    if agent.role == Role::Init {
        let mut attempt = |what: &str, done: io::Result<()>| {
            if let Err(error) = done {
                warnings.push(format!("{what}: {error}"));
            }
        };
        attempt("the kernel's generator was not reseeded", entropy::credit(&seed));
        attempt("the clock was not set", set_clock(identity.wall_clock_ns));
        attempt(
            "the host name was not set",
            rustix::system::sethostname(identity.hostname.as_bytes()).map_err(Into::into),
        );
        let line = format!("{}\n", identity.hostname);
        attempt("/etc/hostname was not written", overwrite_existing(Path::new("/etc/hostname"), &line));
        let line = format!("{}\n", identity.machine_id);
        attempt("/etc/machine-id was not written", write_in_place(Path::new("/etc/machine-id"), &line, 0o444));
        let line = format!("{}\n", seed::uuid(&seed::derive(&seed, "boot id")));
        attempt("the boot id was not changed", overwrite_existing(Path::new(BOOT_ID_FILE), &line));
        let line = format!("{}\n", identity.sandbox_id);
        attempt("the sandbox id was not written", write_in_place(Path::new(SANDBOX_ID_FILE), &line, 0o644));
    }
    agent.environment.set("FORKD_SANDBOX_ID", &identity.sandbox_id);
    poison::lock(&agent.identity.sandbox_id).clone_from(&identity.sandbox_id);
    *poison::lock(&agent.identity.taken) += 1;
    agent.identity.taken_again.notify_all();
    let reseed = Reseed { seed: &seed, sandbox_id: &identity.sandbox_id };
    warnings.extend(agent.runtimes.reseed(&reseed));
    if agent.role == Role::Init {
        let environment = [("FORKD_HOSTNAME".to_owned(), identity.hostname.clone())];
        warnings.extend(hooks::executables(Path::new(HOOKS)).iter().filter_map(|hook| {
            hooks::run(&agent.reaper, hook, agent.environment.with(&environment), Some(HOOK_LIMIT)).err()
        }));
    }
    Ok(warnings)
}

/// The seed, if every part of `identity` is well formed.
fn check(identity: &Identity) -> Result<[u8; seed::SEED_LEN], Failure> {
    let Identity { sandbox_id, hostname, machine_id, .. } = identity;
    let plain = |text: &str, more: &str| {
        !text.is_empty() && text.len() <= 64 && text.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c))
    };
    if !plain(sandbox_id, "-_") {
        return Err(failure::invalid(format!("{sandbox_id:?} is not a sandbox id: 1 to 64 of A-Z a-z 0-9 - _")));
    }
    if !plain(hostname, "-.") || hostname.starts_with(['-', '.']) {
        return Err(failure::invalid(format!("{hostname:?} is not a host name: 1 to 64 of A-Z a-z 0-9 - .")));
    }
    if machine_id.len() != 32 || !machine_id.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f')) {
        return Err(failure::invalid(format!("{machine_id:?} is not a machine id: 32 lower-case hex digits")));
    }
    seed::from_hex(&identity.seed).and_then(|seed| seed.try_into().ok()).ok_or_else(|| {
        failure::invalid(format!(
            "the seed must be {} bytes as hex digits, it has {} characters",
            seed::SEED_LEN,
            identity.seed.len()
        ))
    })
}

/// Sets the wall clock when it is off; the monotonic clock is not touched by this.
fn set_clock(unix_ns: u64) -> io::Result<()> {
    let now = rustix::time::clock_gettime(ClockId::Realtime);
    let now_ns = u64::try_from(i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)).unwrap_or(0);
    if now_ns.abs_diff(unix_ns) <= CLOCK_TOLERANCE_NS {
        return Ok(());
    }
    let time = Timespec {
        tv_sec: i64::try_from(unix_ns / 1_000_000_000).expect("a u64 of nanoseconds is 585 years of seconds"),
        tv_nsec: (unix_ns % 1_000_000_000) as i64,
    };
    Ok(rustix::time::clock_settime(ClockId::Realtime, time)?)
}

/// [`write_in_place`], unless there is no such file.
fn overwrite_existing(path: &Path, text: &str) -> io::Result<()> {
    if fs::exists(path)? { write_in_place(path, text, 0o644) } else { Ok(()) }
}

/// Makes `text` the contents of `path`.
///
/// Not by truncation first: closing a file that was truncated to nothing makes ext4 write it out at
/// once. Not by renaming: the file may be mounted over another, or be the target of a symbolic link.
pub fn write_in_place(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(false).mode(mode).open(path)?;
    file.write_all(text.as_bytes())?;
    let len = text.len() as u64;
    if file.metadata()?.len() != len {
        file.set_len(len)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            sandbox_id: "sb-1-0001".into(),
            hostname: "sb-1-0001".into(),
            machine_id: "0123456789abcdef0123456789abcdef".into(),
            seed: "ab".repeat(64),
            wall_clock_ns: 0,
        }
    }

    #[test]
    fn malformed_identities_are_refused() {
        assert_eq!(check(&identity()).expect("well formed"), [0xab; 64]);
        let spoil: [fn(&mut Identity); 7] = [
            |identity| identity.sandbox_id.clear(),
            |identity| identity.sandbox_id.push('/'),
            |identity| identity.hostname = "-a".into(),
            |identity| identity.hostname = "x".repeat(65),
            |identity| identity.machine_id = identity.machine_id.to_uppercase(),
            |identity| identity.seed.truncate(126),
            |identity| identity.seed.replace_range(..1, "g"),
        ];
        for spoil in spoil {
            let mut spoilt = identity();
            spoil(&mut spoilt);
            assert!(check(&spoilt).is_err(), "{spoilt:?}");
        }
    }

    #[test]
    fn a_new_identity_wakes_who_waits_for_it() {
        let identity = CurrentIdentity::default();
        assert!(!identity.changes(0, Duration::from_millis(10)));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| identity.changes(0, Duration::from_secs(20)));
            *poison::lock(&identity.taken) += 1;
            identity.taken_again.notify_all();
            assert!(waiting.join().expect("no panic"));
        });
        assert!(identity.changes(0, Duration::ZERO) && !identity.changes(1, Duration::ZERO));
    }

    #[test]
    fn files_are_rewritten_whatever_their_length() {
        let root = tempfile::tempdir().expect("tempdir");
        let path = root.path().join("id");
        for text in ["first\n", "a longer one\n", "x\n"] {
            write_in_place(&path, text, 0o644).expect("written");
            assert_eq!(fs::read_to_string(&path).expect("read"), text);
        }
        overwrite_existing(&root.path().join("absent"), "x").expect("nothing to do");
        assert!(!root.path().join("absent").exists());
    }

    #[test]
    fn executables_come_in_name_order() {
        use std::os::unix::fs::PermissionsExt;
        let root = tempfile::tempdir().expect("tempdir");
        for (name, mode) in [("20-b", 0o755), ("10-a", 0o755), ("15-plain", 0o644)] {
            let path = root.path().join(name);
            fs::write(&path, "").expect("write");
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
        }
        assert_eq!(hooks::executables(root.path()), ["10-a", "20-b"].map(|name| root.path().join(name)));
        assert!(hooks::executables(Path::new("/nonexistent")).is_empty());
    }
}
