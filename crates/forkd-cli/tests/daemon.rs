//! The program against a real daemon's API whose store is empty: what a user sees without any
//! virtual machine.

use std::path::Path;

use assert_cmd::Command;
use assert_cmd::assert::Assert;
use forkd_api::server::ServerLimits;
use forkd_api::{Api, router, server};
use forkd_node::{Node, NodeConfig};
use serde_json::Value;
use tokio::sync::watch;

/// A daemon on a unix socket, as long as this lives.
struct Daemon {
    directory: tempfile::TempDir,
    url: String,
    _stop: watch::Sender<bool>,
}

impl Daemon {
    async fn start() -> Self {
        let directory = tempfile::tempdir().expect("scratch directory");
        let config = NodeConfig::new(directory.path(), Path::new("/nonexistent/forkd-vmm")).expect("a short path");
        let node = Node::start(config).await.expect("an empty node starts");
        let socket = directory.path().join("api.sock");
        let listener = server::listen_unix(&socket, None).await.expect("a free socket");
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(server::serve_unix(
            listener,
            router(Api::new(node), None, None),
            ServerLimits::default(),
            stopped,
        ));
        Self { directory, url: format!("unix://{}", socket.display()), _stop: stop }
    }

    async fn forkd(&self, words: &[&str]) -> Assert {
        let mut forkd = Command::cargo_bin("forkd").expect("built with the tests");
        forkd.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        forkd.env("FORKD_URL", &self.url).env("HOME", self.directory.path()).args(words);
        tokio::task::spawn_blocking(move || forkd.assert()).await.expect("no panic")
    }
}

fn stdout(assert: &Assert) -> String {
    String::from_utf8_lossy(&assert.get_output().stdout).into_owned()
}

fn stderr(assert: &Assert) -> String {
    String::from_utf8_lossy(&assert.get_output().stderr).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_daemon_lists_nothing_and_says_how_to_begin() {
    let daemon = Daemon::start().await;
    let ls = daemon.forkd(&["ls"]).await.success();
    assert_eq!(stdout(&ls), "");
    assert!(stderr(&ls).contains("forkd spawn"), "{}", stderr(&ls));
    let images = daemon.forkd(&["images"]).await.success();
    assert!(stderr(&images).contains("forkd quickstart"), "{}", stderr(&images));
    for verb in ["ls", "images"] {
        let listed = daemon.forkd(&[verb, "--json"]).await.success();
        assert_eq!(stdout(&listed), "[]\n");
        assert_eq!(stderr(&daemon.forkd(&["--quiet", verb]).await.success()), "");
    }
    let kill = daemon.forkd(&["kill", "--all"]).await.success();
    assert!(stderr(&kill).contains("no sandbox to kill"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_said_with_the_next_command() {
    let daemon = Daemon::start().await;
    for (words, says, next) in [
        (&["spawn", "--tag", "none"][..], "none", "try: forkd images"),
        (&["fork", "--tag", "none", "-n", "1"], "none", "try: forkd images"),
        (&["snapshot-info", "none"], "none", "try: forkd images"),
        (&["verify", "none"], "none", "try: forkd images"),
        (&["exec", "sb-1", "--", "true"], "sandbox sb-1 not found", "try: forkd ls"),
        (&["eval", "sb-1", "--", "1"], "sandbox sb-1 not found", "try: forkd ls"),
        (&["ping", "sb-1"], "sandbox sb-1 not found", "try: forkd ls"),
        (&["logs", "sb-1"], "sandbox sb-1 not found", "try: forkd ls"),
        (&["kill", "sb-1"], "1 could not be killed", "try: forkd ls"),
        (&["rmi", "none"], "1 could not be removed", "try: forkd images"),
    ] {
        let assert = daemon.forkd(words).await.code(1);
        let text = stderr(&assert);
        assert!(text.contains(says) && text.contains(next), "{words:?} said: {text}");
    }
    let kill = daemon.forkd(&["kill", "sb-1"]).await;
    assert!(stdout(&kill).starts_with("✗ sb-1  ("), "{}", stdout(&kill));
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_finds_the_daemon_and_prints_json() {
    let daemon = Daemon::start().await;
    let doctor = daemon.forkd(&["doctor", "--json"]).await;
    let report: Value = serde_json::from_str(&stdout(&doctor)).expect("JSON");
    let checks = report["checks"].as_array().expect("checks");
    let check = |name: &str| checks.iter().find(|check| check["name"] == name).cloned().unwrap_or_default();
    assert_eq!(check("daemon")["status"], "pass", "{report:#}");
    assert!(check("daemon")["detail"].as_str().expect("text").contains("unix://"), "{report:#}");
    assert_eq!(check("platform")["status"], "pass");
    let counted = ["pass", "warn", "fail", "skip"].map(|name| report[name].as_u64().expect("a count"));
    assert_eq!(counted.iter().sum::<u64>(), checks.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_not_there_is_said_before_anything_is_fetched() {
    let daemon = Daemon::start().await;
    let rootfs = daemon.directory.path().join("none.ext4");
    let rootfs = rootfs.to_str().expect("text");
    let words = ["snapshot", "--tag", "t", "--kernel", "debian-6.12-cloud", "--rootfs", rootfs];
    let assert = daemon.forkd(&words).await.code(1);
    assert!(stderr(&assert).contains("could not read"), "{}", stderr(&assert));
}
