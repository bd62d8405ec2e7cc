//! The file behind a serial port: whole lines, and no more than a guest may cost.

use std::fs::File;
use std::io::{self, Write};

/// Bytes of output that are kept. The first ones are: they say how the machine came up.
pub const CONSOLE_LIMIT: u64 = 1 << 20;

/// Bytes of an unfinished line that are held back.
const LINE_LIMIT: usize = 512;

/// Writes a guest's output line by line, up to [`CONSOLE_LIMIT`] bytes, then a notice, then nothing.
#[derive(Debug)]
pub struct Console {
    file: File,
    line: Vec<u8>,
    kept: u64,
    dropped: u64,
}

impl Console {
    /// Writes to `file`, which is open for appending.
    pub fn new(file: File) -> Self {
        Self { file, line: Vec::new(), kept: 0, dropped: 0 }
    }

    /// Bytes that were not kept.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    fn push(&mut self, byte: u8) {
        if self.kept == CONSOLE_LIMIT {
            if self.dropped == 0 {
                let notice = format!("\n[console output ends here: {CONSOLE_LIMIT} bytes are kept]\n");
                self.line.extend_from_slice(notice.as_bytes());
                self.write_line();
            }
            self.dropped += 1;
            return;
        }
        self.kept += 1;
        self.line.push(byte);
        if byte == b'\n' || self.line.len() >= LINE_LIMIT {
            self.write_line();
        }
    }

    /// A console that cannot be written (a full disk) must not stop the guest, so errors end here.
    fn write_line(&mut self) {
        if self.file.write_all(&self.line).is_err() {
            self.dropped += self.line.len() as u64;
        }
        self.line.clear();
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        bytes.iter().for_each(|&byte| self.push(byte));
        Ok(bytes.len())
    }

    /// Does nothing: the emulated port flushes after every byte. See [`Console::finish_line`].
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Console {
    /// Writes an unfinished line now.
    pub fn finish_line(&mut self) {
        if !self.line.is_empty() {
            self.write_line();
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.finish_line();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn console(directory: &tempfile::TempDir) -> (Console, std::path::PathBuf) {
        let path = directory.path().join("console");
        let file = File::options().create(true).append(true).open(&path).unwrap();
        (Console::new(file), path)
    }

    #[test]
    fn lines_are_written_when_they_end_and_the_last_one_in_any_case() {
        let directory = tempfile::tempdir().unwrap();
        let (mut console, path) = console(&directory);
        console.write_all(b"one\ntw").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"one\n");
        console.finish_line();
        assert_eq!(std::fs::read(&path).unwrap(), b"one\ntw");
        console.write_all(b"o").unwrap();
        drop(console);
        assert_eq!(std::fs::read(&path).unwrap(), b"one\ntwo");
    }

    #[test]
    fn a_chatty_guest_fills_no_disk() {
        let directory = tempfile::tempdir().unwrap();
        let (mut console, path) = console(&directory);
        let output = vec![b'x'; CONSOLE_LIMIT as usize + 1000];
        console.write_all(&output).unwrap();
        assert_eq!(console.dropped(), 1000);
        drop(console);
        let kept = std::fs::read(&path).unwrap();
        assert!(kept.starts_with(&output[..CONSOLE_LIMIT as usize]));
        let tail = String::from_utf8(kept[CONSOLE_LIMIT as usize..].to_vec()).unwrap();
        assert_eq!(tail.matches("ends here").count(), 1);
        assert!(tail.len() < 100);
    }
}
