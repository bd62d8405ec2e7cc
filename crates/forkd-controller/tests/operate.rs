//! The daemon as its operator has it: tokens, certificate and audit log change while it runs.

mod support;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use support::{Daemon, PROGRAM, get, get_with, start};

fn token(file: &Path, words: &[&str]) -> Result<String, String> {
    let mut command = Command::new(PROGRAM);
    command.arg("token").args(words).arg("--tokens").arg(file).env_remove("FORKD_TOKENS");
    let output = command.output().expect("run");
    match output.status.success() {
        true => Ok(String::from_utf8(output.stdout).expect("text").trim().to_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("utf-8")
}

/// Waits until `status` is what is asked for.
fn becomes(wanted: &str, status: impl Fn() -> String) {
    let until = Instant::now() + Duration::from_secs(10);
    while status() != wanted {
        assert!(Instant::now() < until, "still {} and not {wanted}", status());
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn signal(daemon: &Daemon, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_child(&daemon.child);
    rustix::process::kill_process(pid, signal).expect("signal");
}

#[test]
fn tokens_are_made_rotated_and_revoked_while_the_daemon_runs() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (state, file) = (dir.path().join("state"), dir.path().join("tokens.json"));
    let reader = token(&file, &["create", "reader", "--scope", "read"]).expect("created");
    let daemon = start(&state, &["--tokens", text(&file)]);
    let status = |token: &str, path: &str| get_with(daemon.tcp(), path, token);
    assert_eq!((status(&reader, "/version"), status("", "/version")), ("200".to_owned(), "401".to_owned()));
    assert_eq!(status(&reader, "/v1/sandboxes/sb-1-0000/agent"), "403");

    let spawner = token(&file, &["create", "ci", "--scope", "spawn"]).expect("created");
    becomes("404", || status(&spawner, "/v1/sandboxes/sb-1-0000/agent"));
    let fresh = token(&file, &["rotate", "ci"]).expect("rotated");
    becomes("401", || status(&spawner, "/version"));
    assert_eq!(status(&fresh, "/version"), "200");

    let good = std::fs::read(&file).expect("read");
    std::fs::write(&file, "{ broken").expect("write");
    signal(&daemon, rustix::process::Signal::HUP);
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(status(&fresh, "/version"), "200", "what was known stays in force");
    assert!(token(&file, &["list"]).expect_err("broken").contains("tokens.json"));
    std::fs::write(&file, good).expect("write");
    token(&file, &["revoke", "ci"]).expect("revoked");
    becomes("401", || status(&fresh, "/version"));
    assert_eq!(status(&reader, "/version"), "200");
    let listed = token(&file, &["list", "--json"]).expect("listed");
    assert!(listed.contains(r#""name":"reader","scope":"read""#) && !listed.contains("hash"), "{listed}");
}

#[test]
fn the_single_token_and_named_ones_go_together() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (file, single) = (dir.path().join("tokens.json"), dir.path().join("token"));
    std::fs::write(&single, "0123456789abcdef\n").expect("write");
    let named = token(&file, &["create", "a", "--scope", "admin"]).expect("created");
    let daemon = start(&dir.path().join("state"), &["--tokens", text(&file), "--token-file", text(&single)]);
    assert_eq!(get_with(daemon.tcp(), "/version", "0123456789abcdef"), "200");
    assert_eq!(get_with(daemon.tcp(), "/version", &named), "200");
    let log = || std::fs::read_to_string(dir.path().join("state/audit.log")).expect("log");
    let last = log().lines().last().expect("a line").to_owned();
    assert!(last.contains(r#""token":"a","remote":"127.0.0.1:"#), "{last}");
    assert!(!log().lines().next().expect("a line").contains(r#""token""#));
}

#[test]
fn an_audit_log_that_was_moved_away_is_opened_anew_and_a_large_one_set_aside() {
    let dir = tempfile::tempdir().expect("tempdir");
    let log = dir.path().join("audit.log");
    let state = dir.path().join("state");
    let daemon = start(&state, &["--audit-log", text(&log), "--audit-max-size", "2000", "--audit-keep", "1"]);
    assert_eq!(get(daemon.tcp(), "/version"), "200");
    std::fs::rename(&log, dir.path().join("moved")).expect("rename");
    signal(&daemon, rustix::process::Signal::HUP);
    becomes("true", || log.exists().to_string());
    assert_eq!(get(UnixStream::connect(state.join("forkd.sock")).expect("connect"), "/readyz"), "200");
    let line = std::fs::read_to_string(&log).expect("log");
    assert!(line.contains(r#""path":"/readyz""#) && line.contains(r#""remote":"uid "#), "{line}");
    for _ in 0..40 {
        assert_eq!(get(daemon.tcp(), "/version"), "200");
    }
    assert!(std::fs::metadata(&log).expect("log").len() <= 2000);
    assert!(dir.path().join("audit.log.1").exists() && !dir.path().join("audit.log.2").exists());
}

#[test]
fn settings_that_cannot_go_together_are_refused_in_words() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = |name: &str| dir.path().join(name).to_str().expect("utf-8").to_owned();
    let refusal = |more: &[&str]| {
        let output = support::serve(&dir.path().join("state"), more).output().expect("run");
        assert!(!output.status.success(), "{more:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    std::fs::write(path("open.json"), r#"{"version":1,"tokens":[]}"#).expect("write");
    std::fs::write(path("empty.pem"), "").expect("write");
    for (more, says) in [
        (vec!["--tls-cert", "/c"], "--tls-key"),
        (vec!["--tls-key", "/k"], "--tls-cert"),
        (vec!["--no-tcp", "--tls-cert", "/c", "--tls-key", "/k"], "--no-tcp"),
        (vec!["--tls-cert", &path("empty.pem"), "--tls-key", "/k"], "no certificate"),
        (vec!["--tokens", &path("none.json")], "token create"),
        (vec!["--tokens", &path("open.json")], "chmod 0600"),
        (vec!["--branch-concurrency", "0"], "at least 1"),
        (vec!["--rate-limit", "much"], "50/s"),
        (vec!["--socket-group", "no-such-group"], "no-such-group"),
        (vec!["--audit-log", "/proc/nothing/audit.log"], "audit log"),
    ] {
        let said = refusal(&more);
        assert!(said.contains(says), "{more:?}: {said}");
    }
    assert!(!dir.path().join("state/forkd.db").exists(), "nothing was changed");
}
