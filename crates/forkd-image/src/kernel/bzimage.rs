//! Getting the `vmlinux` out of a bzImage.
//!
//! Offsets are those of the x86 boot protocol (`Documentation/arch/x86/boot.rst`), 2.08 and later.

use super::compressed;
use super::elf::{self, Elf};

/// Where the setup header's fields stand in the file.
const SETUP_SECTS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const SECTOR: usize = 512;

/// Whether `bytes` begin as a bzImage does.
pub(crate) fn is_bzimage(bytes: &[u8]) -> bool {
    bytes.get(MAGIC..MAGIC + 4) == Some(b"HdrS")
}

/// The compressed payload of a bzImage.
pub(crate) fn payload(bytes: &[u8]) -> Result<&[u8], String> {
    if !is_bzimage(bytes) {
        return Err("it is not a bzImage".to_owned());
    }
    let cut = || format!("it is cut off after {} bytes", bytes.len());
    let u32_at = |at: usize| {
        let field = bytes.get(at..at + 4).and_then(|field| field.try_into().ok()).ok_or_else(cut)?;
        Ok::<_, String>(u32::from_le_bytes(field) as usize)
    };
    let version = u32_at(VERSION)? & 0xffff;
    if version < 0x208 {
        return Err(format!(
            "its boot protocol is {}.{:02}; 2.08 or later says where the kernel is",
            version >> 8,
            version & 0xff
        ));
    }
    // Zero means four, from the days of floppy disks.
    let sectors = match bytes[SETUP_SECTS] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * SECTOR + u32_at(PAYLOAD_OFFSET)?;
    let length = u32_at(PAYLOAD_LENGTH)?;
    bytes.get(start..start + length).filter(|payload| !payload.is_empty()).ok_or_else(cut)
}

/// The uncompressed kernel in `bytes`, which are a bzImage or already a `vmlinux`.
pub(crate) fn vmlinux(bytes: Vec<u8>) -> Result<Vec<u8>, String> {
    let kernel = if is_bzimage(&bytes) { compressed::decode(payload(&bytes)?)? } else { bytes };
    let elf = Elf::parse(&kernel)?;
    let segments = elf.segments();
    let mut loaded = segments.iter().filter(|segment| segment.kind == elf::LOAD).peekable();
    if loaded.peek().is_none() {
        return Err("it has nothing to load; a relocatable object or a separate debug file is not a kernel".to_owned());
    }
    if loaded.any(|segment| elf.segment_bytes(segment).is_none()) {
        return Err("it is cut off: a segment ends after the file".to_owned());
    }
    if !elf.has_pvh_entry() && elf.entry() == 0 {
        return Err("it has neither a PVH note nor an entry point".to_owned());
    }
    Ok(kernel)
}

/// The release in the banner that every kernel carries: `6.12.117+deb12-cloud-amd64`.
pub(crate) fn release(vmlinux: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    let mut rest = vmlinux;
    loop {
        let at = rest.windows(BANNER.len()).position(|window| window == BANNER)?;
        rest = &rest[at + BANNER.len()..];
        let end = rest.iter().position(|&byte| !byte.is_ascii_graphic())?;
        // The same words stand in format strings, followed by a percent sign.
        let text = std::str::from_utf8(&rest[..end]).ok()?;
        if text.starts_with(|first: char| first.is_ascii_digit()) && rest[end] == b' ' {
            return Some(text.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[SETUP_SECTS] = 1;
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        image[VERSION..VERSION + 2].copy_from_slice(&0x20fu16.to_le_bytes());
        let packed = zstd::encode_all(b"not an ELF file".as_slice(), 1).expect("memory");
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&16u32.to_le_bytes());
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&(packed.len() as u32).to_le_bytes());
        image.extend([0; 16]);
        image.extend(packed);
        image
    }

    #[test]
    fn the_payload_is_found_and_what_is_in_it_is_checked() {
        let image = sample();
        assert_eq!(compressed::decode(payload(&image).expect("payload")).expect("zstd"), b"not an ELF file");
        assert_eq!(vmlinux(image).expect_err("no kernel"), "it is not an ELF file");
    }

    #[test]
    fn a_cut_off_image_says_so() {
        let image = sample();
        for len in [0x240, 0x24e, 1030, image.len() - 1] {
            let error = payload(&image[..len]).expect_err("cut");
            assert!(error.contains(&format!("cut off after {len} bytes")), "{error}");
        }
        assert!(vmlinux(b"\x7fELF".to_vec()).expect_err("cut").contains("cut off"));
    }

    #[test]
    fn an_old_protocol_is_refused_by_number() {
        let mut image = sample();
        image[VERSION..VERSION + 2].copy_from_slice(&0x204u16.to_le_bytes());
        assert!(payload(&image).expect_err("old").contains("2.04"));
    }

    #[test]
    fn the_release_is_the_banner_with_a_number() {
        let text = b"..Linux version %s (%s)\0Linux version 6.12.117+deb12-cloud-amd64 (x@y) (gcc)\0";
        assert_eq!(release(text).as_deref(), Some("6.12.117+deb12-cloud-amd64"));
        assert_eq!(release(b"Linux version 6.1"), None);
    }

    proptest! {
        #[test]
        fn damaged_images_never_panic(cut in 0..1100usize, at in 0..1100usize, byte: u8) {
            let mut image = sample();
            let at = at % image.len();
            image[at] = byte;
            image.truncate(cut);
            let _ = vmlinux(image);
        }
    }
}
