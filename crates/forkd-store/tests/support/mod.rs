//! Snapshots whose files are small but whose descriptions are true.

#![allow(dead_code, unreachable_pub, clippy::print_stdout, clippy::print_stderr)]

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use forkd_proto::monitor::SnapshotFacts;
use forkd_store::{
    Boot, CpuFacts, MEMORY_LAYER, ParentRef, Result, Snapshot, SnapshotMeta, StagedSnapshot, Store, VMSTATE,
    disk_layer_name,
};
use forkd_types::{Digest, Tag};

/// A tag that the test wrote, so it is legal.
pub fn tag(text: &str) -> Tag {
    text.parse().expect("legal tag")
}

/// BLAKE3 of bytes. In these tests a layer's digest is that of its file.
pub fn digest(bytes: &[u8]) -> Digest {
    Digest::from_bytes(*blake3::hash(bytes).as_bytes())
}

/// Puts bytes into the store as a blob.
pub fn blob(store: &Store, bytes: &[u8]) -> Digest {
    let mut writer = store.stage_blob().expect("stage");
    writer.write_all(bytes).expect("write");
    writer.finish(Some(digest(bytes))).expect("finish")
}

/// Stages a snapshot as a monitor would write it; `content` makes it unlike others.
pub fn staged(store: &Store, name: &str, content: &[u8]) -> (StagedSnapshot, SnapshotMeta) {
    let staged = store.stage(&tag(name)).expect("stage");
    let meta = written(store, &staged, content).expect("write");
    (staged, meta)
}

/// Writes the files of a staged snapshot, and describes them.
pub fn written(store: &Store, staged: &StagedSnapshot, content: &[u8]) -> io::Result<SnapshotMeta> {
    let files = [(VMSTATE.to_owned(), content), (MEMORY_LAYER.to_owned(), b"pages"), (disk_layer_name(0), b"blocks")];
    for (file, bytes) in &files {
        fs::write(staged.path().join(file), bytes)?;
    }
    let facts = SnapshotFacts {
        vcpus: 1,
        memory_bytes: 1 << 29,
        vmstate_digest: digest(content),
        memory_digest: digest(b"pages"),
        memory_pages: 1,
        memory_zero_pages: 0,
        disks: vec![(digest(b"blocks"), 1)],
        disk_numbers: vec![0],
        disk_zero_blocks: vec![0],
        stored_bytes: 0,
    };
    let blob = |bytes: &[u8]| -> io::Result<Digest> {
        let mut writer = store.stage_blob().map_err(io::Error::other)?;
        writer.write_all(bytes)?;
        writer.finish(Some(digest(bytes))).map_err(io::Error::other)
    };
    let boot = boot(blob(b"kernel")?, blob(b"initramfs")?);
    let base = blob(b"disk")?;
    let bytes = staged.vmstate_bytes().map_err(io::Error::other)?;
    Ok(SnapshotMeta::new(staged.tag().clone(), 7, &facts, bytes, &[(base, 1 << 30)], boot))
}

/// What a guest was booted from.
pub fn boot(kernel: Digest, initramfs: Digest) -> Boot {
    Boot {
        kernel,
        initramfs: Some(initramfs),
        kernel_release: "6.12".into(),
        agent_version: "0.1.0".into(),
        guest_cid: 3,
        cpu: CpuFacts::default(),
    }
}

/// Publishes a snapshot; `parent` makes it a child.
pub fn publish(store: &Store, name: &str, content: &[u8], parent: Option<&Snapshot>) -> Result<Snapshot> {
    let (staged, mut meta) = staged(store, name, content);
    meta.parent = parent.map(|parent| ParentRef { tag: parent.meta.tag.clone(), digest: parent.digest });
    store.publish(staged, meta, false)
}

/// How these tests check a layer.
pub fn layer_digest(path: &Path) -> std::io::Result<Digest> {
    Ok(digest(&fs::read(path)?))
}

/// What is left in staging.
pub fn leftovers(store: &Store) -> usize {
    store.root().join("staging").read_dir().expect("list").count()
}

/// Says what a test did.
pub fn note(text: &str) {
    println!("{text}");
}

/// Says that a test could not run, and why.
pub fn skip(why: &str) {
    println!("SKIPPED: {why}");
    eprintln!("SKIPPED: {why}");
}
