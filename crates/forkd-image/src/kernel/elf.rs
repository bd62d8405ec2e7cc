//! As much of ELF64 as kernels and modules need: notes of segments, sections by name.
//!
//! Input is not trusted: every offset is checked, nothing panics.

/// A little-endian x86_64 ELF file in memory.
pub(crate) struct Elf<'a> {
    bytes: &'a [u8],
}

/// A program header.
pub(crate) struct Segment {
    pub(crate) kind: u32,
    offset: u64,
    size: u64,
}

/// `PT_LOAD`.
pub(crate) const LOAD: u32 = 1;
/// `PT_NOTE`.
const NOTE: u32 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: where a PVH loader enters the kernel.
const PVH_ENTRY: u32 = 18;
/// Headers beyond this many are not looked at.
const HEADER_LIMIT: u16 = 4096;

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

impl<'a> Elf<'a> {
    /// Accepts a 64-bit little-endian ELF file for x86_64; says what it is instead otherwise.
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self, String> {
        if !bytes.starts_with(b"\x7fELF") {
            return Err("it is not an ELF file".to_owned());
        }
        if bytes.len() < 64 {
            return Err(format!("its ELF header is cut off after {} bytes", bytes.len()));
        }
        let machine = u16_at(bytes, 18).unwrap_or(0);
        if bytes[4] != 2 || bytes[5] != 1 || machine != 62 {
            return Err(format!(
                "it is ELF class {}, byte order {}, machine {machine}; x86_64 is class 2, byte order 1, machine 62",
                bytes[4], bytes[5]
            ));
        }
        Ok(Self { bytes })
    }

    /// Where execution begins, as the header says.
    pub(crate) fn entry(&self) -> u64 {
        u64_at(self.bytes, 24).unwrap_or(0)
    }

    /// The program headers that are whole.
    pub(crate) fn segments(&self) -> Vec<Segment> {
        let segment = |header: &[u8]| {
            Some(Segment { kind: u32_at(header, 0)?, offset: u64_at(header, 8)?, size: u64_at(header, 32)? })
        };
        self.headers(32, 54, 56).iter().filter_map(|header| segment(header)).collect()
    }

    /// The bytes of a segment in the file, if they are all there.
    pub(crate) fn segment_bytes(&self, segment: &Segment) -> Option<&'a [u8]> {
        self.range(segment.offset, segment.size)
    }

    /// Whether a note names an entry point for PVH loaders.
    pub(crate) fn has_pvh_entry(&self) -> bool {
        let notes = self.segments();
        let mut notes = notes.iter().filter(|segment| segment.kind == NOTE);
        notes.any(|segment| self.segment_bytes(segment).is_some_and(|bytes| has_note(bytes, b"Xen\0", PVH_ENTRY)))
    }

    /// The bytes of the section called `name`.
    pub(crate) fn section(&self, name: &str) -> Option<&'a [u8]> {
        let headers = self.headers(40, 58, 60);
        let names = headers.get(usize::from(u16_at(self.bytes, 62)?))?;
        let names = self.range(u64_at(names, 24)?, u64_at(names, 32)?)?;
        let named = |header: &&&[u8]| {
            let tail = u32_at(header, 0).and_then(|at| names.get(at as usize..));
            tail.is_some_and(|tail| tail.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0)))
        };
        let header = headers.iter().find(named)?;
        self.range(u64_at(header, 24)?, u64_at(header, 32)?)
    }

    /// A table of headers: where its offset, entry size and count stand in the ELF header.
    fn headers(&self, offset_at: usize, size_at: usize, count_at: usize) -> Vec<&'a [u8]> {
        let offset = u64_at(self.bytes, offset_at).unwrap_or(0);
        let size = u64::from(u16_at(self.bytes, size_at).unwrap_or(0));
        let count = u16_at(self.bytes, count_at).unwrap_or(0).min(HEADER_LIMIT);
        let header = |index: u16| self.range(offset.checked_add(u64::from(index) * size)?, size);
        (0..count).filter_map(header).collect()
    }

    fn range(&self, offset: u64, size: u64) -> Option<&'a [u8]> {
        let start = usize::try_from(offset).ok()?;
        self.bytes.get(start..start.checked_add(usize::try_from(size).ok()?)?)
    }
}

fn has_note(mut notes: &[u8], name: &[u8], kind: u32) -> bool {
    let next = |notes: &[u8]| {
        let name_len = u32_at(notes, 0)? as usize;
        let desc_len = u32_at(notes, 4)? as usize;
        let note_kind = u32_at(notes, 8)?;
        let note_name = notes.get(12..12usize.checked_add(name_len)?)?;
        let end = 12usize.checked_add(name_len.checked_next_multiple_of(4)?)?;
        let end = end.checked_add(desc_len.checked_next_multiple_of(4)?)?;
        Some((note_kind == kind && note_name == name, end))
    };
    while let Some((found, end)) = next(notes) {
        if found {
            return true;
        }
        notes = notes.get(end..).unwrap_or_default();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A minimal ELF file with one note segment and one named section.
    pub(crate) fn sample() -> Vec<u8> {
        let mut file = vec![0; 64];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[18] = 62;
        file[24..32].copy_from_slice(&0x0100_0000u64.to_le_bytes());
        let put = |file: &mut Vec<u8>, bytes: &[u8]| {
            let at = file.len();
            file.extend_from_slice(bytes);
            at as u64
        };
        let other = [4u32.to_le_bytes(), 5u32.to_le_bytes(), 1u32.to_le_bytes()].concat();
        let pvh = [4u32.to_le_bytes(), 4u32.to_le_bytes(), 18u32.to_le_bytes()].concat();
        let notes = [other.as_slice(), b"GNU\0abcde\0\0\0", &pvh, b"Xen\0\0\0\0\x01"].concat();
        let notes_at = put(&mut file, &notes);
        let info_at = put(&mut file, b"depends=a,b\0name=c\0");
        let names_at = put(&mut file, b"\0.modinfo\0.shstrtab\0");
        let mut segment = vec![0; 56];
        segment[..4].copy_from_slice(&4u32.to_le_bytes());
        segment[8..16].copy_from_slice(&notes_at.to_le_bytes());
        segment[32..40].copy_from_slice(&(notes.len() as u64).to_le_bytes());
        let segments_at = put(&mut file, &segment);
        let section = |name: u32, at: u64, len: u64| {
            let mut header = vec![0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[24..32].copy_from_slice(&at.to_le_bytes());
            header[32..40].copy_from_slice(&len.to_le_bytes());
            header
        };
        let sections = [section(1, info_at, 19), section(10, names_at, 20)].concat();
        let sections_at = put(&mut file, &sections);
        file[32..40].copy_from_slice(&segments_at.to_le_bytes());
        file[40..48].copy_from_slice(&sections_at.to_le_bytes());
        for (at, value) in [(54, 56u16), (56, 1), (58, 64), (60, 2), (62, 1)] {
            file[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        file
    }

    #[test]
    fn notes_and_sections_are_found() {
        let file = sample();
        let elf = Elf::parse(&file).expect("sound");
        assert!(elf.has_pvh_entry());
        assert_eq!(elf.entry(), 0x0100_0000);
        assert_eq!(elf.section(".modinfo"), Some(b"depends=a,b\0name=c\0".as_slice()));
        assert_eq!(elf.section(".mod"), None);
    }

    #[test]
    fn other_files_are_told_apart() {
        let mut arm = sample();
        arm[18] = 183;
        assert!(Elf::parse(&arm).err().expect("arm").contains("machine 183"));
        assert!(Elf::parse(b"MZ").err().expect("pe").contains("not an ELF"));
    }

    proptest! {
        #[test]
        fn damaged_files_never_panic(cut in 0..400usize, at in 0..400usize, byte: u8) {
            let mut file = sample();
            let at = at % file.len();
            file[at] = byte;
            file.truncate(cut.min(file.len()));
            if let Ok(elf) = Elf::parse(&file) {
                elf.has_pvh_entry();
                elf.section(".modinfo");
            }
        }
    }
}
