//! A writer killed at any instant leaves snapshots and blobs whole or absent.

#![allow(clippy::print_stdout)]

mod support;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use forkd_store::{Listed, Store, StoreError};
use support::{layer_digest, leftovers, publish, staged, tag};

const ROUNDS: u32 = 60;
/// What the writer says when it has the store.
const OPEN: &str = "the writer has the store open";
const ROOT: &str = "FORKD_STORE_CRASH_TEST_ROOT";

/// The part of the killed process. Writes, replaces and removes until it is killed.
#[test]
#[ignore = "run by the test below as a process of its own"]
fn writer() {
    let root = std::env::var_os(ROOT).expect("set by the test that runs this");
    let store = Store::open(Path::new(&root)).expect("open");
    println!("{OPEN}");
    for round in 0u64.. {
        let content = [round.to_le_bytes().as_slice(), &[round as u8; 20_000]].concat();
        let (one, meta) = staged(&store, "replaced", &content);
        store.publish(one, meta, true).expect("replace");
        match publish(&store, "removed", &content, None) {
            Ok(_) | Err(StoreError::AlreadyExists { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        support::blob(&store, &content);
        store.remove(&tag("removed")).expect("remove");
    }
}

#[test]
fn a_killed_writer_leaves_snapshots_whole_or_absent() {
    let dir = tempfile::tempdir().expect("tempdir");
    let root = dir.path().join("root");
    drop(Store::open(&root).expect("make the directories"));
    let (mut swept, mut seen) = (0, 0);
    let started = Instant::now();
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().expect("own path"))
            .args(["--exact", "writer", "--ignored", "--nocapture"])
            .env(ROOT, &root)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("spawn");
        // Every tenth time from its very beginning, else from within its loop; spread by a fixed stride.
        let output = BufReader::new(child.stdout.take().expect("piped"));
        if round % 10 != 0 {
            assert!(output.lines().map_while(Result::ok).any(|line| line.contains(OPEN)), "the writer never began");
        }
        std::thread::sleep(Duration::from_micros(u64::from(round) * 7_919 % 60_000));
        child.kill().expect("kill");
        child.wait().expect("wait");

        swept += root.join("staging").read_dir().expect("list").count();
        let store = Store::open(&root).expect("the lock died with its holder");
        assert_eq!(leftovers(&store), 0);
        for listed in store.list().expect("list") {
            let Listed::Ready { snapshot, .. } = listed else { panic!("round {round}: {listed:?}") };
            let report = store.verify(&snapshot.meta.tag, layer_digest, |_| {}).expect("readable");
            assert!(report.is_good(), "round {round}: {report:?}");
            seen += 1;
        }
        for blob in store.list_blobs().expect("list") {
            let bytes = std::fs::read(root.join("blobs").join(blob.digest.hex())).expect("read");
            assert_eq!(support::digest(&bytes), blob.digest, "round {round}");
        }
    }
    println!("{ROUNDS} kills in {:?}: {swept} leftovers swept, {seen} whole snapshots seen", started.elapsed());
    assert!(swept > 0 && seen > 0, "the kills missed the work: {swept} leftovers, {seen} snapshots");
}
