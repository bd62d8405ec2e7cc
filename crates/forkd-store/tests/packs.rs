//! What is packed comes out the same elsewhere, and packs of the same snapshot are the same.

mod pack_support;

use std::os::unix::fs::MetadataExt;
use std::process::Command;

use forkd_store::pack::{Fate, Manifest, PackError, PackOptions, UnpackOptions};
use forkd_store::{Store, StoreError};
use pack_support::*;

fn fates(unpacked: &forkd_store::pack::Unpacked) -> Vec<(&str, Fate)> {
    unpacked.snapshots.iter().map(|one| (one.tag.as_str(), one.fate)).collect()
}

#[test]
fn a_chain_comes_out_byte_for_byte_and_as_sparse_as_it_was() {
    let (_here, source) = chain_of_three();
    let pack = pack(&source, "two");
    let (_there, target) = store();
    let unpacked = unpack(&target, &pack).expect("unpack");
    assert_eq!(fates(&unpacked), [("base", Fate::Published), ("one", Fate::Published), ("two", Fate::Published)]);
    assert_eq!((unpacked.new_blobs, unpacked.reused_blobs, unpacked.tag.as_str()), (3, 0, "two"));
    assert!(contents(&source) == contents(&target), "the stores differ");
    assert_eq!(leftovers(&target), 0);
    assert!(is_whole(&target, "two"));
    for path in contents(&source).keys().filter(|path| !path.ends_with('/')) {
        let blocks = |store: &Store| store.root().join(path).metadata().expect("stat").blocks();
        assert!(blocks(&target) <= blocks(&source) + 8, "{path} takes {} blocks, {}", blocks(&target), blocks(&source));
        let mode = target.root().join(path).metadata().expect("stat").mode();
        assert_eq!(mode & 0o777, 0o444, "{path}");
    }
    // Once it is there it is there.
    let again = unpack(&target, &pack).expect("again");
    assert!(again.snapshots.iter().all(|one| one.fate == Fate::Reused), "{again:?}");
    assert_eq!((again.new_blobs, again.reused_blobs, again.written_bytes), (0, 3, 0));
    assert!(contents(&source) == contents(&target) && leftovers(&target) == 0);
    target.remove(&tag("two")).expect("nothing holds it");
}

#[test]
fn the_same_snapshot_makes_the_same_bytes_whatever_holds_it_and_however_many_threads_pack_it() {
    let (_here, source) = chain_of_three();
    let options = |threads| PackOptions { threads: Some(threads), ..PackOptions::default() };
    let first = pack_with(&source, "two", &options(1));
    for threads in [2, 5] {
        assert!(pack_with(&source, "two", &options(threads)) == first, "{threads} threads make another pack");
    }
    let (_there, target) = store();
    unpack(&target, &first).expect("unpack");
    assert!(pack(&target, "two") == first, "the copy makes another pack");
    for (name, reshape) in
        [("dense", pack_support::rewrite_without_holes as fn(&std::path::Path)), ("sparse", pack_support::dig_holes)]
    {
        for path in contents(&target).keys().filter(|path| !path.ends_with('/')) {
            reshape(&target.root().join(path));
        }
        assert!(pack(&target, "two") == first, "{name} files make another pack");
    }
}

#[test]
fn a_pack_of_many_compression_jobs_is_the_same_with_any_number_of_threads() {
    let (_here, source) = store();
    let base = publish(&source, "base", 1, None);
    // Something between text and noise, several times what one thread is given at once.
    let words: Vec<Vec<u8>> = (0..512).map(|seed| noise(seed, 24)).collect();
    let content: Vec<u8> =
        noise(5, 3 << 20).iter().enumerate().flat_map(|(at, byte)| &words[*byte as usize + at % 3]).copied().collect();
    assert!(content.len() > 64 << 20);
    let staged = source.stage(&tag("large")).expect("stage");
    let mut meta = base.meta.clone();
    meta.tag = tag("large");
    for file in meta.files().map(str::to_owned).collect::<Vec<_>>() {
        std::fs::copy(base.dir.join(&file), staged.path().join(&file)).expect("copy");
    }
    let mut blob = source.stage_blob().expect("stage");
    std::io::Write::write_all(&mut blob, &content).expect("write");
    meta.boot.kernel = blob.finish(None).expect("finish");
    source.publish(staged, meta, false).expect("publish");
    let options = |threads| PackOptions { threads: Some(threads), ..PackOptions::default() };
    let first = pack_with(&source, "large", &options(1));
    assert!(first.len() > 4 << 20, "{}", first.len());
    assert!(pack_with(&source, "large", &options(4)) == first, "four threads make another pack");
}

#[test]
fn gnu_tar_reads_a_pack() {
    let (here, source) = chain_of_three();
    let packed = here.path().join("two.forkd-snapshot.tar.zst");
    std::fs::write(&packed, pack(&source, "two")).expect("write");
    let out = here.path().join("out");
    std::fs::create_dir(&out).expect("mkdir");
    let tar = Command::new("tar").args(["--zstd", "-xf"]).arg(&packed).arg("-C").arg(&out).output().expect("run tar");
    let said = String::from_utf8_lossy(&tar.stderr).into_owned();
    assert!(tar.status.success() && said.is_empty(), "{said}");
    for (path, content) in contents(&source).iter().filter(|(path, _)| !path.ends_with('/')) {
        let (ours, tars) = (source.root().join(path), out.join(path));
        assert!(std::fs::read(&tars).expect("extracted") == *content, "{path} differs");
        let blocks = |path: &std::path::Path| path.metadata().expect("stat").blocks();
        assert!(blocks(&tars) <= blocks(&ours) + 8, "{path} is not sparse");
    }
}

/// Made by the test below with `UPDATE_GOLDEN=1`, once for each version of the format.
const VERSION_1: &[u8] = include_bytes!("../fixtures/pack-v1.forkd-snapshot.tar.zst");

#[test]
fn version_1_is_written_and_read_as_released() {
    let (_here, source) = store();
    let base = publish_small(&source, "base", b'b', None);
    publish_small(&source, "top", b't', Some(&base));
    let options = PackOptions { description: Some("of version 1".into()), ..PackOptions::default() };
    let packed = pack_with(&source, "top", &options);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/pack-v1.forkd-snapshot.tar.zst");
        std::fs::write(path, &packed).expect("the fixture can be written");
    }
    let (_there, target) = store();
    unpack(&target, VERSION_1).expect("what was written once is read for ever");
    assert!(contents(&source) == contents(&target) && is_whole(&target, "top"));
    // Compressors change; what they compress does not.
    let archive = |pack: &[u8]| zstd::decode_all(pack).expect("sound zstd");
    assert!(archive(&packed) == archive(VERSION_1), "the format changed: add a version and a fixture");
}

#[test]
fn zeros_cost_nothing() {
    let (_here, source) = chain_of_three();
    let pack = pack(&source, "two");
    let logical: u64 = contents(&source).values().map(|content| content.len() as u64).sum();
    let archive = zstd::decode_all(pack.as_slice()).expect("sound");
    let manifest = Manifest::of_pack(pack.as_slice()).expect("a pack");
    assert!(logical > 200 << 20 && archive.len() < 1 << 20, "{logical} bytes make {}", archive.len());
    let data = manifest.data_bytes();
    assert!((data..data + (64 << 10)).contains(&(archive.len() as u64)), "{data} bytes make {}", archive.len());
    // Noise does not compress: what is added is headers.
    assert!(pack.len() < archive.len(), "{} bytes make {}", archive.len(), pack.len());
}

#[test]
fn what_a_manifest_says() {
    let (_here, source) = chain_of_three();
    let options = PackOptions {
        description: Some("with tests".into()),
        base_image: Some("debian:bookworm".into()),
        level: 19,
        threads: None,
    };
    let packed = pack_with(&source, "two", &options);
    let members = Members::of(&packed);
    let manifest: serde_json::Value = serde_json::from_slice(&members.0[0].content).expect("json");
    assert_eq!(members.0[0].path(), "manifest.json");
    assert_eq!((&manifest["format"], &manifest["version"]), (&"forkd-pack".into(), &1.into()));
    assert_eq!((&manifest["engine"], &manifest["tag"]), (&"forkd-vmm".into(), &"two".into()));
    assert_eq!((&manifest["description"], &manifest["base_image"]), (&"with tests".into(), &"debian:bookworm".into()));
    assert_eq!(manifest["created_at_unix"], 1_795_000_012);
    let text = String::from_utf8(members.0[0].content.clone()).expect("text");
    assert!(!text.contains(&source.root().display().to_string()), "a pack names no path of its host");
    let paths: Vec<_> = members.0.iter().map(|member| member.path()).filter(|path| !path.contains("Pax")).collect();
    assert_eq!(paths[1..4], ["base", "one", "two"].map(|tag| format!("snapshots/{tag}/snapshot.json")));

    let (_there, target) = store();
    unpack(&target, &packed).expect("unpack");
    assert!(matches!(
        source.pack(&tag("two"), &PackOptions { level: 20, ..PackOptions::default() }, |_| ()),
        Err(PackError::Level { level: 20 })
    ));
    assert!(matches!(
        source.pack(&tag("three"), &PackOptions::default(), |_| ()),
        Err(PackError::Store(StoreError::NotFound { .. }))
    ));
}

#[test]
fn another_name_is_for_the_head_alone() {
    let (_here, source) = chain_of_three();
    let packed = pack(&source, "two");
    let (_there, target) = store();
    let renamed = |name: &str| UnpackOptions { rename: Some(tag(name)), ..UnpackOptions::default() };
    let unpacked = unpack_with(&target, &packed, &renamed("mine")).expect("unpack");
    assert_eq!(fates(&unpacked), [("base", Fate::Published), ("one", Fate::Published), ("mine", Fate::Published)]);
    assert!(target.get(&tag("two")).is_err() && is_whole(&target, "mine"));
    let (ours, theirs) = (source.get(&tag("two")).expect("there"), target.get(&tag("mine")).expect("there"));
    assert_eq!((theirs.meta.parent.as_ref(), theirs.meta.created_at_unix), (ours.meta.parent.as_ref(), 1_795_000_012));
    // Under either name the same again is no work.
    let again = unpack_with(&target, &packed, &renamed("mine")).expect("again");
    assert_eq!(fates(&again)[2], ("mine", Fate::Reused));
    let original = unpack_with(&target, &packed, &renamed("two")).expect("its own name");
    assert_eq!(fates(&original), [("base", Fate::Reused), ("one", Fate::Reused), ("two", Fate::Published)]);
    assert_eq!(target.get(&tag("two")).expect("there").digest, ours.digest);
    for ancestor in ["one", "base"] {
        match unpack_with(&target, &packed, &renamed(ancestor)) {
            Err(error @ PackError::Description { .. }) => {
                assert!(error.to_string().contains("derives from"), "{error}")
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(leftovers(&target), 0);
}

#[test]
fn another_snapshot_of_the_name_is_in_the_way_unless_it_may_be_replaced_and_nothing_needs_it() {
    let (_here, source) = chain_of_three();
    let packed = pack(&source, "two");
    let replace = UnpackOptions { replace: true, ..UnpackOptions::default() };

    // The head.
    let (_there, target) = store();
    publish(&target, "two", 99, None);
    let before = contents(&target);
    match unpack(&target, &packed) {
        Err(error @ PackError::Differs { head: true, .. }) => {
            assert!(error.to_string().contains("another snapshot two already"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    assert!(before == contents(&target) && leftovers(&target) == 0, "a refused pack changed the store");
    let unpacked = unpack_with(&target, &packed, &replace).expect("replace");
    assert_eq!(fates(&unpacked)[2], ("two", Fate::Replaced));
    assert!(contents(&source) == contents(&target) && leftovers(&target) == 0);

    // An ancestor that others need.
    let (_there, target) = store();
    let base = publish(&target, "base", 98, None);
    publish(&target, "mine", 97, Some(&base));
    let before = contents(&target);
    assert!(
        matches!(unpack(&target, &packed), Err(PackError::Differs { tag: of, head: false, .. }) if of == tag("base"))
    );
    match unpack_with(&target, &packed, &replace) {
        Err(error @ PackError::InUse { .. }) => assert!(error.to_string().contains("mine is built on it"), "{error}"),
        other => panic!("{other:?}"),
    }
    assert!(before == contents(&target) && leftovers(&target) == 0, "a refused pack changed the store");

    // A whole other chain of the same names goes as one.
    let (_there, target) = store();
    let base = publish(&target, "base", 96, None);
    let one = publish(&target, "one", 95, Some(&base));
    publish(&target, "two", 94, Some(&one));
    let unpacked = unpack_with(&target, &packed, &replace).expect("replace all");
    assert!(unpacked.snapshots.iter().all(|one| one.fate == Fate::Replaced));
    assert!(is_whole(&target, "two") && leftovers(&target) == 0);

    // A broken one can be replaced too.
    let (_there, target) = store();
    std::fs::create_dir(target.root().join("snapshots/one")).expect("mkdir");
    assert!(matches!(unpack(&target, &packed), Err(PackError::Differs { .. })));
    unpack_with(&target, &packed, &replace).expect("replace the broken one");
    assert!(contents(&source) == contents(&target));
}

#[test]
fn ancestors_that_are_there_are_reused() {
    let (_here, source) = chain_of_three();
    let (_there, target) = store();
    unpack(&target, &pack(&source, "one")).expect("two of three");
    let unpacked = unpack(&target, &pack(&source, "two")).expect("the third");
    assert_eq!(fates(&unpacked), [("base", Fate::Reused), ("one", Fate::Reused), ("two", Fate::Published)]);
    assert_eq!((unpacked.new_blobs, unpacked.reused_blobs), (0, 3));
    assert!(contents(&source) == contents(&target));
}

#[test]
fn fields_of_a_description_that_are_not_known_survive() {
    let (_here, source) = chain_of_three();
    let path = source.root().join("snapshots/two/snapshot.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("json");
    json.as_object_mut().expect("object").insert("colour".into(), "blue".into());
    let mut text = serde_json::to_vec_pretty(&json).expect("plain data");
    seal(&mut text);
    std::fs::remove_file(&path).expect("remove");
    std::fs::write(&path, &text).expect("write");
    let (_there, target) = store();
    let packed = pack(&source, "two");
    unpack(&target, &packed).expect("unpack");
    assert_eq!(std::fs::read(target.root().join("snapshots/two/snapshot.json")).expect("read"), text);
    let renamed = UnpackOptions { rename: Some(tag("mine")), ..UnpackOptions::default() };
    unpack_with(&target, &packed, &renamed).expect("unpack");
    let mine = std::fs::read_to_string(target.root().join("snapshots/mine/snapshot.json")).expect("read");
    assert!(mine.contains(r#""colour": "blue""#), "{mine}");
}

#[test]
fn a_snapshot_that_is_removed_while_it_is_packed_is_packed() {
    let (_here, source) = chain_of_three();
    let expected = pack(&source, "two");
    let opened = source.pack(&tag("two"), &PackOptions::default(), |_| ()).expect("read");
    for name in ["two", "one", "base"] {
        source.remove(&tag(name)).expect("remove");
    }
    let mut written = Vec::new();
    opened.write(&mut written, |_| ()).expect("write");
    assert!(written == expected, "another pack came out");
}

#[test]
fn a_damaged_description_or_state_is_not_packed() {
    let (_here, source) = chain_of_three();
    let path = source.root().join("snapshots/one/vmstate");
    let mut bytes = std::fs::read(&path).expect("read");
    bytes[17] ^= 1;
    std::fs::remove_file(&path).expect("remove");
    std::fs::write(&path, bytes).expect("write");
    match source.pack(&tag("two"), &PackOptions::default(), |_| ()) {
        Err(PackError::Store(error @ StoreError::Damaged { .. })) => {
            assert!(error.to_string().contains("snapshot one") && error.to_string().contains("vmstate has"), "{error}");
        }
        other => panic!("{other:?}"),
    }
}
