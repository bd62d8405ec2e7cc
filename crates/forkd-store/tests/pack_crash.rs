//! A process killed while it takes in a pack leaves the whole chain or nothing of it.
//!
//! Alone in its file: a process that is started by another test would inherit the store's lock for a moment.

#![allow(clippy::print_stdout)]

mod pack_support;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use forkd_store::Store;
use forkd_store::pack::UnpackOptions;
use pack_support::*;

const ROUNDS: u64 = 16;
const ROOT: &str = "FORKD_PACK_CRASH_TEST_ROOT";
/// What the process says before each pack.
const BEGINS: &str = "a pack begins";

/// The part of the killed process: takes in a pack over and over.
#[test]
#[ignore = "run by the test below as a process of its own"]
fn unpacker() {
    let root = std::env::var_os(ROOT).expect("set by the test that runs this");
    let root = Path::new(&root);
    let packs = ["one.pack", "other.pack"].map(|name| fs::read(root.with_file_name(name)).expect("read"));
    let store = Store::open(root).expect("open");
    let replace = UnpackOptions { replace: true, ..UnpackOptions::default() };
    for round in 0.. {
        println!("{BEGINS}");
        unpack_with(&store, &packs[round % 2], &replace).expect("unpack");
        if round % 3 == 2 {
            for name in ["two", "one", "base"] {
                store.remove(&tag(name)).expect("remove");
            }
        }
    }
}

#[test]
fn a_killed_process_leaves_whole_chains_only() {
    let dir = tempfile::tempdir().expect("tempdir");
    let root = dir.path().join("root");
    let chains = [1, 100].map(|seed| {
        let (_dir, source) = store();
        let base = publish(&source, "base", seed, None);
        let one = publish(&source, "one", seed + 1, Some(&base));
        publish(&source, "two", seed + 2, Some(&one));
        let mut snapshots = contents(&source);
        snapshots.retain(|path, _| path.starts_with("snapshots/"));
        (pack(&source, "two"), snapshots)
    });
    fs::write(dir.path().join("one.pack"), &chains[0].0).expect("write");
    fs::write(dir.path().join("other.pack"), &chains[1].0).expect("write");
    drop(Store::open(&root).expect("make the directories"));
    let (mut swept, mut finished, mut whole, mut part) = (0, 0, 0, 0);
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().expect("own path"))
            .args(["--exact", "unpacker", "--ignored", "--nocapture"])
            .env(ROOT, &root)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("spawn");
        // Kept open: the process must end by the kill and not by what it says.
        let mut output = BufReader::new(child.stdout.take().expect("piped")).lines().map_while(Result::ok);
        let begun = output.by_ref().filter(|line| line.contains(BEGINS)).take(1 + round as usize % 4).count();
        assert!(begun > 0, "it never began");
        std::thread::sleep(Duration::from_micros(round * 7_919 % 90_000));
        child.kill().expect("kill");
        child.wait().expect("wait");
        let count = |name: &str| root.join(name).read_dir().expect("list").count();
        swept += count("staging");
        finished += count("arriving");
        let store = Store::open(&root).expect("the lock died with its holder");
        assert_eq!(leftovers(&store), 0);
        let mut now = contents(&store);
        now.retain(|path, _| path.starts_with("snapshots/"));
        if chains.iter().any(|(_, chain)| *chain == now) {
            whole += 1;
            assert!(is_whole(&store, "two"));
        } else {
            // Only the removals, which are one snapshot at a time, leave less.
            part += usize::from(!now.is_empty());
            assert!(chains.iter().any(|(_, chain)| now.iter().all(|(path, content)| chain.get(path) == Some(content))));
            assert!(!now.contains_key("snapshots/two/"), "round {round}: {:?}", now.keys());
        }
    }
    println!(
        "{ROUNDS} kills: {swept} swept, {finished} finished at the opening, {whole} whole chains, {part} while removing"
    );
    assert!(swept > 0 && whole > 0, "the kills missed the work");
}
