//! A pack as a stranger may send it: any bytes, any bytes compressed, and a good pack with bytes changed.
#![no_main]

use std::ffi::OsString;
use std::path::Path;
use std::sync::OnceLock;

use forkd_store::Store;
use forkd_store::pack::{Manifest, UnpackOptions};
use libfuzzer_sys::fuzz_target;

const GOOD: &[u8] = include_bytes!("../../crates/forkd-store/fixtures/pack-v1.forkd-snapshot.tar.zst");

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    match kind % 3 {
        0 => take_in(bytes, false),
        1 => take_in(&compress(bytes), false),
        _ => {
            let mut archive = good_archive().to_vec();
            for change in bytes.chunks_exact(4) {
                // What stands at the beginning is the more interesting part, so half of the changes go there.
                let place = u32::from_le_bytes([change[0], change[1], change[2], 0]) as usize;
                let len = if place % 2 == 0 { archive.len() } else { archive.len().min(16 << 10) };
                archive[place / 2 % len] = change[3];
            }
            take_in(&compress(&archive), archive == good_archive());
        }
    }
});

/// Takes in a pack, which must succeed if it is `good`, and leaves the store empty.
fn take_in(pack: &[u8], good: bool) {
    let _ = Manifest::of_pack(pack);
    let store = store();
    let outcome =
        store.unpack(pack, &UnpackOptions::default(), |path| forkd_memory::layer::verify(path, |_| ()), |_| ());
    for dir in ["staging", "arriving"] {
        assert!(names(&store.root().join(dir)).is_empty(), "something was left in {dir}");
    }
    assert!(!good || outcome.is_ok(), "{outcome:?}");
    match outcome {
        Ok(unpacked) => {
            let report = store.verify(&unpacked.tag, |path| forkd_memory::layer::verify(path, |_| ()), |_| ());
            assert!(report.is_ok_and(|report| report.is_good()), "what was taken in is not whole");
            for snapshot in unpacked.snapshots.iter().rev() {
                store.remove(&snapshot.tag).expect("nothing derives from it");
            }
            for blob in store.list_blobs().expect("readable") {
                store.remove_blob(&blob.digest).expect("nothing names it");
            }
        }
        Err(_) => {
            for dir in ["snapshots", "blobs"] {
                assert!(names(&store.root().join(dir)).is_empty(), "something was left in {dir}");
            }
        }
    }
}

fn store() -> &'static Store {
    static STORE: OnceLock<Store> = OnceLock::new();
    STORE.get_or_init(|| {
        // In memory, where flushing costs nothing.
        let shared_memory = Path::new("/dev/shm");
        let parent = if shared_memory.is_dir() { shared_memory.to_owned() } else { std::env::temp_dir() };
        let store = Store::open(&parent.join("forkd-fuzz-pack")).expect("one run at a time");
        // What a run that ended in the middle has left.
        for dir in ["snapshots", "blobs"] {
            for name in names(&store.root().join(dir)) {
                let path = store.root().join(dir).join(name);
                let _ = std::fs::remove_dir_all(&path).or_else(|_| std::fs::remove_file(&path));
            }
        }
        store
    })
}

fn good_archive() -> &'static [u8] {
    static ARCHIVE: OnceLock<Vec<u8>> = OnceLock::new();
    ARCHIVE.get_or_init(|| zstd::decode_all(GOOD).expect("the fixture is sound"))
}

fn compress(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).expect("memory is enough")
}

fn names(dir: &Path) -> Vec<OsString> {
    dir.read_dir().expect("listed").map(|entry| entry.expect("an entry").file_name()).collect()
}
