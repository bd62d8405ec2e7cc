//! What `--help` says, against golden files. Write them anew with `UPDATE_GOLDEN=1 cargo test -p forkd-cli`.

use std::fs;
use std::path::Path;

use assert_cmd::Command;

const VERBS: [&[&str]; 70] = [
    &[],
    &["quickstart"],
    &["doctor"],
    &["from-image"],
    &["snapshot"],
    &["fork"],
    &["spawn"],
    &["branch"],
    &["checkpoint"],
    &["checkpoints"],
    &["rewind"],
    &["tree"],
    &["events"],
    &["top"],
    &["workspace"],
    &["workspace", "create"],
    &["workspace", "suspend"],
    &["workspace", "resume"],
    &["workspace", "list"],
    &["workspace", "delete"],
    &["timeout"],
    &["suspend"],
    &["ls"],
    &["run"],
    &["exec"],
    &["shell"],
    &["cp"],
    &["files"],
    &["files", "ls"],
    &["files", "stat"],
    &["files", "rm"],
    &["files", "mkdir"],
    &["files", "mv"],
    &["eval"],
    &["ping"],
    &["port-forward"],
    &["kill"],
    &["logs"],
    &["images"],
    &["rmi"],
    &["snapshot-info"],
    &["snapshot-diff"],
    &["snapshot-compact"],
    &["pack"],
    &["unpack"],
    &["pull"],
    &["push"],
    &["verify"],
    &["bench"],
    &["bench", "spawn"],
    &["bench", "api"],
    &["bench", "chain"],
    &["bench", "raw"],
    &["bench", "branch"],
    &["bench", "pack"],
    &["cleanup"],
    &["where"],
    &["kernel"],
    &["kernel", "install"],
    &["machine"],
    &["machine", "start"],
    &["machine", "stop"],
    &["machine", "status"],
    &["machine", "exec"],
    &["machine", "rm"],
    &["mcp"],
    &["env"],
    &["man"],
    &["completions"],
    &["help"],
];

fn help(verb: &[&str]) -> String {
    let mut forkd = Command::cargo_bin("forkd").expect("built with the tests");
    let words = if verb == ["help"] { vec!["help"] } else { [verb, &["--help"]].concat() };
    let output = forkd.env_clear().args(words).output().expect("it runs");
    assert!(output.status.success(), "{verb:?}: {output:?}");
    String::from_utf8(output.stdout).expect("help is text")
}

#[test]
fn help_is_as_reviewed() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/help");
    let mut stale = Vec::new();
    for verb in VERBS {
        let name = if verb.is_empty() { "forkd".to_owned() } else { verb.join("-") };
        let path = directory.join(format!("{name}.txt"));
        let now = help(verb);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&path, &now).expect("the golden files can be written");
        }
        if fs::read_to_string(&path).unwrap_or_default() != now {
            stale.push(format!("--- {} should be\n{now}", path.display()));
        }
    }
    assert!(stale.is_empty(), "run UPDATE_GOLDEN=1 cargo test -p forkd-cli and review:\n{}", stale.join("\n"));
}

#[test]
fn every_verb_has_a_golden_file() {
    let top = help(&[]);
    let listed = top.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    for line in listed {
        let verb = line.split_whitespace().next().expect("a verb");
        assert!(VERBS.iter().any(|known| known.first() == Some(&verb)), "{verb} is missing in VERBS");
    }
}
