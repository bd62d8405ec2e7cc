//! Publishing, replacing, listing, removing and verifying snapshots.

mod support;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use forkd_store::{Listed, MEMORY_LAYER, Outcome, SNAPSHOT_JSON, Store, StoreError, VMSTATE};
use support::{blob, digest, layer_digest, leftovers, publish, staged, tag};

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = Store::open(&dir.path().join("root")).expect("open");
    (dir, store)
}

#[test]
fn a_published_snapshot_is_there_read_only_and_survives_reopening() {
    let (dir, store) = store();
    let snapshot = publish(&store, "py", b"state", None).expect("publish");
    assert_eq!(snapshot.dir, store.root().join("snapshots/py"));
    assert_eq!(store.get(&tag("py")).expect("get"), snapshot);
    for file in [VMSTATE, MEMORY_LAYER, SNAPSHOT_JSON, "disk-0.layer"] {
        let mode = snapshot.dir.join(file).metadata().expect("stat").permissions().mode();
        assert_eq!(mode & 0o777, 0o444, "{file}");
    }
    assert_eq!(leftovers(&store), 0);
    drop(store);
    let store = Store::open(&dir.path().join("root")).expect("reopen");
    assert_eq!(store.get(&tag("py")).expect("get"), snapshot);
    assert!(matches!(store.get(&tag("none")), Err(StoreError::NotFound { .. })));
}

#[test]
fn a_staged_snapshot_is_listed_as_being_written_and_goes_when_dropped() {
    let (_dir, store) = store();
    let (staged, _) = staged(&store, "py", b"state");
    assert_eq!(store.list().expect("list"), [Listed::Writing { tag: tag("py") }]);
    drop(staged);
    assert_eq!(store.list().expect("list"), []);
    assert_eq!(leftovers(&store), 0);
}

#[test]
fn a_tag_is_taken_until_replaced_in_one_step() {
    let (_dir, store) = store();
    let first = publish(&store, "py", b"first", None).expect("publish");
    let mapped = fs::File::open(first.vmstate()).expect("open");
    assert!(matches!(publish(&store, "py", b"second", None), Err(StoreError::AlreadyExists { .. })));
    assert_eq!(store.get(&tag("py")).expect("still the first"), first);

    let (staged, meta) = staged(&store, "py", b"second");
    let second = store.publish(staged, meta, true).expect("replace");
    assert_eq!(store.get(&tag("py")).expect("get"), second);
    assert_eq!(fs::read(second.vmstate()).expect("read"), b"second");
    assert_eq!(leftovers(&store), 0);
    // Who had the first one open still has it.
    assert_eq!(std::io::read_to_string(mapped).expect("read"), "first");
}

#[test]
fn a_parent_stays_while_it_has_children() {
    let (_dir, store) = store();
    let base = publish(&store, "base", b"base", None).expect("publish");
    let child = publish(&store, "child", b"child", Some(&base)).expect("publish");
    publish(&store, "grandchild", b"grandchild", Some(&child)).expect("publish");
    publish(&store, "other", b"other", Some(&base)).expect("publish");

    match store.remove(&tag("base")) {
        Err(StoreError::HasChildren { children, .. }) => assert_eq!(children, [tag("child"), tag("other")]),
        other => panic!("{other:?}"),
    }
    let (again, meta) = staged(&store, "base", b"again");
    assert!(matches!(store.publish(again, meta, true), Err(StoreError::HasChildren { .. })));
    let chain: Vec<_> = store.chain(&tag("grandchild")).expect("chain").into_iter().map(|one| one.meta.tag).collect();
    assert_eq!(chain, [tag("base"), tag("child"), tag("grandchild")]);

    let order = store.descendants(&tag("base")).expect("descendants");
    assert_eq!(order.len(), 3);
    for tag in order {
        store.remove(&tag).expect("children first");
    }
    store.remove(&tag("base")).expect("free now");
    assert!(matches!(store.remove(&tag("base")), Err(StoreError::NotFound { .. })));
    assert_eq!(leftovers(&store), 0);
}

#[test]
fn a_child_of_what_is_gone_or_replaced_is_refused() {
    let (_dir, store) = store();
    let first = publish(&store, "base", b"first", None).expect("publish");
    let (again, meta) = staged(&store, "base", b"second");
    let second = store.publish(again, meta, true).expect("replace");
    match publish(&store, "child", b"child", Some(&first)) {
        Err(StoreError::ParentMissing { actual, .. }) => assert_eq!(actual, Some(second.digest)),
        other => panic!("{other:?}"),
    }
    store.remove(&tag("base")).expect("remove");
    assert!(matches!(
        publish(&store, "child", b"child", Some(&second)),
        Err(StoreError::ParentMissing { actual: None, .. })
    ));
    assert_eq!(store.list().expect("list"), []);
}

#[test]
fn what_does_not_agree_with_its_description_is_not_published() {
    let (dir, store) = store();
    type Spoil = fn(&std::path::Path, &mut forkd_store::SnapshotMeta);
    let outside = dir.path().join("outside");
    fs::write(&outside, "x").expect("write");
    let cases: [(&str, Spoil); 8] = [
        ("missing file", |path, _| fs::remove_file(path.join(VMSTATE)).expect("remove")),
        ("wrong length", |_, meta| meta.vmstate.bytes += 1),
        ("unnamed file", |path, _| fs::write(path.join("extra"), "x").expect("write")),
        ("other tag", |_, meta| meta.tag = tag("other")),
        ("later version", |_, meta| meta.version += 1),
        ("blob not there", |_, meta| meta.boot.kernel = digest(b"no such blob")),
        ("path for a name", |_, meta| meta.memory_layers[0].file = "../x".into()),
        ("link for a file", |path, _| {
            fs::remove_file(path.join(MEMORY_LAYER)).expect("remove");
            symlink("../../../outside", path.join(MEMORY_LAYER)).expect("symlink");
        }),
    ];
    for (name, spoil) in cases {
        let (staged, mut meta) = staged(&store, "py", b"state");
        spoil(staged.path(), &mut meta);
        let error = store.publish(staged, meta, false).expect_err(name);
        assert!(matches!(error, StoreError::Inconsistent { .. } | StoreError::Io { .. }), "{name}: {error}");
        assert_eq!(store.list().expect("list"), [], "{name}");
        assert_eq!(leftovers(&store), 0, "{name}");
    }
    assert_ne!(outside.metadata().expect("stat").permissions().mode() & 0o777, 0o444, "changed through a link");
}

#[test]
fn a_broken_snapshot_is_listed_with_its_reason_and_can_be_removed() {
    let (_dir, store) = store();
    for name in ["good", "future", "torn", "empty", "short", "moved", "huge"] {
        publish(&store, name, name.as_bytes(), None).expect("publish");
    }
    let snapshots = store.root().join("snapshots");
    let json = |name: &str| snapshots.join(name).join(SNAPSHOT_JSON);
    let rewrite = |name: &str, text: String| {
        fs::remove_file(json(name)).and_then(|()| fs::write(json(name), text)).expect("rewrite");
    };
    rewrite("future", r#"{"version":9}"#.into());
    rewrite("torn", fs::read_to_string(json("torn")).expect("read")[..100].into());
    rewrite("huge", " ".repeat((1 << 20) + 1));
    fs::remove_file(json("empty")).expect("remove");
    fs::remove_file(snapshots.join("short").join(VMSTATE)).expect("remove");
    fs::rename(snapshots.join("moved"), snapshots.join("elsewhere")).expect("rename");
    fs::create_dir(snapshots.join("not a tag")).expect("mkdir");

    let listed = store.list().expect("a broken one is no error");
    let reason = |name: &str| {
        let one = listed.iter().find(|one| *one.tag() == tag(name)).expect(name);
        match one {
            Listed::Failed { reason, .. } => reason.clone(),
            other => panic!("{name}: {other:?}"),
        }
    };
    assert_eq!(listed.len(), 7);
    assert!(listed.iter().any(|one| matches!(one, Listed::Ready { stored_bytes, .. } if *stored_bytes > 0)));
    assert!(reason("future").contains("version 9"), "{}", reason("future"));
    assert!(reason("torn").contains("malformed"), "{}", reason("torn"));
    assert!(reason("empty").contains("cannot be read"), "{}", reason("empty"));
    assert!(reason("short").contains("vmstate"), "{}", reason("short"));
    assert!(reason("elsewhere").contains("snapshot moved"), "{}", reason("elsewhere"));
    assert!(reason("huge").contains("exceeds"), "{}", reason("huge"));
    // What broken ones needed is not known, so nothing counts as garbage.
    assert!(matches!(store.unreferenced_blobs(), Err(StoreError::UnknownReferences { .. })));
    for name in ["future", "torn", "empty", "short", "elsewhere", "huge"] {
        assert!(matches!(store.get(&tag(name)), Err(StoreError::Damaged { .. })));
        store.remove(&tag(name)).expect(name);
    }
    assert_eq!(store.list().expect("list").len(), 1);
}

#[test]
fn blobs_stay_while_named_and_are_garbage_after() {
    let (_dir, store) = store();
    publish(&store, "py", b"state", None).expect("publish");
    let kernel = digest(b"kernel");
    let unused = blob(&store, b"unused");
    let garbage: Vec<_> = store.unreferenced_blobs().expect("list").into_iter().map(|blob| blob.digest).collect();
    assert_eq!(garbage, [unused]);
    match store.remove_blob(&kernel) {
        Err(StoreError::BlobInUse { users, .. }) => assert_eq!(users, [tag("py")]),
        other => panic!("{other:?}"),
    }
    store.remove_blob(&unused).expect("unused");
    assert!(matches!(store.remove_blob(&unused), Err(StoreError::BlobNotFound { .. })));
    store.remove(&tag("py")).expect("remove");
    assert_eq!(store.unreferenced_blobs().expect("list").len(), 3);
    store.remove_blob(&kernel).expect("free now");
}

#[test]
fn verification_finds_a_flipped_bit_anywhere_in_the_chain() {
    let (_dir, store) = store();
    let base = publish(&store, "base", b"base", None).expect("publish");
    let child = publish(&store, "child", b"child", Some(&base)).expect("publish");
    let verify = || {
        let mut last = 0;
        let report = store.verify(&tag("child"), layer_digest, |progress| {
            assert!(progress.done_bytes >= last && progress.done_bytes <= progress.total_bytes);
            last = progress.done_bytes;
        });
        report.expect("the chain is readable")
    };
    let report = verify();
    assert!(report.is_good(), "{report:?}");
    assert_eq!(report.checked.len(), 2 * 3 + 3);

    let kernel = store.blob(&digest(b"kernel")).expect("blob").expect("there").path;
    for path in [base.vmstate(), child.dir.join(MEMORY_LAYER), base.dir.join("disk-0.layer"), kernel] {
        let good = fs::read(&path).expect("read");
        let mut bad = good.clone();
        bad[0] ^= 1;
        let write = |bytes: &[u8]| {
            fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).and_then(|()| fs::write(&path, bytes))
        };
        write(&bad).expect("spoil");
        let report = verify();
        let found: Vec<_> = report.bad().collect();
        assert_eq!(found.len(), 1, "{report:?}");
        assert_eq!(found[0].path, path);
        assert!(matches!(found[0].outcome, Outcome::Differs { actual, .. } if actual == digest(&bad)));
        write(&good).expect("repair");
    }
    assert!(verify().is_good());
}

#[test]
fn one_of_several_writers_of_a_tag_wins_and_the_others_are_told() {
    let (_dir, store) = store();
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let publishing: Vec<_> = (0..8u8)
            .map(|index| {
                let store = &store;
                scope.spawn(move || publish(store, "py", &[index], None))
            })
            .collect();
        publishing.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let won: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.as_ref().ok()).collect();
    assert_eq!(won.len(), 1);
    assert_eq!(store.get(&tag("py")).expect("get"), *won[0]);
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Ok(_) | Err(StoreError::AlreadyExists { .. }))));
    assert_eq!(leftovers(&store), 0);
}
