//! Verification finds damage of any kind, anywhere, in every file of a snapshot.

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use forkd_memory::LayerWriter;
use forkd_memory::layer::{self, DATA_OFFSET};
use forkd_proto::monitor::SnapshotFacts;
use forkd_store::{
    DiskLayer, MEMORY_LAYER, MemoryLayer, ParentRef, SNAPSHOT_JSON, Snapshot, SnapshotMeta, StagedSnapshot, Store,
    StoreError, VMSTATE, disk_layer_name,
};
use forkd_types::{Digest, PAGE_SIZE, PageCount, PageRun};
use support::{blob, digest, tag};

const PAGES: u64 = 64;
/// Not a whole number of the blocks in which files are read.
const BLOB: usize = (96 << 10) + 77;

/// A layer in which `stored` pages are filled and `zero` is zero.
fn write_layer(path: &Path, stored: &[u64], zero: &[u64]) -> Digest {
    let file = File::options().read(true).write(true).create_new(true).open(path).expect("create");
    let mut writer = LayerWriter::new(file, PageCount(PAGES)).expect("begin");
    for &page in stored {
        writer.store(page, &vec![page as u8 + 1; PAGE_SIZE as usize]).expect("store");
    }
    zero.iter().for_each(|&first| writer.mark_zero(PageRun { first, count: 1 }));
    writer.finish().expect("finish").digest
}

/// Publishes a snapshot whose layers are real ones.
fn publish(store: &Store, name: &str, dress: impl FnOnce(&mut StagedSnapshot, &mut SnapshotMeta)) -> Snapshot {
    let mut staged = store.stage(&tag(name)).expect("stage");
    let state = name.as_bytes().repeat(1000);
    fs::write(staged.path().join(VMSTATE), &state).expect("write");
    let facts = SnapshotFacts {
        vcpus: 1,
        memory_bytes: PAGES * PAGE_SIZE,
        vmstate_digest: digest(&state),
        memory_digest: write_layer(&staged.path().join(MEMORY_LAYER), &[3, 4, 40], &[7, 63]),
        memory_pages: 3,
        memory_zero_pages: 2,
        disks: vec![(write_layer(&staged.path().join(disk_layer_name(0)), &[0, 62], &[]), 2)],
        disk_numbers: vec![0],
        disk_zero_blocks: vec![0],
        stored_bytes: 0,
    };
    // Data at both ends, a hole between.
    let mut image = vec![0; BLOB];
    image[..5].copy_from_slice(b"begin");
    image[BLOB - 3..].copy_from_slice(b"end");
    let boot = support::boot(blob(store, &b"kernel".repeat(999)), blob(store, b"initramfs"));
    let bases = [(blob(store, &image), PAGES * PAGE_SIZE)];
    let mut meta = SnapshotMeta::new(tag(name), 7, &facts, state.len() as u64, &bases, boot);
    dress(&mut staged, &mut meta);
    store.publish(staged, meta, false).expect("publish")
}

/// A base, a layer over it, and a snapshot that has both of their layers and depends on neither.
fn family() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = Store::open(&dir.path().join("root")).expect("open");
    let base = publish(&store, "base", |_, _| ());
    publish(&store, "layer", |_, meta| meta.parent = Some(ParentRef { tag: tag("base"), digest: base.digest }));
    publish(&store, "alone", |staged, meta| {
        staged.link(&base.dir.join(MEMORY_LAYER), "memory-0.layer").expect("link");
        staged.link(&base.dir.join(disk_layer_name(0)), "disk-0-0.layer").expect("link");
        let memory: &MemoryLayer = &base.meta.memory_layers[0];
        meta.memory_layers.insert(0, MemoryLayer { file: "memory-0.layer".to_owned(), ..memory.clone() });
        let disk: &DiskLayer = &base.meta.disks[0].layers[0];
        meta.disks[0].layers.insert(0, DiskLayer { file: "disk-0-0.layer".to_owned(), ..disk.clone() });
    });
    (dir, store)
}

/// One way to damage a file; applied and taken back.
struct Damage {
    what: String,
    apply: Box<dyn Fn(&File)>,
}

/// Every place that is worth a flipped bit, and other lengths.
fn damages(path: &Path) -> Vec<Damage> {
    let len = path.metadata().expect("stat").len();
    // That each single byte counts is shown where the formats are defined.
    let mut places: Vec<u64> = (0..16).map(|part| part * len / 16).chain([len - 1]).collect();
    if path.extension().is_some_and(|extension| extension == "layer") {
        let index = DATA_OFFSET + PAGES * PAGE_SIZE;
        // Every field of the header and the end of it, the index, pages that are stored and that are not.
        places = vec![0, 8, 12, 16, 24, 32, 40, 48, 80, 112, 143, 144, DATA_OFFSET - 1, index, len - 1];
        let pages = [0, 3, 5, 7, 40, 62].map(|page| DATA_OFFSET + page * PAGE_SIZE);
        places.extend(pages.into_iter().flat_map(|at| [at, at + PAGE_SIZE - 1]));
    }
    let mut damages: Vec<Damage> = Vec::new();
    for place in places {
        let mut byte = [0];
        File::open(path).and_then(|file| file.read_exact_at(&mut byte, place)).expect("read");
        let what = format!("a bit flipped at {place} of {len}");
        damages.push(Damage { what, apply: Box::new(move |file| write(file, place, &[byte[0] ^ 0x10])) });
    }
    for new in [0, 1, len / 2, len - 1, len + 1, len + 4096] {
        let apply = Box::new(move |file: &File| file.set_len(new).expect("resize"));
        damages.push(Damage { what: format!("{new} instead of {len} bytes"), apply });
    }
    damages
}

fn write(file: &File, at: u64, bytes: &[u8]) {
    file.write_all_at(bytes, at).expect("write");
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in dir.read_dir().expect("list") {
        let path = entry.expect("entry").path();
        if path.is_dir() { files.extend(files_below(&path)) } else { files.push(path) }
    }
    files.sort();
    files
}

/// What verification of `name` says is bad, in words.
fn complaints(store: &Store, name: &str) -> String {
    match store.verify(&tag(name), |path| layer::verify(path, |_| ()), |_| ()) {
        Ok(report) => report.bad().map(|bad| format!("{}: {:?}\n", bad.path.display(), bad.outcome)).collect(),
        Err(error @ (StoreError::Damaged { .. } | StoreError::ParentMissing { .. })) => error.to_string(),
        Err(error) => panic!("{error}"),
    }
}

/// Which snapshots need a file under its own name.
fn needing(relative: &str) -> &'static [&'static str] {
    match relative.split('/').nth(1) {
        _ if relative.starts_with("blobs") => &["base", "layer", "alone"],
        Some("base") => &["base", "layer"],
        Some("layer") => &["layer"],
        _ => &["alone"],
    }
}

#[test]
fn damage_of_every_file_is_found_and_the_file_is_named() {
    let (_dir, store) = family();
    let (mut files, mut found) = (0, 0);
    for kind in ["snapshots", "blobs"] {
        for path in files_below(&store.root().join(kind)) {
            files += 1;
            let good = fs::read(&path).expect("read");
            let name = path.file_name().expect("a file").to_string_lossy().into_owned();
            let relative = path.strip_prefix(store.root()).expect("below").display().to_string();
            for Damage { what, apply } in damages(&path) {
                fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).expect("chmod");
                apply(&File::options().read(true).write(true).open(&path).expect("open"));
                for snapshot in needing(&relative) {
                    let said = complaints(&store, snapshot);
                    assert!(said.contains(&name), "{relative} with {what} went unnoticed in {snapshot}: {said:?}");
                }
                found += 1;
                fs::write(&path, &good).expect("repair");
            }
            assert_eq!(complaints(&store, "layer") + &complaints(&store, "alone"), "", "{name} was repaired");
        }
    }
    support::note(&format!("{found} damages in {files} files"));
    assert_eq!(files, 3 * 4 + 2 + 3);
}

#[test]
fn a_hole_that_became_data_is_found_as_the_guest_would_see_it() {
    let (_dir, store) = family();
    let path = store.get(&tag("base")).expect("there").dir.join(MEMORY_LAYER);
    fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).expect("chmod");
    let at = DATA_OFFSET + 20 * PAGE_SIZE;
    write(&File::options().write(true).open(&path).expect("open"), at, b"stray");
    // A base is mapped as one piece: page 20 would be that of the file, stored or not.
    let said = complaints(&store, "base");
    assert!(said.contains(MEMORY_LAYER) && said.contains(&at.to_string()), "{said}");
}

#[test]
fn a_missing_file_is_named() {
    let (_dir, store) = family();
    let base = store.get(&tag("base")).expect("there").dir;
    let disk = store.list_blobs().expect("list").into_iter().find(|blob| blob.size == BLOB as u64).expect("the image");
    fs::remove_file(store.root().join("blobs").join(disk.digest.hex())).expect("remove");
    assert!(complaints(&store, "layer").contains(&disk.digest.hex().to_string()));
    for file in [MEMORY_LAYER, SNAPSHOT_JSON] {
        fs::remove_file(base.join(file)).expect("remove");
        let said = complaints(&store, "layer");
        assert!(said.contains(file) && said.contains("base"), "{said}");
    }
    let mut other = File::create(base.join(SNAPSHOT_JSON)).expect("create");
    other.write_all(b"{}").expect("write");
    assert!(complaints(&store, "layer").contains(SNAPSHOT_JSON));
}
