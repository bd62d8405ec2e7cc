//! The command line's own errors: no daemon is asked, nothing is started.

use assert_cmd::Command;
use assert_cmd::assert::Assert;

fn forkd(words: &[&str]) -> Assert {
    let home = tempfile::tempdir().expect("scratch directory");
    let mut forkd = Command::cargo_bin("forkd").expect("built with the tests");
    forkd.env_clear().env("HOME", home.path()).args(words).assert()
}

fn stderr(assert: &Assert) -> String {
    String::from_utf8_lossy(&assert.get_output().stderr).into_owned()
}

#[test]
fn a_wrong_command_line_exits_with_two_and_says_what_is_wrong() {
    for (words, says) in [
        (&[][..], "Usage"),
        (&["frobnicate"], "unrecognized subcommand"),
        (&["spawn"], "--tag"),
        (&["spawn", "--tag", "a/b"], "invalid tag"),
        (&["spawn", "--tag", "py", "-n", "0"], "1..=1000"),
        (&["spawn", "--tag", "py", "-n", "1001"], "1..=1000"),
        (&["fork", "--tag", "py", "-n", "1001"], "0..=1000"),
        (&["exec", "sb-1"], "COMMAND"),
        (&["exec", "--", "true"], "no sandbox given"),
        (&["exec", "a b", "--", "true"], "is not a sandbox id"),
        (&["exec", "sb-1", "--target", "h:1", "--", "true"], "cannot be used with"),
        (&["exec", "sb-1", "--env", "A", "--", "true"], "NAME=VALUE"),
        (&["ping"], "no sandbox given"),
        (&["eval", "--", "1"], "no sandbox given"),
        (&["shell"], "SANDBOX"),
        (&["cp", "sb-1:/x"], "DESTINATION"),
        (&["cp", "sb-1:/x", "sb-2:/y"], "one side must be SANDBOX:PATH"),
        (&["cp", "a", "b"], "one side must be SANDBOX:PATH"),
        (&["cp", "sb-1:", "b"], "no path after"),
        (&["fork", "--tag", "py", "-n", "1", "--listen", "8888"], "invalid socket address"),
        (&["run", "--", "true"], "--image"),
        (&["kill"], "--all"),
        (&["kill", "sb-1", "--all"], "cannot be used with"),
        (&["rmi"], "TAG"),
        (&["rmi", "py", "--cascade", "--force"], "cannot be used with"),
        (&["from-image", "debian:bookworm"], "--tag"),
        (&["from-image", "nonsense", "--tag", "t"], "nonsense"),
        (&["from-image", "debian:bookworm", "--tag", "t", "--memory", "64M"], "between 128 MiB and 16 GiB"),
        (&["from-image", "debian:bookworm", "--tag", "t", "--cpus", "9"], "1..=8"),
        (&["from-image", "debian:bookworm", "--tag", "t", "--warm", "python:"], "no source"),
        (&["from-image", "debian:bookworm", "--tag", "t", "--kernel", "/none"], "no such"),
        (&["snapshot", "--tag", "t", "--rootfs", "x"], "--kernel"),
        (&["bench", "raw", "-n", "0"], "1..=1000"),
        (&["bench", "branch", "--raw", "--runs", "0"], "1..=1000"),
        (&["--daemon-url", "ftp://x", "ls"], "write http://HOST:PORT or unix:///PATH"),
        (&["--daemon-url", "https://x", "ls"], "TLS"),
    ] {
        let assert = forkd(words).code(2);
        let text = stderr(&assert);
        assert!(text.contains(says), "{words:?} said: {text}");
    }
}

#[test]
fn an_address_where_nobody_listens_is_said_with_what_to_do() {
    let assert = forkd(&["--daemon-url", "http://127.0.0.1:1", "images"]).code(1);
    let text = stderr(&assert);
    assert!(text.contains("could not connect to the daemon at http://127.0.0.1:1"), "{text}");
    assert!(text.contains("try: forkd-controller serve"), "{text}");
}

#[test]
fn an_agent_that_is_not_there_is_said() {
    let assert = forkd(&["ping", "--target", "127.0.0.1:1"]).code(1);
    assert!(stderr(&assert).contains("could not connect to the agent at 127.0.0.1:1"));
}

#[test]
fn the_data_directory_is_printed() {
    let mut where_ = Command::cargo_bin("forkd").expect("built with the tests");
    where_.env_clear().env("XDG_DATA_HOME", "/x").arg("where").assert().success().stdout("/x/forkd\n");
}

#[test]
fn zero_children_are_forked_without_a_daemon() {
    let assert = forkd(&["fork", "--tag", "py", "-n", "0"]).success();
    let text = String::from_utf8_lossy(&assert.get_output().stdout).into_owned();
    assert_eq!(text.lines().count(), 4, "{text}");
    assert!(text.ends_with("0 / 0 children alive\n"), "{text}");
}

#[test]
fn completions_are_printed_for_every_shell() {
    for shell in ["bash", "zsh", "fish"] {
        let assert = forkd(&["completions", shell]).success();
        assert!(String::from_utf8_lossy(&assert.get_output().stdout).contains("quickstart"), "{shell}");
    }
}

#[test]
fn every_verb_has_a_man_page() {
    let pages = tempfile::tempdir().expect("scratch directory");
    let directory = pages.path().join("man1");
    forkd(&["man", directory.to_str().expect("text")]).success();
    for page in ["forkd.1", "forkd-shell.1", "forkd-files-ls.1", "forkd-machine-start.1"] {
        let text = std::fs::read_to_string(directory.join(page)).expect(page);
        assert!(text.contains(".TH"), "{page}: {text}");
    }
}

#[test]
fn a_clean_host_needs_no_cleaning() {
    let home = tempfile::tempdir().expect("scratch directory");
    let left = home.path().join(".local/share/forkd/cache/scratch/build-1");
    std::fs::create_dir_all(&left).expect("mkdir");
    let hour = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
    std::fs::File::open(&left).and_then(|file| file.set_modified(hour)).expect("set the time");
    let cleanup = |more: &[&str]| {
        let mut forkd = Command::cargo_bin("forkd").expect("built with the tests");
        forkd.env_clear().env("HOME", home.path()).env("TMPDIR", home.path()).arg("cleanup").args(more);
        String::from_utf8_lossy(&forkd.assert().success().get_output().stdout).into_owned()
    };
    let listed = cleanup(&[]);
    assert!(listed.starts_with(&format!("DEL {} ", left.display())), "{listed}");
    assert!(left.exists(), "a dry run removes nothing");
    cleanup(&["--yes"]);
    assert!(!left.exists());
    assert_eq!(cleanup(&[]), "nothing to clean up\n");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let forkd = Command::cargo_bin("forkd").expect("built with the tests");
    let mut child = std::process::Command::new(forkd.get_program())
        .args(["completions", "bash"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("it runs");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}
