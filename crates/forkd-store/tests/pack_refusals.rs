//! What is not exactly a pack is refused by name and leaves nothing.

mod pack_support;

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::OnceLock;

use forkd_store::Store;
use forkd_store::pack::{PackError, UnpackOptions};
use forkd_types::Digest;
use pack_support::*;
use proptest::prelude::*;
use serde_json::json;

/// A pack of the chain of three.
fn good() -> &'static [u8] {
    static PACK: OnceLock<Vec<u8>> = OnceLock::new();
    PACK.get_or_init(|| pack(&chain_of_three().1, "two"))
}

/// The error of unpacking into an empty store, of which nothing may be left.
fn refused(pack: &[u8]) -> PackError {
    let (_dir, store) = store();
    match unpack(&store, pack) {
        Err(error) => {
            assert!(contents(&store).is_empty(), "{error} left {:?}", contents(&store).keys());
            assert_eq!(leftovers(&store), 0, "{error}");
            error
        }
        Ok(unpacked) => panic!("it was taken in: {unpacked:?}"),
    }
}

/// The error of a pack with spoilt members.
fn spoilt(spoil: impl FnOnce(&mut Members)) -> PackError {
    let mut members = Members::of(good());
    spoil(&mut members);
    refused(&members.pack())
}

macro_rules! assert_refused {
    ($error:expr, $pattern:pat, $($says:expr),+) => {{
        let error = $error;
        let text = error.to_string();
        assert!(matches!(error, $pattern), "{error:?}");
        $(assert!(text.contains($says), "{text:?} does not say {:?}", $says);)+
    }};
}

#[test]
fn the_parts_that_are_spoilt_below_make_a_good_pack_when_they_are_not() {
    let (_dir, store) = store();
    unpack(&store, &Members::of(good()).pack()).expect("one frame is as good as two");
    assert!(is_whole(&store, "two"));
}

#[test]
fn what_is_not_compressed_with_zstd() {
    assert_refused!(refused(b""), PackError::NotZstd { .. }, "not a pack", "[]");
    assert_refused!(refused(b"PK"), PackError::NotZstd { .. }, "[50, 4b]");
    assert_refused!(refused(&Members::of(good()).archive()), PackError::NotZstd { .. }, "not compressed with zstd");
    assert_refused!(refused(b"\x1f\x8b\x08\0\0\0\0\0"), PackError::NotZstd { .. }, "[1f, 8b, 08, 00]");
}

#[test]
fn an_archive_of_something_else() {
    let mut other = Members(vec![Member::new("README", b"hello")]);
    assert_refused!(refused(&other.pack()), PackError::NotAPack { .. }, "\"README\"");
    assert_refused!(refused(&compress(b"hello")), PackError::Truncated { .. }, "manifest.json");
    assert_refused!(refused(&compress(&[7; 4096])), PackError::NotAPack { .. }, "manifest.json");
    assert_refused!(refused(&compress(&[0; 4096])), PackError::NotAPack { .. }, "manifest.json");
    other.0.extend(Members::of(good()).0);
    assert_refused!(refused(&other.pack()), PackError::NotAPack { .. }, "\"README\"");
}

#[test]
fn a_pack_of_the_other_engine_is_recognised() {
    let manifest = "forkd_pack_version = 2\ntag = \"py\"\ncreated_at = \"2026-01-01T00:00:00Z\"\n\
                    base_image = \"python:3.12-slim\"\n\n[[chain]]\ntag = \"other\"\nfiles = []\n";
    let foreign = Members(vec![Member::new("manifest.toml", manifest.as_bytes()), Member::new("py/vmstate", b"x")]);
    assert_refused!(
        refused(&foreign.pack()),
        PackError::Foreign { .. },
        "another engine",
        "forkd_pack_version 2",
        "forkd from-image \"python:3.12-slim\" --tag py"
    );
    let scant = Members(vec![Member::new("manifest.toml", b"forkd_pack_version = 1\ntag = \"../x\"\n")]);
    assert_refused!(refused(&scant.pack()), PackError::Foreign { .. }, "forkd from-image IMAGE --tag NAME");
    let other = Members(vec![Member::new("manifest.toml", b"name = 1\n")]);
    assert_refused!(refused(&other.pack()), PackError::NotAPack { .. }, "manifest.toml");
}

#[test]
fn versions_and_engines_that_are_not_ours() {
    let with = |key: &'static str, value: serde_json::Value| spoilt(|m| m.edit_manifest(|json| json[key] = value));
    assert_refused!(with("version", 2.into()), PackError::Version { found: 2 }, "versions 1 to 1", "newer forkd");
    assert_refused!(with("version", 0.into()), PackError::Version { .. }, "version 0");
    assert_refused!(with("engine", "qemu".into()), PackError::Engine { .. }, "\"qemu\"");
    assert_refused!(with("format", "zip".into()), PackError::Manifest { .. }, "\"zip\"");
    // Of a later version nothing else has to make sense.
    let later = spoilt(|members| {
        members.edit_manifest(|json| *json = json!({"format": "forkd-pack", "version": 7, "engine": "x", "tag": 3}));
    });
    assert_refused!(later, PackError::Version { found: 7 }, "7");
}

#[test]
fn manifests_that_make_no_sense() {
    let with = |edit: fn(&mut serde_json::Value)| spoilt(|members| members.edit_manifest(edit));
    assert_refused!(with(|m| *m = json!([])), PackError::Manifest { .. }, "malformed");
    assert_refused!(with(|m| m["tag"] = "../x".into()), PackError::Manifest { .. }, "../x");
    assert_refused!(with(|m| m["tag"] = "one".into()), PackError::Manifest { .. }, "last snapshot is not one");
    assert_refused!(with(|m| m["snapshots"] = json!([])), PackError::Manifest { .. }, "last snapshot");
    assert_refused!(
        with(|m| m["snapshots"][0]["tag"] = "two".into()),
        PackError::Manifest { .. },
        "snapshot two twice"
    );
    for name in ["../vmstate", "/etc/passwd", "a/b", "", ".", "..", ".x", "a b", "a\u{0}"] {
        let error = spoilt(|members| members.edit_manifest(|m| m["snapshots"][1]["files"][2]["name"] = name.into()));
        assert_refused!(error, PackError::Manifest { .. }, "plain file name");
    }
    let twice = |m: &mut serde_json::Value| m["snapshots"][1]["files"][3]["name"] = "memory.layer".into();
    assert_refused!(with(twice), PackError::Manifest { .. }, "memory.layer twice");
    assert_refused!(
        with(|m| drop(m["snapshots"][1]["files"].as_array_mut().expect("list").remove(0))),
        PackError::Manifest { .. },
        "first files"
    );
    assert_refused!(
        with(|m| m["snapshots"][1]["files"][2]["data_bytes"] = (1u64 << 60).into()),
        PackError::Manifest { .. },
        "memory.layer has"
    );
    assert_refused!(with(|m| m["blobs"][0]["bytes"] = u64::MAX.into()), PackError::Manifest { .. }, "at most");
    assert_refused!(with(|m| m["blobs"][0]["bytes"] = (-1).into()), PackError::Manifest { .. }, "malformed");
    let swapped = |m: &mut serde_json::Value| m["blobs"].as_array_mut().expect("list").swap(0, 1);
    assert_refused!(with(swapped), PackError::Manifest { .. }, "order of their digests");
    let repeated = |m: &mut serde_json::Value| m["blobs"][1] = m["blobs"][0].clone();
    assert_refused!(with(repeated), PackError::Manifest { .. }, "each once");
    let long = |m: &mut serde_json::Value| m["description"] = "x".repeat(5000).into();
    assert_refused!(with(long), PackError::Manifest { .. }, "longer than 4096");
    let many = |m: &mut serde_json::Value| {
        let one = m["snapshots"][0].clone();
        m["snapshots"] = vec![one; 70].into();
    };
    assert_refused!(with(many), PackError::Manifest { .. }, "holds 70 snapshots");
    let one_less = |m: &mut serde_json::Value| drop(m["blobs"].as_array_mut().expect("list").pop());
    assert_refused!(with(one_less), PackError::Manifest { .. }, "not those that its snapshots need");
    // Before it is read.
    let huge = spoilt(|members| {
        members.0[0].content = vec![b' '; 5 << 20];
        members.0[0].resize();
    });
    assert_refused!(huge, PackError::Manifest { .. }, "5242880 bytes");
}

#[test]
fn members_that_would_leave_the_pack_or_are_no_files() {
    let kinds: [(tar::EntryType, &str); 8] = [
        (tar::EntryType::Symlink, "symbolic link"),
        (tar::EntryType::Link, "hard link"),
        (tar::EntryType::Char, "device node"),
        (tar::EntryType::Block, "device node"),
        (tar::EntryType::Fifo, "FIFO"),
        (tar::EntryType::Directory, "directory"),
        (tar::EntryType::GNULongName, "'L'"),
        (tar::EntryType::GNUSparse, "'S'"),
    ];
    // Also at the place and with the name of a member that is due.
    for place in ["vmstate", "snapshot.json", "memory.layer"] {
        for (kind, says) in kinds {
            let error = spoilt(|members| {
                let at = members.position(place);
                members.0[at].header.set_entry_type(kind);
                members.0[at].header.set_link_name("/etc/passwd").expect("short");
                members.0[at].header.set_cksum();
            });
            assert_refused!(error, PackError::Member { .. }, says);
        }
        for (path, says) in [
            ("/etc/cron.d/x", "absolute path"),
            ("../../etc/passwd", "leads out"),
            ("snapshots/base/../../x", "leads out"),
            ("snapshots/..", "leads out"),
        ] {
            let error = spoilt(|members| {
                let at = members.position(place);
                let mut member = Member::new("x", b"evil");
                member.header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
                member.resize();
                members.0.insert(at, member);
            });
            assert_refused!(error, PackError::Member { .. }, says, path);
        }
    }
    // An extended header may say another name than the header itself.
    let error = spoilt(|members| {
        let at = members.position("PaxHeaders/memory.layer");
        let text = String::from_utf8(members.0[at].content.clone()).expect("text");
        members.0[at].content = text.replace("snapshots/base", "../../../base").into_bytes();
        assert_ne!(members.0[at].content, text.into_bytes());
    });
    assert_refused!(error, PackError::Member { .. }, "unlike what the manifest declares");
    for (name, spoil) in [
        ("mode", (|header| header.set_mode(0o4755)) as fn(&mut tar::Header)),
        ("owner", |header| header.set_uid(7)),
        ("time", |header| header.set_mtime(7)),
        ("link name", |header| header.set_link_name("x").expect("short")),
    ] {
        let error = spoilt(|members| {
            let at = members.position("base/vmstate");
            spoil(&mut members.0[at].header);
            members.0[at].header.set_cksum();
        });
        assert_refused!(error, PackError::Member { .. }, "unlike what the manifest declares");
        let _ = name;
    }
    let error = spoilt(|members| {
        let at = members.position("base/vmstate");
        members.0[at].header.as_mut_bytes()[3] ^= 1;
    });
    assert_refused!(error, PackError::Member { .. }, "damaged header");
}

#[test]
fn members_that_are_too_many_too_few_or_elsewhere() {
    let error = spoilt(|members| {
        let at = members.position("one/vmstate");
        let twice = members.0[members.position("base/vmstate")].clone();
        members.0.insert(at, twice);
    });
    assert_refused!(error, PackError::Duplicate { .. }, "base/vmstate", "twice");
    let error = spoilt(|members| {
        let twice = members.0[0].clone();
        members.0.insert(1, twice);
    });
    assert_refused!(error, PackError::Duplicate { .. }, "manifest.json");
    for place in ["base/snapshot.json", "one/vmstate", "two/PaxHeaders/memory.layer"] {
        let error = spoilt(|members| {
            let at = members.position(place);
            members.0.insert(at, Member::new("snapshots/base/extra", b"x"));
        });
        assert_refused!(error, PackError::Undeclared { .. }, "snapshots/base/extra");
    }
    let error = spoilt(|members| members.0.push(Member::new("blobs/more", b"x")));
    assert_refused!(error, PackError::Undeclared { .. }, "blobs/more");
    for missing in ["base/snapshot.json", "one/vmstate"] {
        let error = spoilt(|members| drop(members.0.remove(members.position(missing))));
        assert_refused!(error, PackError::Missing { .. }, missing);
    }
    let error = spoilt(|members| drop(members.0.drain(members.position("two/PaxHeaders/memory.layer")..)));
    assert_refused!(error, PackError::Missing { .. }, "two/memory.layer");
    let error = spoilt(|members| {
        let (one, two) = (members.position("one/vmstate"), members.position("two/vmstate"));
        members.0.swap(one, two);
    });
    assert_refused!(error, PackError::Missing { .. }, "one/vmstate");
    // A declared sparse member that comes as a plain one.
    let error = spoilt(|members| {
        let at = members.position("base/PaxHeaders/memory.layer");
        members.0.remove(at);
    });
    assert!(matches!(error, PackError::Undeclared { .. } | PackError::Member { .. }), "{error:?}");
}

#[test]
fn contents_of_another_size() {
    for (place, more) in [("base/vmstate", true), ("base/vmstate", false), ("one/snapshot.json", true)] {
        let error = spoilt(|members| {
            let at = members.position(place);
            if more {
                members.0[at].content.push(b' ');
            } else {
                members.0[at].content.pop();
            }
            members.0[at].resize();
        });
        assert_refused!(error, PackError::Member { .. }, place, "unlike what the manifest declares");
    }
    let error = spoilt(|members| {
        let at = members.position("GNUSparseFile.0/memory.layer");
        members.0[at].content.extend_from_slice(&[1; 4096]);
        members.0[at].resize();
    });
    assert_refused!(error, PackError::Member { .. }, "memory.layer", "unlike");
}

#[test]
fn contents_with_another_digest() {
    let mut members = Members::of(good());
    for at in 1..members.0.len() {
        let original = members.0[at].clone();
        for index in [0, original.content.len() / 2, original.content.len() - 1] {
            members.0[at].content[index] ^= 1;
            let error = refused(&members.pack());
            let known = matches!(error, PackError::Digest { .. } | PackError::Member { .. });
            assert!(known, "byte {index} of {}: {error:?}", original.path());
            members.0[at] = original.clone();
        }
    }
}

/// BLAKE3 as the manifest records it of a member with content `content`, sparse or not.
fn manifest_digest(content: &[u8], sparse: bool) -> String {
    if !sparse {
        return Digest::from_bytes(*blake3::hash(content).as_bytes()).to_string();
    }
    let count: usize = String::from_utf8_lossy(content).lines().next().expect("a line").parse().expect("a number");
    let text: usize = content.split_inclusive(|&byte| byte == b'\n').take(1 + 2 * count).map(<[u8]>::len).sum();
    let (map, data) = content.split_at(text.next_multiple_of(512));
    let both = [*blake3::hash(map).as_bytes(), *blake3::hash(data).as_bytes()].concat();
    Digest::from_bytes(*blake3::hash(&both).as_bytes()).to_string()
}

/// A pack whose manifest was made to fit a spoilt member: only what stands behind it can tell.
fn forged(place: &str, pointer: &str, spoil: impl FnOnce(&mut Vec<u8>)) -> PackError {
    let sparse = place.contains("GNUSparseFile");
    spoilt(|members| {
        let at = members.position(place);
        let before = manifest_digest(&members.0[at].content, sparse);
        spoil(&mut members.0[at].content);
        members.0[at].resize();
        let (after, len) = (manifest_digest(&members.0[at].content, sparse), members.0[at].content.len());
        members.edit_manifest(|json| {
            let entry = json.pointer_mut(pointer).expect("an entry");
            assert_eq!(entry["digest"], before, "the digest is computed as it is here");
            entry["digest"] = after.into();
            if !sparse {
                entry["bytes"] = len.into();
                entry["data_bytes"] = len.into();
            }
        });
    })
}

#[test]
fn manifests_that_were_made_to_fit() {
    let flip_last = |content: &mut Vec<u8>| *content.last_mut().expect("not empty") ^= 1;
    let layer = "snapshots/one/GNUSparseFile.0/memory.layer";
    assert_refused!(forged(layer, "/snapshots/1/files/2", flip_last), PackError::Layer { .. }, "memory.layer of one");
    // A layer that is whole, of another snapshot.
    let members = Members::of(good());
    let other = members.0[members.position("snapshots/two/GNUSparseFile.0/memory.layer")].content.clone();
    let exchanged = forged(layer, "/snapshots/1/files/2", |content| {
        assert_eq!(content.len(), other.len(), "the manifest's sizes still fit");
        *content = other;
    });
    assert_refused!(exchanged, PackError::Digest { .. }, "memory.layer of one");
    assert_refused!(
        forged("one/vmstate", "/snapshots/1/files/1", flip_last),
        PackError::Description { .. },
        "another vmstate"
    );
    let (blob, at) = {
        let members = Members::of(good());
        let at = members.0.iter().rposition(|member| member.path().contains("GNUSparseFile")).expect("a blob");
        (members.0[at].path(), "/blobs/2")
    };
    assert_refused!(forged(&blob, at, flip_last), PackError::Digest { .. }, "blob ");
    // A changed ancestor is not what its child was made from.
    let replace = |from: &'static str, to: &'static str| {
        move |content: &mut Vec<u8>| {
            let text = String::from_utf8(content.clone()).expect("text");
            assert!(text.contains(from), "{text}");
            *content = text.replace(from, to).into_bytes();
            seal(content);
        }
    };
    let description = |index: usize, from: &'static str, to: &'static str| {
        let tag = ["base", "one", "two"][index];
        forged(&format!("{tag}/snapshot.json"), &format!("/snapshots/{index}/files/0"), replace(from, to))
    };
    assert_refused!(
        description(0, "\"warm\": []", "\"warm\": [\"x\"]"),
        PackError::Description { .. },
        "does not derive from the one before"
    );
    assert_refused!(description(2, "\"tag\": \"two\"", "\"tag\": \"three\""), PackError::Description { .. }, "three");
    assert_refused!(description(2, "memory.layer", "../../../../x"), PackError::Description { .. }, "not a plain name");
    assert_refused!(description(2, "memory.layer", "other.layer"), PackError::Description { .. }, "other files");
    assert_refused!(
        description(2, "\"memory_bytes\": 67108864", "\"memory_bytes\": 134217728"),
        PackError::Description { .. },
        "bytes of memory"
    );
    let unsealed = forged("two/snapshot.json", "/snapshots/2/files/0", |content| {
        *content =
            String::from_utf8(content.clone()).expect("text").replace("\"vcpus\": 1", "\"vcpus\": 2").into_bytes();
    });
    assert_refused!(unsealed, PackError::Description { .. }, "seal differs");
    assert_refused!(description(2, "\"vcpus\": 1", "\"vcpus\": 2"), PackError::Description { .. }, "2 vCPUs");
    assert_refused!(description(2, "\"version\": 1", "\"version\": 9"), PackError::Description { .. }, "version 9");
    assert_refused!(description(0, "\"parent\": null", "\"parent\": 3"), PackError::Description { .. }, "malformed");
}

#[test]
fn a_pack_that_does_not_fit_the_file_system_is_refused_before_anything_is_written() {
    let error = spoilt(|members| {
        members.edit_manifest(|json| {
            for file in [2, 3] {
                json["snapshots"][0]["files"][file]["bytes"] = (1u64 << 40).into();
                json["snapshots"][0]["files"][file]["data_bytes"] = (1u64 << 40).into();
            }
        });
    });
    assert_refused!(error, PackError::NoSpace { .. }, "2.0 TiB");
}

/// Gives zeros for ever, as a bomb does when it is decompressed.
struct Endless<'a>(&'a [u8]);

impl Read for Endless<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let len = self.0.read(buffer)?;
        buffer[len..].fill(0);
        Ok(buffer.len())
    }
}

#[test]
fn what_goes_on_for_ever_ends_where_the_pack_should() {
    let archive = Members::of(good()).archive();
    let bomb = zstd::Encoder::new(Vec::new(), 1).and_then(|mut encoder| {
        std::io::copy(&mut Endless(&archive).take(4 << 30), &mut encoder)?;
        encoder.finish()
    });
    let bomb = bomb.expect("compress");
    assert!(bomb.len() < 2 << 20, "4 GiB in {} bytes", bomb.len());
    let began = std::time::Instant::now();
    assert_refused!(refused(&bomb), PackError::TrailingBytes, "follow the end");
    assert!(began.elapsed().as_secs() < 5, "it was read to its end: {:?}", began.elapsed());
    // And within a member.
    let at = archive.windows(20).position(|bytes| bytes == b"snapshots/two/vmstat").expect("a member");
    let bomb = zstd::Encoder::new(Vec::new(), 1).and_then(|mut encoder| {
        std::io::copy(&mut Endless(&archive[..at + 600]).take(1 << 30), &mut encoder)?;
        encoder.finish()
    });
    assert_refused!(refused(&bomb.expect("compress")), PackError::Digest { .. }, "two/vmstate");
}

#[test]
fn what_is_cut_off_and_what_follows() {
    for at in [5, 100, 400, good().len() / 2, good().len() - 5, good().len() - 1] {
        assert_refused!(refused(&good()[..at]), PackError::Truncated { .. }, "cut off");
    }
    // Cut in the archive, whole as zstd.
    let archive = Members::of(good()).archive();
    for at in [512, 5000, archive.len() / 2 / 512 * 512, archive.len() - 1024, archive.len() - 512] {
        assert_refused!(refused(&compress(&archive[..at])), PackError::Truncated { .. }, "cut off");
    }
    for after in [b"x".as_slice(), &[0; 100], &compress(b"x"), good()] {
        assert_refused!(refused(&[good(), after].concat()), PackError::TrailingBytes, "follow");
    }
    for after in [[0u8; 512].as_slice(), &[1; 512], b"x"] {
        assert_refused!(refused(&compress(&[&archive, after].concat())), PackError::TrailingBytes, "follow");
    }
}

#[test]
fn padding_that_is_not_empty() {
    let archive = Members::of(good()).archive();
    let mut at = 0;
    let mut padded = 0;
    while archive[at] != 0 {
        let header: [u8; 512] = archive[at..at + 512].try_into().expect("a block");
        let len = tar::Header::from_byte_slice(&header).entry_size().expect("a size") as usize;
        let end = at + 512 + len;
        at = end.next_multiple_of(512);
        if end < at {
            let mut spoilt = archive.clone();
            spoilt[end] = 1;
            assert_refused!(refused(&compress(&spoilt)), PackError::Member { .. }, "padded with something else");
            padded += 1;
        }
    }
    assert!(padded > 10, "{padded} members are padded");
}

#[test]
fn a_stranger_among_the_blobs_of_the_store_is_no_shortcut() {
    // A pack is checked as a whole even when the store has all of it.
    let (_dir, store) = store();
    unpack(&store, good()).expect("unpack");
    let before = contents(&store);
    let mut members = Members::of(good());
    let last = members.0.len() - 1;
    *members.0[last].content.last_mut().expect("not empty") ^= 1;
    assert!(matches!(unpack(&store, &members.pack()), Err(PackError::Digest { .. })));
    assert!(before == contents(&store) && leftovers(&store) == 0);
}

/// A small pack and what it makes.
type Small = (Vec<u8>, BTreeMap<String, Vec<u8>>);

fn small() -> &'static Small {
    static SMALL: OnceLock<Small> = OnceLock::new();
    SMALL.get_or_init(|| {
        let (_dir, source) = store();
        publish(&source, "base", 1, None);
        (pack(&source, "base"), contents(&source))
    })
}

/// A damaged pack is refused without a trace, or makes exactly what it would have made whole.
fn refused_or_equal(store: &Store, pack: &[u8]) -> Result<(), TestCaseError> {
    match unpack_with(store, pack, &UnpackOptions::default()) {
        Ok(_) => prop_assert!(contents(store) == small().1, "something else came out"),
        Err(_) => prop_assert!(contents(store).is_empty(), "something was left"),
    }
    prop_assert_eq!(leftovers(store), 0);
    Ok(())
}

#[derive(Clone, Copy, Debug)]
enum Damage {
    Flip(u8),
    Cut,
    Insert(u8),
    Remove,
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        4 => (0u8..8).prop_map(|bit| Damage::Flip(1 << bit)),
        1 => Just(Damage::Cut),
        2 => any::<u8>().prop_map(Damage::Insert),
        1 => Just(Damage::Remove),
    ]
}

fn damaged(bytes: &[u8], at: prop::sample::Index, damage: Damage) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let at = at.index(bytes.len());
    match damage {
        Damage::Flip(bits) => bytes[at] ^= bits,
        Damage::Cut => bytes.truncate(at),
        Damage::Insert(byte) => bytes.insert(at, byte),
        Damage::Remove => drop(bytes.remove(at)),
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn any_damage_to_a_pack_is_noticed(at: prop::sample::Index, damage in damage()) {
        let (_dir, store) = store();
        refused_or_equal(&store, &damaged(&small().0, at, damage))?;
    }

    #[test]
    fn any_damage_to_the_archive_is_noticed(at: prop::sample::Index, head: bool, damage in damage()) {
        let archive = Members::of(&small().0).archive();
        // Half of them where the structure is, not the noise of the pages.
        let len = if head { 8 << 10 } else { archive.len() };
        let changed = [damaged(&archive[..len], at, damage), archive[len..].to_vec()].concat();
        let (_dir, store) = store();
        refused_or_equal(&store, &compress(&changed))?;
    }
}
