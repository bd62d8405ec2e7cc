//! A snapshot that no guest made: pages like those of one, in a store of their own.
//!
//! Three eighths of memory and a quarter of the disk hold data, in stretches of some pages: half of it program code
//! (this program's own), a third words like those of a heap, the rest noise, as compressed files and keys are.

use std::fs::{self, File};
use std::io::Write;

use anyhow::Context as _;
use forkd_memory::{LayerSummary, LayerWriter};
use forkd_proto::monitor::SnapshotFacts;
use forkd_store::{Boot, CpuFacts, MEMORY_LAYER, SnapshotMeta, StagedSnapshot, Store, VMSTATE, disk_layer_name};
use forkd_types::{Digest, PAGE_SIZE, PageCount, Tag};

const PAGE: usize = PAGE_SIZE as usize;
/// Pages of a kind come in stretches of this many.
const STRETCH: u64 = 16;

/// Writes a snapshot `tag` of a guest with `memory_bytes` of memory, and a disk of half of that, into `store`.
pub(super) fn write(store: &Store, tag: &Tag, memory_bytes: u64) -> anyhow::Result<()> {
    let pages = Pages { code: fs::read("/proc/self/exe").context("could not read this program")? };
    let disk_bytes = memory_bytes / 2;
    let mut kernel = store.stage_blob()?;
    kernel.write_all(&pages.code[..pages.code.len().min(16 << 20)])?;
    let mut initramfs = store.stage_blob()?;
    initramfs.write_all(&noise(1, 4 << 20))?;
    let mut image = store.stage_blob()?;
    for page in 0..disk_bytes / PAGE_SIZE {
        image.write_all(&pages.page(page, 7, 2).unwrap_or_else(|| vec![0; PAGE]))?;
    }

    let staged = store.stage(tag)?;
    let vmstate = noise(2, 64 << 10);
    fs::write(staged.path().join(VMSTATE), &vmstate)?;
    let memory = layer(&staged, MEMORY_LAYER, memory_bytes, |page| pages.page(page, 3, 3))?;
    let disk = layer(&staged, &disk_layer_name(0), disk_bytes, |page| pages.page(page, 5, 1).filter(|_| page < 4096))?;
    let facts = SnapshotFacts {
        vcpus: 1,
        memory_bytes,
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
        kernel: kernel.finish(None)?,
        initramfs: Some(initramfs.finish(None)?),
        kernel_release: "none".to_owned(),
        agent_version: "none".to_owned(),
        guest_cid: 3,
        cpu: CpuFacts::default(),
    };
    let disks = [(image.finish(None)?, disk_bytes)];
    let meta = SnapshotMeta::new(tag.clone(), 0, &facts, staged.vmstate_bytes()?, &disks, boot);
    store.publish(staged, meta, false)?;
    Ok(())
}

fn layer(
    staged: &StagedSnapshot,
    name: &str,
    bytes: u64,
    page_at: impl Fn(u64) -> Option<Vec<u8>>,
) -> anyhow::Result<LayerSummary> {
    let path = staged.path().join(name);
    let file = File::options().read(true).write(true).create_new(true).open(path)?;
    let pages = PageCount(bytes / PAGE_SIZE);
    let mut writer = LayerWriter::new(file, pages)?;
    for page in 0..pages.0 {
        if let Some(content) = page_at(page) {
            writer.store(page, &content)?;
        }
    }
    Ok(writer.finish()?)
}

/// Where pages come from.
struct Pages {
    code: Vec<u8>,
}

impl Pages {
    /// The content of a page, if it is among the `eighths` of all that hold any; `seed` makes files differ.
    fn page(&self, page: u64, seed: u64, eighths: u64) -> Option<Vec<u8>> {
        let kind = mix((page / STRETCH) ^ (seed << 40));
        if kind % 8 >= eighths {
            return None;
        }
        let own = mix(page ^ (seed << 32));
        Some(match kind >> 8 & 31 {
            0..16 => {
                let at = page as usize * PAGE % (self.code.len() - PAGE);
                self.code[at..at + PAGE].to_vec()
            }
            16..27 => heap(own),
            _ => noise(own, PAGE),
        })
    }
}

/// Words as objects on a heap have them: pointers into one region, small numbers, zeros.
fn heap(seed: u64) -> Vec<u8> {
    let word = |index: u64| {
        let random = mix(seed ^ index);
        match random % 4 {
            0 => 0x0000_7f12_3400_0000 + (random >> 8 & 0xf_ffff) * 16,
            1 => random >> 8 & 0xff,
            2 => 0,
            _ => 1,
        }
    };
    (0..PAGE as u64 / 8).flat_map(|index| word(index).to_le_bytes()).collect()
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Spreads the bits of a number over all of another (the finalizer of SplitMix64).
fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}
