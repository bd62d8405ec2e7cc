//! Writing a cpio archive in the "newc" format that kernels unpack
//! (`Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! The same entries give the same bytes: times are zero, owners root, inode numbers count up.

use std::io::{self, Write};

/// The largest file the format holds.
const FILE_LIMIT: usize = u32::MAX as usize;

/// An archive being written.
pub(crate) struct Archive<W> {
    out: W,
    written: u64,
    inode: u32,
}

/// What an entry is, with its permission bits.
#[derive(Clone, Copy)]
enum Kind {
    Directory,
    File { mode: u32 },
    Character { major: u32, minor: u32 },
    Trailer,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out, written: 0, inode: 0 }
    }

    /// Adds a directory. Parents come first; `path` has no leading slash.
    pub(crate) fn directory(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, Kind::Directory, &[])
    }

    pub(crate) fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(path, Kind::File { mode }, content)
    }

    pub(crate) fn character_device(&mut self, path: &str, major: u32, minor: u32) -> io::Result<()> {
        self.entry(path, Kind::Character { major, minor }, &[])
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", Kind::Trailer, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, path: &str, kind: Kind, content: &[u8]) -> io::Result<()> {
        if content.len() > FILE_LIMIT {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("{path} exceeds {FILE_LIMIT} bytes")));
        }
        let (mode, links, major, minor) = match kind {
            Kind::Directory => (0o040_755, 2, 0, 0),
            Kind::File { mode } => (0o100_000 | mode, 1, 0, 0),
            Kind::Character { major, minor } => (0o020_600, 1, major, minor),
            Kind::Trailer => (0, 1, 0, 0),
        };
        let inode = if matches!(kind, Kind::Trailer) { 0 } else { self.inode + 1 };
        self.inode += 1;
        // inode, mode, uid, gid, links, mtime, size, device, device of the node, name with its zero, checksum.
        let name_len = path.len() as u32 + 1;
        let fields = [inode, mode, 0, 0, links, 0, content.len() as u32, 0, 0, major, minor, name_len, 0];
        let header: String = fields.iter().map(|field| format!("{field:08x}")).collect();
        self.put(b"070701")?;
        self.put(header.as_bytes())?;
        self.put(path.as_bytes())?;
        self.put(&[0])?;
        self.align()?;
        self.put(content)?;
        self.align()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn align(&mut self) -> io::Result<()> {
        let padding = (self.written.next_multiple_of(4) - self.written) as usize;
        self.put(&[0; 3][..padding])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn sample() -> Vec<u8> {
        let mut archive = Archive::new(Vec::new());
        archive.directory("dev").expect("memory");
        archive.character_device("dev/console", 5, 1).expect("memory");
        archive.file("init", 0o755, b"hello").expect("memory");
        archive.file("empty", 0o644, b"").expect("memory");
        archive.finish().expect("memory")
    }

    #[test]
    fn the_layout_is_that_of_the_format() {
        let bytes = sample();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[..14], b"07070100000001");
        let at = bytes.windows(5).position(|window| window == b"hello").expect("content");
        assert_eq!(at % 4, 0);
        assert_eq!(bytes, sample(), "the same entries give the same bytes");
        let trailer = bytes.windows(10).position(|window| window == b"TRAILER!!!").expect("trailer");
        assert_eq!(&bytes[trailer - 110..trailer - 104], b"070701");
    }

    #[test]
    #[allow(clippy::print_stdout)]
    fn another_program_reads_it() {
        let mut reader =
            match Command::new("bsdtar").args(["-tvf", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn() {
                Ok(reader) => reader,
                Err(_) => {
                    println!("SKIPPED: bsdtar (package libarchive-tools) is not installed");
                    return;
                }
            };
        reader.stdin.take().expect("piped").write_all(&sample()).expect("write");
        let output = reader.wait_with_output().expect("wait");
        assert!(output.status.success());
        let listing = String::from_utf8_lossy(&output.stdout).into_owned();
        let lines: Vec<Vec<&str>> = listing.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines.len(), 4, "{listing}");
        assert_eq!((lines[0][0], *lines[0].last().expect("name")), ("drwxr-xr-x", "dev"));
        assert!(lines[1][0].starts_with("crw") && listing.contains("5,1"), "{listing}");
        assert_eq!((lines[2][0], lines[2][4]), ("-rwxr-xr-x", "5"));
    }
}
