//! What was about to become visible when its process ended becomes visible at the next opening.

mod pack_support;

use std::fs;
use std::path::Path;

use forkd_store::Store;
use pack_support::*;

/// What an interrupted process has left when the first `moved` of what it had to move was moved.
fn interrupted(target: &Path, source: &Path, moved: usize) {
    let arriving = target.join("arriving/3-pack");
    for dir in ["snapshots", "blobs"] {
        fs::create_dir_all(arriving.join(dir)).expect("mkdir");
        fs::create_dir_all(target.join(dir)).expect("mkdir");
    }
    let mut record = Vec::new();
    let mut moves = Vec::new();
    for blob in source.join("blobs").read_dir().expect("list") {
        moves.push(format!("blobs/{}", blob.expect("entry").file_name().display()));
    }
    for name in ["base", "one", "two"] {
        let json = fs::read(source.join("snapshots").join(name).join("snapshot.json")).expect("read");
        record.push(format!(r#"{{"tag":"{name}","digest":"blake3:{}"}}"#, blake3::hash(&json).to_hex()));
        moves.push(format!("snapshots/{name}"));
    }
    fs::write(arriving.join("arrival.json"), format!(r#"{{"snapshots":[{}]}}"#, record.join(","))).expect("write");
    for (index, path) in moves.iter().enumerate() {
        let from = source.join(path);
        if index < moved {
            // An earlier one of the name has gone the other way.
            if target.join(path).exists() {
                let _ = fs::remove_dir_all(arriving.join(path));
                fs::rename(target.join(path), arriving.join(path)).expect("rename");
            }
            copy(&from, &target.join(path));
        } else {
            copy(&from, &arriving.join(path));
        }
    }
}

fn copy(from: &Path, to: &Path) {
    if from.is_dir() {
        fs::create_dir(to).expect("mkdir");
        for entry in from.read_dir().expect("list") {
            let entry = entry.expect("entry");
            copy(&entry.path(), &to.join(entry.file_name()));
        }
    } else {
        fs::copy(from, to).expect("copy");
    }
}

#[test]
fn what_was_interrupted_at_any_step_is_finished_at_the_next_opening() {
    let chain = |store: &Store, fill: u8| {
        let base = publish_small(store, "base", fill, None);
        let one = publish_small(store, "one", fill + 1, Some(&base));
        publish_small(store, "two", fill + 2, Some(&one));
    };
    let (_here, source) = store();
    chain(&source, b'a');
    for replaced in [false, true] {
        for moved in 0..=6 {
            let dir = tempfile::tempdir().expect("tempdir");
            let root = dir.path().join("root");
            let store = Store::open(&root).expect("open");
            if replaced {
                chain(&store, b'x');
            }
            drop(store);
            interrupted(&root, source.root(), moved);
            let store = Store::open(&root).expect("open");
            assert!(contents(&store) == contents(&source), "{moved} of 6 steps, replaced: {replaced}");
            assert_eq!(leftovers(&store), 0);
            assert!(is_whole(&store, "two"));
            drop(store);
            Store::open(&root).expect("and again");
        }
    }
}
