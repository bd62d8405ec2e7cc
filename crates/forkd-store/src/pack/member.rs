//! The headers of the archive's members: POSIX ustar, and for sparse ones the pax form that GNU tar
//! writes (`GNU.sparse` 1.0: the map of the data stands before the data).
//!
//! There is exactly one way to write a member of a given path and size. A reader makes that header
//! itself and compares; [`objection`] then finds words for what differs.

use tar::{EntryType, Header};

use super::error::PackError;

/// Headers are one of these, content is padded to a multiple.
pub(super) const BLOCK: usize = 512;
/// The time of every member, 1 January 1980: GNU tar warns of older ones.
const TIME: u64 = 315_532_800;

/// A header block.
pub(super) type Block = [u8; BLOCK];

/// Bytes that `len` bytes of content take with their padding.
pub(super) fn padded(len: u64) -> u64 {
    len.next_multiple_of(BLOCK as u64)
}

/// The header of a member whose content is all there.
pub(super) fn plain(path: &str, bytes: u64) -> Result<Block, PackError> {
    header(path, EntryType::Regular, bytes)
}

/// What comes before a sparse member's map: extended header, its records, header.
pub(super) struct SparseHead {
    extended: Block,
    records: Vec<u8>,
    content: Block,
}

impl SparseHead {
    /// The head of a member that is `bytes` long and of which the archive holds `stored_bytes`, map included.
    pub(super) fn new(path: &str, bytes: u64, stored_bytes: u64) -> Result<Self, PackError> {
        let (directory, name) = path.rsplit_once('/').unwrap_or((".", path));
        let records = [
            record("GNU.sparse.major", "1"),
            record("GNU.sparse.minor", "0"),
            record("GNU.sparse.name", path),
            record("GNU.sparse.realsize", &bytes.to_string()),
        ]
        .concat();
        let extended = header(&format!("{directory}/PaxHeaders/{name}"), EntryType::XHeader, records.len() as u64)?;
        // Readers that know nothing of sparse members find the condensed file under this name.
        let content = header(&format!("{directory}/GNUSparseFile.0/{name}"), EntryType::Regular, stored_bytes)?;
        Ok(Self { extended, records: records.into_bytes(), content })
    }

    /// The extended header.
    pub(super) fn extended(&self) -> &Block {
        &self.extended
    }

    /// Its records.
    pub(super) fn records(&self) -> &[u8] {
        &self.records
    }

    /// The header of the content.
    pub(super) fn content(&self) -> &Block {
        &self.content
    }

    /// All of it, as written.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let padding = vec![0; padded(self.records.len() as u64) as usize - self.records.len()];
        [self.extended.as_slice(), &self.records, &padding, &self.content].concat()
    }
}

/// A pax record: its own length in decimal, a blank, `key=value`, a newline.
fn record(key: &str, value: &str) -> String {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len.to_string().len() + rest != len {
        len = len.to_string().len() + rest;
    }
    format!("{len} {key}={value}\n")
}

fn header(path: &str, kind: EntryType, size: u64) -> Result<Block, PackError> {
    let mut header = Header::new_ustar();
    header.set_path(path).map_err(|error| PackError::member(path, format!("has an impossible name: {error}")))?;
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(TIME);
    header.set_cksum();
    Ok(*header.as_bytes())
}

/// The path in a header, for messages.
pub(super) fn path_of(block: &Block) -> String {
    String::from_utf8_lossy(&Header::from_byte_slice(block).path_bytes()).into_owned()
}

/// The content size in a header.
pub(super) fn size_of(block: &Block) -> Option<u64> {
    Header::from_byte_slice(block).entry_size().ok()
}

/// Whether the block's checksum is its own.
pub(super) fn is_header(block: &Block) -> bool {
    let sum: u32 = block[..148].iter().chain(&block[156..]).map(|&byte| u32::from(byte)).sum::<u32>() + 8 * 32;
    Header::from_byte_slice(block).cksum().is_ok_and(|recorded| recorded == sum)
}

/// Why a header cannot be that of any member, whatever the manifest says; `None` if it could.
pub(super) fn objection(block: &Block) -> Option<PackError> {
    let path = path_of(block);
    if !is_header(block) {
        return Some(PackError::member(path, "has a damaged header"));
    }
    let components: Vec<&str> = path.split('/').collect();
    if path.starts_with('/') {
        return Some(PackError::member(path, "has an absolute path"));
    }
    if components.contains(&"..") {
        return Some(PackError::member(path, "has a path that leads out of the pack"));
    }
    let kind = match Header::from_byte_slice(block).entry_type() {
        EntryType::Regular | EntryType::XHeader => return None,
        EntryType::Link => "is a hard link".to_owned(),
        EntryType::Symlink => "is a symbolic link".to_owned(),
        EntryType::Char | EntryType::Block => "is a device node".to_owned(),
        EntryType::Fifo => "is a FIFO".to_owned(),
        EntryType::Directory => "is a directory".to_owned(),
        other => format!("is of a type that packs do not have ({:?})", char::from(other.as_byte())),
    };
    Some(PackError::member(path, kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_count_themselves() {
        for len in [1, 80, 88, 89, 90, 95, 900, 980, 990, 1000] {
            let text = record("k", &"v".repeat(len));
            let (count, _) = text.split_once(' ').expect("a blank");
            assert_eq!(count.parse::<usize>().expect("a number"), text.len(), "{len}");
        }
    }

    #[test]
    fn the_longest_names_fit() {
        let (tag, file) = ("t".repeat(64), "f".repeat(80));
        let head = SparseHead::new(&format!("snapshots/{tag}/{file}"), u64::MAX, 1 << 40).expect("fits");
        assert_eq!(head.to_bytes().len() % BLOCK, 0);
        assert!(is_header(head.content()) && objection(head.extended()).is_none());
        assert_eq!(path_of(head.content()), format!("snapshots/{tag}/GNUSparseFile.0/{file}"));
        assert_eq!(size_of(head.content()), Some(1 << 40));
        plain(&format!("snapshots/{tag}/{file}"), 0).expect("fits");
    }

    #[test]
    fn what_packs_never_have_is_named() {
        let said = |spoil: fn(&mut Header)| {
            let mut header = Header::new_ustar();
            header.set_path("a/b").expect("short");
            header.set_size(0);
            spoil(&mut header);
            header.set_cksum();
            objection(header.as_bytes()).map(|error| error.to_string()).unwrap_or_default()
        };
        assert_eq!(said(|_| ()), "");
        assert!(said(|header| header.set_entry_type(EntryType::Symlink)).contains("symbolic link"));
        assert!(said(|header| header.set_entry_type(EntryType::Link)).contains("hard link"));
        assert!(said(|header| header.set_entry_type(EntryType::Block)).contains("device node"));
        assert!(said(|header| header.set_entry_type(EntryType::GNULongName)).contains("'L'"));
        assert!(said(|header| header.as_mut_bytes()[..4].copy_from_slice(b"/etc")).contains("absolute"));
        assert!(said(|header| header.as_mut_bytes()[..4].copy_from_slice(b"a/..")).contains("leads out"));
    }
}
