//! Blobs: what goes in comes out, once.

mod support;

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use forkd_store::{Store, StoreError};
use support::{blob, digest, leftovers, skip};

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = Store::open(&dir.path().join("root")).expect("open");
    (dir, store)
}

#[test]
fn the_same_content_is_stored_once_and_read_back() {
    let (_dir, store) = store();
    let bytes = b"a kernel".repeat(100_000);
    let one = blob(&store, &bytes);
    assert_eq!(blob(&store, &bytes), one);
    assert_eq!(store.list_blobs().expect("list").len(), 1);
    let mut found = store.blob(&one).expect("blob").expect("there");
    assert_eq!(found.size, bytes.len() as u64);
    assert!(found.path.ends_with(format!("blobs/{}", one.hex())));
    let mut back = Vec::new();
    found.file.read_to_end(&mut back).expect("read");
    assert!(back == bytes);
    assert!(store.blob(&digest(b"other")).expect("blob").is_none());
    assert_eq!(leftovers(&store), 0);
}

#[test]
fn content_other_than_announced_is_not_kept() {
    let (_dir, store) = store();
    let mut writer = store.stage_blob().expect("stage");
    writer.write_all(b"tampered").expect("write");
    assert_eq!(writer.written(), 8);
    let error = writer.finish(Some(digest(b"announced"))).expect_err("mismatch");
    assert!(matches!(error, StoreError::DigestMismatch { actual, .. } if actual == digest(b"tampered")));
    drop(store.stage_blob().expect("stage"));
    assert_eq!(store.list_blobs().expect("list"), []);
    assert_eq!(leftovers(&store), 0);
}

/// A file with data at both ends and a hole between, and its content.
fn sparse_file(path: &Path) -> Vec<u8> {
    let mut file = File::create(path).expect("create");
    file.write_all(b"beginning").expect("write");
    file.seek(SeekFrom::Start(50 << 20)).expect("seek");
    file.write_all(b"end").expect("write");
    file.set_len((60 << 20) + 1).expect("length");
    fs::read(path).expect("read")
}

fn imports(dir: &Path, store: &Store) -> u64 {
    let path = dir.join("disk.ext4");
    let content = sparse_file(&path);
    let imported = store.import_file(&path).expect("import");
    assert_eq!(imported, digest(&content));
    assert_eq!(store.import_file(&path).expect("again"), imported);
    let blob = store.blob(&imported).expect("blob").expect("there");
    assert!(fs::read(&blob.path).expect("read") == content);
    fs::write(&path, "changed afterwards").expect("write");
    assert!(fs::read(&blob.path).expect("read") == content, "the blob is a copy");
    assert_eq!(leftovers(store), 0);
    blob.file.metadata().expect("stat").blocks() * 512
}

#[test]
fn files_are_imported_with_their_holes() {
    let (dir, store) = store();
    let stored = imports(dir.path(), &store);
    assert!(stored < 1 << 20, "{stored} bytes on disk");
    assert!(store.import_file(&dir.path().join("none")).is_err());
}

#[test]
fn files_are_imported_by_reflink_where_there_is_one() {
    let dir = tempfile::tempdir().expect("tempdir");
    let image = dir.path().join("btrfs.img");
    let at = dir.path().join("mounted");
    fs::create_dir(&at).expect("mkdir");
    let made = File::create(&image).and_then(|file| file.set_len(256 << 20)).is_ok()
        && run("mkfs.btrfs", &["-q", &image.display().to_string()])
        && run("mount", &["-o", "loop", &image.display().to_string(), &at.display().to_string()]);
    if !made {
        return skip("cannot make and mount a btrfs (needs root, btrfs-progs and loop devices)");
    }
    let store = Store::open(&at.join("root")).expect("open");
    imports(&at, &store);
    // Sharing shows in what is left: a real copy of this would take it all again.
    let big = at.join("big");
    fs::write(&big, vec![7; 64 << 20]).expect("write");
    let free = || {
        File::open(&at).and_then(|dir| Ok(rustix::fs::syncfs(dir)?)).expect("sync");
        store.free_bytes().expect("statvfs")
    };
    let before = free();
    store.import_file(&big).expect("import");
    assert!(before.saturating_sub(free()) < 16 << 20, "{before} bytes were free, then {}", free());
    drop(store);
    assert!(run("umount", &[&at.display().to_string()]));
}

#[test]
fn a_full_disk_is_told_as_such_and_the_store_stays_usable() {
    let dir = tempfile::tempdir().expect("tempdir");
    let at = dir.path().join("small");
    fs::create_dir(&at).expect("mkdir");
    if !run("mount", &["-t", "tmpfs", "-o", "size=4m", "tmpfs", &at.display().to_string()]) {
        return skip("cannot mount a tmpfs (needs root)");
    }
    let store = Store::open(&at.join("root")).expect("open");
    let kept = support::publish(&store, "kept", b"kept", None).expect("publish");
    let mut writer = store.stage_blob().expect("stage");
    let full = (0..16).map(|index| writer.write_all(&[index + 1; 1 << 20])).find_map(Result::err);
    let full = full.expect("4 MiB are full");
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    assert!(full.to_string().contains(&at.display().to_string()), "{full}");
    assert!(writer.finish(None).is_err(), "a torn blob never finishes");

    let big = dir.path().join("big");
    fs::write(&big, vec![1; 8 << 20]).expect("write");
    let error = store.import_file(&big).expect_err("full");
    assert_eq!(error.code(), "no_space", "{error}");
    assert!(error.to_string().contains("staging"), "{error}");

    // A snapshot that does not fit: its files fill the disk, so its description does not go in.
    let staged = {
        let (staged, meta) = support::staged(&store, "torn", b"state");
        let mut filler = File::create(at.join("filler")).expect("create");
        while filler.write_all(&[1; 4096]).is_ok() {}
        let error = store.publish(staged, meta, false).expect_err("full");
        assert_eq!(error.code(), "no_space", "{error}");
        fs::remove_file(at.join("filler")).expect("remove");
        leftovers(&store)
    };
    assert_eq!(staged, 0);
    assert_eq!(store.list().expect("list").len(), 1);
    assert_eq!(store.get(&kept.meta.tag).expect("get"), kept);
    support::publish(&store, "after", b"after", None).expect("there is room again");
    drop(store);
    assert!(run("umount", &[&at.display().to_string()]));
}

fn run(program: &str, arguments: &[&str]) -> bool {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    Command::new(program).args(arguments).env("PATH", path).status().is_ok_and(|status| status.success())
}
