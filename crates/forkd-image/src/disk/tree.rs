//! Walking a directory that becomes a disk: what is in it, how much, and its digest.

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use blake3::Hasher;
use forkd_types::Digest;

use super::correction::{Correction, Corrections};
use crate::{ImageError, Result};

/// Blocks of the file system that the tree is going to.
const BLOCK: u64 = 4096;

/// How closely a tree is looked at.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Depth {
    /// Names, kinds and sizes.
    Names,
    /// Also contents, for the digest.
    Contents,
}

/// What was found.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Summary {
    /// What the content takes on a file system, bytes. Holes are not counted.
    pub(super) bytes: u64,
    /// Files, directories and links.
    pub(super) entries: u64,
    /// Of names, modes, owners, times, contents and extended attributes.
    pub(super) digest: Option<Digest>,
}

/// Looks at the tree below `root`. An ordinary user also gets back the owners that whoever reads the
/// tree in a namespace of that one user will not see.
///
/// # Errors
/// [`ImageError::Member`] for device nodes and for what is on another file system: neither belongs
/// in a root disk.
pub(super) fn inspect(root: &Path, depth: Depth) -> Result<(Summary, Corrections)> {
    let metadata = root.metadata().map_err(ImageError::io("read the directory", root))?;
    if !metadata.is_dir() {
        return Err(ImageError::io("read the directory", root)(io::Error::from(io::ErrorKind::NotADirectory)));
    }
    let mut walk = Walk {
        root,
        device: metadata.dev(),
        depth,
        summary: Summary { bytes: 0, entries: 0, digest: None },
        hasher: Hasher::new(),
        linked: HashMap::new(),
        caller: (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()),
        corrections: Corrections::default(),
    };
    walk.directory(root, &metadata)?;
    let Walk { mut summary, hasher, corrections, .. } = walk;
    if depth == Depth::Contents {
        summary.digest = Some(Digest::from_bytes(*hasher.finalize().as_bytes()));
    }
    Ok((summary, corrections))
}

struct Walk<'a> {
    root: &'a Path,
    device: u64,
    depth: Depth,
    summary: Summary,
    hasher: Hasher,
    /// Files with several names, by inode, with the first name met.
    linked: HashMap<u64, PathBuf>,
    /// Who looks.
    caller: (u32, u32),
    corrections: Corrections,
}

impl Walk<'_> {
    fn directory(&mut self, dir: &Path, metadata: &Metadata) -> Result<()> {
        self.note(dir, metadata, b"tree", &[])?;
        self.summary.bytes += metadata.len().next_multiple_of(BLOCK).max(BLOCK);
        let mut names = Vec::new();
        for entry in dir.read_dir().map_err(ImageError::io("list", dir))? {
            names.push(entry.map_err(ImageError::io("list", dir))?.path());
        }
        // The order in which a file system lists is its own.
        names.sort();
        for path in names {
            let metadata = path.symlink_metadata().map_err(ImageError::io("read", &path))?;
            self.entry(&path, &metadata)?;
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, metadata: &Metadata) -> Result<()> {
        let kind = metadata.file_type();
        if metadata.dev() != self.device {
            return Err(self.refuse(path, "is on another file system; unmount it or take a directory without it"));
        }
        if kind.is_dir() {
            self.directory(path, metadata)
        } else if kind.is_symlink() {
            let target = fs::read_link(path).map_err(ImageError::io("read the link", path))?;
            self.note(path, metadata, b"link", target.as_os_str().as_bytes())
        } else if kind.is_file() {
            self.file(path, metadata)
        } else if kind.is_fifo() {
            self.note(path, metadata, b"fifo", &[])
        } else if kind.is_socket() {
            // Nobody listens on it; the image will not have it.
            Ok(())
        } else {
            Err(self.refuse(path, "is a device node; remove it, guests have their own /dev"))
        }
    }

    fn file(&mut self, path: &Path, metadata: &Metadata) -> Result<()> {
        if metadata.nlink() > 1 {
            let first = self.linked.entry(metadata.ino()).or_insert_with(|| path.to_owned()).clone();
            if first != path {
                let target = first.strip_prefix(self.root).unwrap_or(&first);
                return self.note(path, metadata, b"same", target.as_os_str().as_bytes());
            }
        }
        self.summary.bytes += metadata.len().next_multiple_of(BLOCK).min(metadata.blocks() * 512 + BLOCK);
        self.note(path, metadata, b"file", &metadata.len().to_le_bytes())?;
        if self.depth == Depth::Contents {
            // A digest of its own, so that a file that grows meanwhile cannot pass for others.
            let mut content = Hasher::new();
            File::open(path)
                .and_then(|file| content.update_reader(file).map(drop))
                .map_err(ImageError::io("read", path))?;
            self.hasher.update(content.finalize().as_bytes());
        }
        Ok(())
    }

    /// Counts an entry and takes in everything about it that the image will have.
    fn note(&mut self, path: &Path, metadata: &Metadata, kind: &[u8; 4], detail: &[u8]) -> Result<()> {
        self.summary.entries += 1;
        let name = path.strip_prefix(self.root).unwrap_or(path);
        let (uid, gid) = self.caller;
        if uid != 0 && (metadata.uid(), metadata.gid()) != (uid, gid) {
            let seen_as = |id, own| if id == own { 0 } else { id };
            let (uid, gid) = (seen_as(metadata.uid(), uid), seen_as(metadata.gid(), gid));
            self.corrections.note(name, Correction { uid, gid, mode: None, attributes: Vec::new() });
        }
        if self.depth == Depth::Names {
            return Ok(());
        }
        self.hasher.update(kind);
        for number in [metadata.mode().into(), metadata.uid().into(), metadata.gid().into(), metadata.mtime() as u64] {
            self.hasher.update(&u64::to_le_bytes(number));
        }
        self.bytes(name.as_os_str().as_bytes());
        self.bytes(detail);
        for (name, value) in attributes(path)? {
            self.bytes(&name);
            self.bytes(&value);
        }
        // No entry begins like this, so attributes end here.
        self.hasher.update(&u64::MAX.to_le_bytes());
        Ok(())
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.hasher.update(&(bytes.len() as u64).to_le_bytes());
        self.hasher.update(bytes);
    }

    fn refuse(&self, path: &Path, reason: &str) -> ImageError {
        ImageError::Member {
            source_path: self.root.to_owned(),
            member: path.strip_prefix(self.root).unwrap_or(path).display().to_string(),
            reason: reason.to_owned(),
        }
    }
}

/// Extended attributes of a file, not of what a link leads to, sorted.
fn attributes(path: &Path) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let failed = |error: rustix::io::Errno| ImageError::io("read the attributes of", path)(error);
    let mut names = vec![0; 1 << 16];
    let length = match rustix::fs::llistxattr(path, names.as_mut_slice()) {
        Ok(length) => length,
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        Err(error) => return Err(failed(error)),
    };
    let mut found = Vec::new();
    for name in names[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 1 << 16];
        let length = rustix::fs::lgetxattr(path, name, value.as_mut_slice()).map_err(failed)?;
        value.truncate(length);
        found.push((name.to_owned(), value));
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn sample() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("tempdir");
        fs::create_dir(dir.path().join("etc")).expect("mkdir");
        fs::write(dir.path().join("etc/a"), "one").expect("write");
        fs::hard_link(dir.path().join("etc/a"), dir.path().join("etc/b")).expect("link");
        symlink("/etc/a", dir.path().join("c")).expect("symlink");
        dir
    }

    fn digest(dir: &tempfile::TempDir) -> Digest {
        inspect(dir.path(), Depth::Contents).expect("sound").0.digest.expect("contents")
    }

    #[test]
    fn the_digest_follows_whatever_the_image_would_show() {
        let dir = sample();
        let first = digest(&dir);
        assert_eq!(first, digest(&dir));
        fs::set_permissions(dir.path().join("etc/a"), PermissionsExt::from_mode(0o600)).expect("chmod");
        let second = digest(&dir);
        assert_ne!(first, second);
        fs::remove_file(dir.path().join("c")).expect("remove");
        symlink("/etc/b", dir.path().join("c")).expect("symlink");
        assert_ne!(second, digest(&dir));
        assert_eq!(inspect(dir.path(), Depth::Names).expect("sound").0.entries, 5);
    }

    #[test]
    fn content_changes_of_equal_size_and_time_are_seen() {
        let dir = sample();
        let first = digest(&dir);
        let path = dir.path().join("etc/a");
        let modified = path.metadata().expect("stat").modified().expect("mtime");
        fs::write(&path, "two").expect("write");
        File::options().write(true).open(&path).expect("open").set_modified(modified).expect("utimes");
        assert_ne!(first, digest(&dir));
    }

    #[test]
    fn a_file_is_no_directory() {
        let file = tempfile::NamedTempFile::new().expect("file");
        assert!(inspect(file.path(), Depth::Names).is_err());
        assert!(inspect(&file.path().join("x"), Depth::Names).is_err());
    }
}
