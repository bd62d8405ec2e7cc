//! Snapshots over snapshots: what may lie over what, how deep, and what becomes of the rest when one goes.

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use forkd_store::{DEPTH_LIMIT, Listed, ParentRef, SNAPSHOT_JSON, Snapshot, SnapshotMeta, Store, StoreError};
use support::{blob, leftovers, publish, staged, tag};

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = Store::open(&dir.path().join("root")).expect("open");
    (dir, store)
}

fn tags(chain: &[Snapshot]) -> Vec<&str> {
    chain.iter().map(|snapshot| snapshot.meta.tag.as_str()).collect()
}

#[test]
fn a_layer_lies_only_over_a_machine_of_the_same_shape() {
    let (_dir, store) = store();
    let base = publish(&store, "base", b"base", None).expect("publish");
    let other_image = blob(&store, b"another disk");
    type Spoil = Box<dyn Fn(&mut SnapshotMeta)>;
    let cases: [(&str, Spoil); 10] = [
        ("bytes of memory", Box::new(|meta| meta.memory_bytes += 2 << 20)),
        ("disk 0 has", Box::new(|meta| meta.disks[0].logical_bytes += 4096)),
        ("over image", Box::new(move |meta| meta.disks[0].base = other_image)),
        (
            "it has 2 disks",
            Box::new(|meta| {
                let mut second = meta.disks[0].clone();
                second.layers.clear();
                meta.disks.push(second);
            }),
        ),
        ("it has 2 vCPUs", Box::new(|meta| meta.vcpus = 2)),
        ("its kernel is", Box::new(move |meta| meta.boot.kernel = other_image)),
        ("its initramfs is none", Box::new(|meta| meta.boot.initramfs = None)),
        ("its kernel release is 6.1,", Box::new(|meta| meta.boot.kernel_release = "6.1".into())),
        ("its agent version is 9", Box::new(|meta| meta.boot.agent_version = "9".into())),
        ("with avx512f", Box::new(|meta| meta.boot.cpu.features = vec!["avx512f".into()])),
    ];
    for (says, spoil) in &cases {
        let (staged, mut meta) = staged(&store, "child", b"child");
        meta.parent = Some(ParentRef { tag: tag("base"), digest: base.digest });
        spoil(&mut meta);
        match store.publish(staged, meta, false) {
            Err(StoreError::Inconsistent { reason, .. }) => {
                assert!(reason.contains(says) && reason.contains("its parent base"), "{says}: {reason}");
            }
            other => panic!("{says}: {other:?}"),
        }
        assert_eq!((store.list().expect("list").len(), leftovers(&store)), (1, 0), "{says}");
    }
    publish(&store, "child", b"child", Some(&base)).expect("the same shape");
}

#[test]
fn a_chain_has_at_most_64_parents() {
    let (_dir, store) = store();
    let mut newest = publish(&store, "depth-0", b"0", None).expect("publish");
    for depth in 1..=DEPTH_LIMIT {
        newest = publish(&store, &format!("depth-{depth}"), &[depth as u8], Some(&newest)).expect("within the limit");
    }
    assert_eq!(store.chain(&newest.meta.tag).expect("chain").len(), DEPTH_LIMIT + 1);
    match publish(&store, "deeper", b"deeper", Some(&newest)) {
        Err(error @ StoreError::TooDeep { limit: DEPTH_LIMIT, .. }) => {
            assert!(error.to_string().contains("deeper would lie over more than 64"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(leftovers(&store), 0);
}

#[test]
fn removal_by_force_leaves_children_that_name_what_they_miss() {
    let (_dir, store) = store();
    let base = publish(&store, "base", b"base", None).expect("publish");
    let child = publish(&store, "child", b"child", Some(&base)).expect("publish");
    let grandchild = publish(&store, "grandchild", b"grandchild", Some(&child)).expect("publish");
    assert!(matches!(store.remove(&tag("base")), Err(StoreError::HasChildren { .. })));
    assert_eq!(store.remove_forced(&tag("base")).expect("forced"), [tag("child")]);
    assert_eq!(leftovers(&store), 0);
    assert!(matches!(store.remove_forced(&tag("base")), Err(StoreError::NotFound { .. })));

    for name in ["child", "grandchild"] {
        assert!(store.get(&tag(name)).is_ok(), "{name} itself is whole");
        let error = store.chain(&tag(name)).expect_err("its base is gone");
        assert!(matches!(error, StoreError::ParentMissing { actual: None, .. }), "{error}");
        let text = error.to_string();
        assert!(
            text.contains("snapshot child needs its parent base") && text.contains("no snapshot of that tag"),
            "{text}"
        );
    }
    // Nothing is built on ruins.
    assert!(matches!(publish(&store, "late", b"late", Some(&grandchild)), Err(StoreError::ParentMissing { .. })));
    // Another snapshot of the tag is not their parent: it neither serves them nor is held by them.
    let again = publish(&store, "base", b"another", None).expect("publish");
    assert!(
        matches!(store.chain(&tag("child")), Err(StoreError::ParentMissing { actual: Some(found), .. }) if found == again.digest)
    );
    assert_eq!(store.descendants(&tag("base")).expect("descendants"), []);
    store.remove(&tag("base")).expect("it has no children");
    store.remove(&tag("grandchild")).and_then(|()| store.remove(&tag("child"))).expect("ruins can be cleared");
}

#[test]
fn tags_that_name_each_other_are_no_cycle() {
    let (_dir, store) = store();
    let base = publish(&store, "base", b"base", None).expect("publish");
    let child = publish(&store, "child", b"child", Some(&base)).expect("publish");
    store.remove_forced(&tag("base")).expect("forced");
    // A base over its own child: what the child derives from is not this one.
    assert!(matches!(publish(&store, "base", b"base", Some(&child)), Err(StoreError::ParentMissing { .. })));
    // Forged on disk.
    let forged = publish(&store, "base", b"base", None).expect("publish");
    let mut meta = forged.meta.clone();
    meta.parent = Some(ParentRef { tag: tag("child"), digest: child.digest });
    let json = forged.dir.join(SNAPSHOT_JSON);
    fs::remove_file(&json).expect("remove");
    fs::write(&json, meta.encode().expect("plain data")).expect("write");
    assert!(matches!(store.chain(&tag("base")), Err(StoreError::ParentMissing { actual: Some(_), .. })));
    assert_eq!(store.descendants(&tag("child")).expect("it ends"), [tag("base")]);
    // Broken, nobody knows whose parents they are: the tags alone count, and still it ends.
    fs::remove_file(&json).and_then(|()| fs::write(&json, "{")).expect("write");
    assert_eq!(store.descendants(&tag("base")).expect("it ends"), [tag("child")]);
    assert!(matches!(store.remove(&tag("base")), Err(StoreError::HasChildren { .. })));
}

#[test]
fn a_parent_is_found_by_a_chain_although_its_files_were_not_read() {
    let (_dir, store) = store();
    let base = publish(&store, "base", b"base", None).expect("publish");
    let child = publish(&store, "child", b"child", Some(&base)).expect("publish");
    assert_eq!(tags(&store.chain(&tag("child")).expect("chain")), ["base", "child"]);
    // A description that says nearly the same is another one.
    let json = base.dir.join(SNAPSHOT_JSON);
    let other = SnapshotMeta { created_at_unix: base.meta.created_at_unix + 1, ..base.meta }.encode();
    fs::remove_file(&json).and_then(|()| fs::write(&json, other.expect("plain data"))).expect("rewrite");
    match store.chain(&tag("child")) {
        Err(StoreError::ParentMissing { expected, actual: Some(_), .. }) => {
            assert_eq!(expected, child.meta.parent.expect("it has one").digest);
        }
        other => panic!("{other:?}"),
    }
}

const ROOT: &str = "FORKD_STORE_CHAIN_TEST_ROOT";
const STEP: &str = "FORKD_STORE_CHAIN_TEST_STEP";
/// How many steps [`dies_between_steps`] has.
const STEPS: u32 = 8;

/// The part of a process that dies: kills itself after as many steps as it is told.
#[test]
#[ignore = "run by the test below as a process of its own"]
fn dies_between_steps() {
    let root = std::env::var_os(ROOT).expect("set by the test that runs this");
    let last: u32 = std::env::var(STEP).expect("set too").parse().expect("a number");
    let mut done = 0;
    let mut step = || {
        done += 1;
        if done > last {
            let own = rustix::process::getpid();
            rustix::process::kill_process(own, rustix::process::Signal::KILL).expect("kill");
        }
    };
    let store = Store::open(Path::new(&root)).expect("open");
    let base = store.get(&tag("base")).expect("there");
    step();
    let half = store.stage(&tag("child")).expect("stage");
    fs::write(half.path().join("memory.layer"), "half of").expect("write");
    step();
    let (whole, mut meta) = staged(&store, "child", b"child");
    meta.parent = Some(ParentRef { tag: tag("base"), digest: base.digest });
    step();
    let child = store.publish(whole, meta, false).expect("publish");
    step();
    publish(&store, "grandchild", b"grandchild", Some(&child)).expect("publish");
    step();
    store.remove(&tag("grandchild")).expect("remove");
    step();
    store.remove_forced(&tag("base")).expect("forced");
    step();
    drop(half);
    step();
}

#[test]
fn a_writer_killed_between_any_two_steps_leaves_whole_chains() {
    for last in 0..STEPS {
        let dir = tempfile::tempdir().expect("tempdir");
        let root = dir.path().join("root");
        let store = Store::open(&root).expect("open");
        publish(&store, "base", b"base", None).expect("publish");
        drop(store);
        let status = Command::new(std::env::current_exe().expect("own path"))
            .args(["--exact", "dies_between_steps", "--ignored", "--nocapture"])
            .envs([(ROOT, root.as_os_str()), (STEP, last.to_string().as_ref())])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status()
            .expect("run");
        assert!(!status.success(), "step {last}: {status}");
        let left = root.join("staging").read_dir().expect("list").count();
        assert_eq!(left > 0, (1..7).contains(&last), "step {last}: {left} in staging");
        let store = Store::open(&root).expect("the lock died with its holder");
        assert_eq!(leftovers(&store), 0, "step {last}");
        let listed = store.list().expect("list");
        let names: Vec<_> = listed.iter().map(|one| one.tag().as_str()).collect();
        let expected: &[&str] = match last {
            0..=2 => &["base"],
            3 => &["base", "child"],
            4 => &["base", "child", "grandchild"],
            5 => &["base", "child"],
            _ => &["child"],
        };
        assert_eq!(names, expected, "step {last}");
        for one in &listed {
            assert!(matches!(one, Listed::Ready { .. }), "step {last}: {one:?}");
            let chain = store.chain(one.tag());
            assert_eq!(chain.is_ok(), last < 6, "step {last}: {chain:?}");
        }
    }
}
