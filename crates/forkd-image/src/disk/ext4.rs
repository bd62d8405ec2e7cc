//! An ext4 image of a tree, by mke2fs, without mounting it.
//!
//! No journal. A branch or snapshot takes disk and memory in one instant, so a copy never replays
//! one; and the disk of a killed sandbox is thrown away with it. What a journal would do is write
//! metadata twice, into overlays that every sandbox pays for, wake idle guests every five seconds,
//! and make an empty 1 GiB image 33 MiB large instead of 0.7 (`mke2fs -O has_journal`). Checksums of metadata are kept: they tell a broken overlay from a broken program.

use std::fs::File;
use std::path::Path;

use forkd_types::{ByteSize, Digest};

use super::tree::Summary;
use crate::tool::Tool;
use crate::{ImageError, Result};

const BLOCK: u64 = 4096;
/// One inode for so many bytes, if that is enough for the tree.
const BYTES_PER_INODE: u64 = 16384;
/// The whole set, so that a host's `mke2fs.conf` has no say.
const FEATURES: &str = "none,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,\
                        dir_nlink,extra_isize,metadata_csum,resize_inode";
/// All times that come from making the image, not from the tree.
const FAKE_TIME: &str = "1";
/// The smallest disk; less leaves no room for the structures of the file system.
const LEAST: u64 = 16 << 20;
/// The largest; more than 16 TiB no file on a host's ext4 can have.
const MOST: u64 = 16 << 40;

/// What decides the image besides the tree.
pub(super) fn recipe() -> Result<String> {
    let said = Tool::new("mke2fs", "e2fsprogs").arg("-V");
    let mut version = String::new();
    said.run_lines(|line| {
        if version.is_empty() {
            version = line.to_owned();
        }
    })?
    .succeeded()?;
    Ok(format!("{version}\n{FEATURES} inode {BYTES_PER_INODE}"))
}

/// Whether a disk can have this size.
pub(super) fn check_size(bytes: u64) -> Result<()> {
    let reason = match bytes {
        bytes if bytes < LEAST => "at least 16M is needed",
        bytes if bytes > MOST => "at most 16T is possible",
        bytes if !bytes.is_multiple_of(BLOCK) => "it must be a multiple of 4096",
        _ => return Ok(()),
    };
    Err(ImageError::Size { size: bytes, reason })
}

/// Writes a file system of `size` bytes with the content of `tree` to `image`.
pub(super) fn make(tree: &Path, image: &Path, size: u64, summary: &Summary, recipe: &Digest) -> Result<()> {
    let uuid = uuid(recipe);
    let inodes = (size / BYTES_PER_INODE).max(summary.entries + summary.entries / 4 + 4096);
    File::create(image).and_then(|file| file.set_len(size)).map_err(ImageError::io("create", image))?;
    // In a namespace of one user, what belongs to the caller is root's.
    let mke2fs = match rustix::process::geteuid().is_root() {
        true => Tool::new("mke2fs", "e2fsprogs"),
        false => Tool::new("unshare", "util-linux").args(["--map-root-user", "--", "mke2fs"]),
    };
    let ended = mke2fs
        .args(["-q", "-F", "-t", "ext4", "-O", FEATURES, "-b", "4096", "-I", "256", "-m", "0", "-L", "forkd-root"])
        .args(["-N", &inodes.to_string(), "-U", &uuid])
        // Inode tables are zeroed now (a hole in the file), else every guest would do it.
        .args(["-E", &format!("hash_seed={uuid},lazy_itable_init=0,root_owner=0:0")])
        .arg("-d")
        .arg(tree)
        .arg(image)
        .env("E2FSPROGS_FAKE_TIME", FAKE_TIME)
        .run_lines(|_| {})?;
    if !ended.status.success() {
        let says = |word: &str| ended.tail.iter().any(|line| line.contains(word));
        return Err(if says("unshare failed") || says("uid_map") {
            ImageError::NeedsRoot { action: "building a root disk", reason: ended.tail.join("; ") }
        } else if says("No space left on device") {
            ImageError::no_space(image.parent().unwrap_or(image), Some(summary.bytes))
        } else if says("Could not allocate") {
            ImageError::TooSmall { size: ByteSize(size), needed: ByteSize(size + size / 4) }
        } else {
            ended.error()
        });
    }
    Ok(())
}

/// Flushes a finished image to disk.
pub(super) fn sync(image: &Path) -> Result<()> {
    File::open(image).and_then(|file| file.sync_all()).map_err(ImageError::io("sync", image))
}

/// A UUID (version 8: of its maker's own devising) that the recipe decides.
fn uuid(recipe: &Digest) -> String {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&recipe.as_bytes()[..16]);
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_have_their_form_and_follow_the_recipe() {
        let one = uuid(&Digest::from_bytes([0xff; 32]));
        assert_eq!(one, "ffffffff-ffff-8fff-bfff-ffffffffffff");
        assert_ne!(one, uuid(&Digest::from_bytes([0xfe; 32])));
    }

    #[test]
    fn impossible_sizes_say_what_would_be_right() {
        for (size, word) in [(1 << 20, "16M"), ((64 << 20) + 1, "4096"), (17 << 40, "16T")] {
            let error = check_size(size).expect_err("impossible").to_string();
            assert!(error.contains(word), "{error}");
        }
        check_size(64 << 20).expect("possible");
    }
}
