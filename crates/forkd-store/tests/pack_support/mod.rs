//! Stores with chains of snapshots whose layers are real and sparse, and packs taken apart.

#![allow(dead_code, unreachable_pub)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use forkd_memory::{LayerSummary, LayerWriter, layer};
use forkd_proto::monitor::SnapshotFacts;
use forkd_store::pack::{PackError, PackOptions, UnpackOptions, Unpacked};
use forkd_store::{Boot, CpuFacts, MEMORY_LAYER, ParentRef, Snapshot, SnapshotMeta, Store, VMSTATE, disk_layer_name};
use forkd_types::{Digest, PAGE_SIZE, PageCount, Tag};

/// Pages of the guests.
pub const MEMORY_PAGES: u64 = 16_384;
/// Blocks of their disks.
pub const DISK_PAGES: u64 = 2_048;

pub fn tag(text: &str) -> Tag {
    text.parse().expect("legal tag")
}

/// Bytes that do not compress, different for each seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// An empty store.
pub fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = Store::open(&dir.path().join("root")).expect("open");
    (dir, store)
}

/// What a snapshot is made of.
struct Content {
    created: u64,
    vmstate: Vec<u8>,
    memory_pages: u64,
    memory: Vec<(u64, Vec<u8>)>,
    disk_pages: u64,
    disk: Vec<(u64, Vec<u8>)>,
    kernel: Vec<u8>,
    initramfs: Vec<u8>,
    image: Vec<u8>,
}

/// Publishes a snapshot; `seed` makes it unlike others.
pub fn publish(store: &Store, name: &str, seed: u64, parent: Option<&Snapshot>) -> Snapshot {
    // Some pages alone, some in runs.
    let page = |index: u64| (index * 7 + index % 2 * 3, noise(seed ^ index << 8, PAGE_SIZE as usize));
    let mut image = vec![0; (DISK_PAGES * PAGE_SIZE) as usize];
    image[1024..3024].copy_from_slice(&noise(3, 2000));
    image[700_000..760_000].copy_from_slice(&noise(4, 60_000));
    let content = Content {
        created: 1_795_000_000 + seed,
        vmstate: noise(seed, 9_000),
        memory_pages: MEMORY_PAGES,
        memory: (0..40).map(page).collect(),
        disk_pages: DISK_PAGES,
        disk: (0..5).map(page).collect(),
        kernel: noise(1, 60_000),
        initramfs: noise(2, 20_001),
        image,
    };
    publish_content(store, name, content, parent)
}

/// Publishes a snapshot of a few pages full of `fill`, which compresses to next to nothing.
pub fn publish_small(store: &Store, name: &str, fill: u8, parent: Option<&Snapshot>) -> Snapshot {
    let pages = |numbers: [u64; 3]| numbers.map(|number| (number, vec![fill; PAGE_SIZE as usize])).to_vec();
    let mut image = vec![0; 64 << 10];
    image[8192..12_000].fill(b'd');
    let content = Content {
        created: 1_795_344_404,
        vmstate: vec![fill; 700],
        memory_pages: 512,
        memory: pages([0, 1, 300]),
        disk_pages: 16,
        disk: pages([2, 5, 15]),
        kernel: vec![b'k'; 5000],
        initramfs: vec![b'i'; 100],
        image,
    };
    publish_content(store, name, content, parent)
}

fn publish_content(store: &Store, name: &str, content: Content, parent: Option<&Snapshot>) -> Snapshot {
    let staged = store.stage(&tag(name)).expect("stage");
    let vmstate = content.vmstate;
    fs::write(staged.path().join(VMSTATE), &vmstate).expect("write");
    let layer = |file: &str, pages: u64, stored: &[(u64, Vec<u8>)]| -> LayerSummary {
        let file =
            File::options().read(true).write(true).create_new(true).open(staged.path().join(file)).expect("create");
        let mut writer = LayerWriter::new(file, PageCount(pages)).expect("begin");
        for (page, bytes) in stored {
            writer.store(*page, bytes).expect("store");
        }
        writer.finish().expect("finish")
    };
    let memory = layer(MEMORY_LAYER, content.memory_pages, &content.memory);
    let disk = layer(&disk_layer_name(0), content.disk_pages, &content.disk);
    let facts = SnapshotFacts {
        vcpus: 1,
        memory_bytes: content.memory_pages * PAGE_SIZE,
        vmstate_digest: Digest::from_bytes(*blake3::hash(&vmstate).as_bytes()),
        memory_digest: memory.digest,
        memory_pages: memory.pages.0,
        memory_zero_pages: 0,
        disks: vec![(disk.digest, disk.pages.0)],
        disk_numbers: vec![0],
        disk_zero_blocks: vec![0],
        stored_bytes: 0,
    };
    let boot = Boot {
        kernel: blob(store, &content.kernel),
        initramfs: Some(blob(store, &content.initramfs)),
        kernel_release: "6.12".into(),
        agent_version: "0.1.0".into(),
        guest_cid: 3,
        cpu: CpuFacts::default(),
    };
    let base = blob(store, &content.image);
    let vmstate_bytes = staged.vmstate_bytes().expect("written");
    let disks = [(base, content.disk_pages * PAGE_SIZE)];
    let mut meta = SnapshotMeta::new(tag(name), content.created, &facts, vmstate_bytes, &disks, boot);
    meta.parent = parent.map(|parent| ParentRef { tag: parent.meta.tag.clone(), digest: parent.digest });
    store.publish(staged, meta, false).expect("publish")
}

fn blob(store: &Store, bytes: &[u8]) -> Digest {
    let mut writer = store.stage_blob().expect("stage");
    writer.write_all(bytes).expect("write");
    writer.finish(None).expect("finish")
}

/// A store with the chain `base` ← `one` ← `two`.
pub fn chain_of_three() -> (tempfile::TempDir, Store) {
    let (dir, store) = store();
    let base = publish(&store, "base", 10, None);
    let one = publish(&store, "one", 11, Some(&base));
    publish(&store, "two", 12, Some(&one));
    (dir, store)
}

pub fn pack(store: &Store, name: &str) -> Vec<u8> {
    pack_with(store, name, &PackOptions::default())
}

pub fn pack_with(store: &Store, name: &str, options: &PackOptions) -> Vec<u8> {
    let mut bytes = Vec::new();
    let pack = store.pack(&tag(name), options, |_| ()).expect("read");
    pack.write(&mut bytes, |_| ()).expect("write");
    bytes
}

pub fn unpack(store: &Store, pack: &[u8]) -> Result<Unpacked, PackError> {
    unpack_with(store, pack, &UnpackOptions::default())
}

pub fn unpack_with(store: &Store, pack: &[u8], options: &UnpackOptions) -> Result<Unpacked, PackError> {
    store.unpack(pack, options, |path| layer::verify(path, |_| ()), |_| ())
}

/// What is on its way, in or out.
pub fn leftovers(store: &Store) -> usize {
    ["staging", "arriving"].iter().map(|dir| store.root().join(dir).read_dir().expect("list").count()).sum()
}

/// Every file of the store by its path, with its content; directories are listed too.
pub fn contents(store: &Store) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![store.root().join("snapshots"), store.root().join("blobs")];
    while let Some(dir) = dirs.pop() {
        for entry in dir.read_dir().expect("list") {
            let path = entry.expect("entry").path();
            let name = path.strip_prefix(store.root()).expect("below").display().to_string();
            if path.is_dir() {
                found.insert(format!("{name}/"), Vec::new());
                dirs.push(path);
            } else {
                found.insert(name, fs::read(&path).expect("read"));
            }
        }
    }
    found
}

/// Whether every digest in the store is right.
pub fn is_whole(store: &Store, name: &str) -> bool {
    store.verify(&tag(name), |path| layer::verify(path, |_| ()), |_| ()).is_ok_and(|report| report.is_good())
}

/// Makes a file of `bytes` without a single hole.
pub fn rewrite_without_holes(path: &Path) {
    let content = fs::read(path).expect("read");
    let dense = path.with_extension("dense");
    fs::write(&dense, content).expect("write");
    fs::rename(dense, path).expect("rename");
}

/// Leaves holes in a file wherever a file system block is zero.
pub fn dig_holes(path: &Path) {
    let content = fs::read(path).expect("read");
    let sparse = path.with_extension("sparse");
    let mut file = File::create(&sparse).expect("create");
    for (index, block) in content.chunks(4096).enumerate() {
        if block.iter().any(|&byte| byte != 0) {
            file.seek(SeekFrom::Start(index as u64 * 4096)).expect("seek");
            file.write_all(block).expect("write");
        }
    }
    file.set_len(content.len() as u64).expect("size");
    fs::rename(sparse, path).expect("rename");
}

/// A pack as the members of its archive, to be spoilt and put together again.
#[derive(Clone)]
pub struct Members(pub Vec<Member>);

/// One header with its content; of a sparse member there are two.
#[derive(Clone)]
pub struct Member {
    pub header: tar::Header,
    pub content: Vec<u8>,
}

impl Member {
    pub fn new(path: &str, content: &[u8]) -> Self {
        let mut header = tar::Header::new_ustar();
        header.set_path(path).expect("a short path");
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(315_532_800);
        header.set_entry_type(tar::EntryType::Regular);
        header.set_cksum();
        Self { header, content: content.to_vec() }
    }

    pub fn path(&self) -> String {
        String::from_utf8_lossy(&self.header.path_bytes()).into_owned()
    }

    /// Makes the header agree with the content again.
    pub fn resize(&mut self) {
        self.header.set_size(self.content.len() as u64);
        self.header.set_cksum();
    }
}

impl Members {
    pub fn of(pack: &[u8]) -> Self {
        let archive = zstd::decode_all(pack).expect("sound zstd");
        let mut archive = tar::Archive::new(archive.as_slice());
        let entries = archive.entries().expect("an archive").raw(true);
        let members = entries.map(|entry| {
            let mut entry = entry.expect("a member");
            let mut content = Vec::new();
            entry.read_to_end(&mut content).expect("its content");
            Member { header: entry.header().clone(), content }
        });
        Self(members.collect())
    }

    pub fn archive(&self) -> Vec<u8> {
        let mut archive = Vec::new();
        for Member { header, content } in &self.0 {
            archive.extend_from_slice(header.as_bytes());
            archive.extend_from_slice(content);
            archive.resize(archive.len().next_multiple_of(512), 0);
        }
        archive.resize(archive.len() + 1024, 0);
        archive
    }

    pub fn pack(&self) -> Vec<u8> {
        compress(&self.archive())
    }

    pub fn position(&self, ends_with: &str) -> usize {
        let found = self.0.iter().position(|member| member.path().ends_with(ends_with));
        found.unwrap_or_else(|| panic!("no member ends with {ends_with}"))
    }

    /// Changes the manifest.
    pub fn edit_manifest(&mut self, edit: impl FnOnce(&mut serde_json::Value)) {
        let mut value = serde_json::from_slice(&self.0[0].content).expect("json");
        edit(&mut value);
        self.0[0].content = serde_json::to_vec(&value).expect("plain data");
        self.0[0].resize();
    }
}

/// Puts the right digits into the seal of a description that was changed.
pub fn seal(text: &mut [u8]) {
    const BEFORE: &[u8] = b"\"seal\": \"blake3:";
    let at = text.windows(BEFORE.len()).rposition(|window| window == BEFORE).expect("a seal") + BEFORE.len();
    text[at..at + 64].fill(b'0');
    let digits = blake3::hash(text).to_hex();
    text[at..at + 64].copy_from_slice(digits.as_bytes());
}

pub fn compress(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).expect("compress")
}
