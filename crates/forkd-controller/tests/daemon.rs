//! The daemon program from outside: starting, being found, refusing a second one, stopping.

mod support;

use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::process::Command;

use support::{PROGRAM, get, serve, start};

#[test]
fn it_serves_on_both_listeners_and_stops_cleanly() {
    let dir = tempfile::tempdir().expect("tempdir");
    let state = dir.path().join("state");
    let token = dir.path().join("token");
    std::fs::write(&token, "0123456789abcdef").expect("write");
    let mut daemon = start(&state, &["--token-file", token.to_str().expect("utf-8")]);
    let address = daemon.address.clone().expect("announced");
    let tcp = || TcpStream::connect(&address).expect("connect");
    let unix = || UnixStream::connect(state.join("forkd.sock")).expect("connect");
    assert_eq!(get(tcp(), "/healthz"), "200");
    assert_eq!(get(tcp(), "/version"), "401");
    assert_eq!(get(unix(), "/version"), "200", "the socket's permissions are enough");

    let second = serve(&state, &[]).output().expect("run");
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success());
    assert!(said.contains("another daemon uses the state directory"), "{said}");
    assert_eq!(get(unix(), "/healthz"), "200", "the first one is unharmed");

    let pid = rustix::process::Pid::from_child(&daemon.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("signal");
    assert!(daemon.child.wait().expect("wait").success());
    assert!(!state.join("forkd.sock").exists());
    drop(daemon);
    start(&state, &[]);
}

#[test]
fn it_starts_again_after_being_killed() {
    let dir = tempfile::tempdir().expect("tempdir");
    drop(start(dir.path(), &[]));
    assert!(dir.path().join("forkd.sock").exists(), "SIGKILL leaves the socket behind");
    let _daemon = start(dir.path(), &[]);
    assert_eq!(get(UnixStream::connect(dir.path().join("forkd.sock")).expect("connect"), "/healthz"), "200");
}

#[test]
fn doors_open_to_other_hosts_and_bad_settings_are_refused() {
    let dir = tempfile::tempdir().expect("tempdir");
    let refusal = |more: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.args(["serve", "--state-dir"]).arg(dir.path().join("state")).args(more);
        command.env("FORKD_VMM", "/bin/true");
        let output = command.env_remove("FORKD_TOKEN_FILE").output().expect("run");
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(refusal(&["--bind", "0.0.0.0:0"]).contains("--token-file"));
    assert!(refusal(&["--bind", "127.0.0.1:0", "--vmm", "/nonexistent/vmm"]).contains("--vmm"));
    assert!(refusal(&["--bind", "127.0.0.1:0", "--token-file", "/nonexistent/token"]).contains("/nonexistent/token"));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = taken.local_addr().expect("address").to_string();
    assert!(refusal(&["--bind", &address]).contains("--bind"));
    assert!(!dir.path().join("state/forkd.db").exists(), "nothing was changed");
}
