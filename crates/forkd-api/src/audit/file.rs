//! A file that is only ever appended to, and set aside when it has grown too large.
//!
//! `audit.log` becomes `audit.log.1`, that becomes `audit.log.2`, and so on; the oldest is removed.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// When a log is set aside, and how many old ones there are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rotation {
    /// No line is added that would make the file larger, in bytes; none means no limit.
    pub max_bytes: Option<u64>,
    /// How many old files are kept.
    pub keep: usize,
}

impl Rotation {
    /// One file, whatever its size.
    pub const NEVER: Self = Self { max_bytes: None, keep: 0 };
}

#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    rotation: Rotation,
    file: File,
    bytes: u64,
}

impl LogFile {
    pub(super) fn open(path: &Path, rotation: Rotation) -> io::Result<Self> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let (file, bytes) = open(path)?;
        Ok(Self { path: path.to_owned(), rotation, file, bytes })
    }

    /// Opens the file of the path anew.
    pub(super) fn reopen(&mut self) -> io::Result<()> {
        (self.file, self.bytes) = open(&self.path)?;
        Ok(())
    }

    /// Adds a line, whole.
    pub(super) fn append(&mut self, line: &[u8]) -> io::Result<()> {
        let after = self.bytes + line.len() as u64;
        if self.bytes > 0 && self.rotation.max_bytes.is_some_and(|most| after > most) {
            // A line is worth more than the limit.
            if let Err(error) = self.rotate() {
                tracing::error!(path = %self.path.display(), %error, "cannot set the audit log aside");
            }
        }
        // One write per line: lines of several processes never mix either.
        self.file.write_all(line)?;
        self.bytes += line.len() as u64;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        for number in (1..self.rotation.keep).rev() {
            match std::fs::rename(self.aside(number), self.aside(number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        match self.rotation.keep {
            0 => std::fs::remove_file(&self.path)?,
            _ => std::fs::rename(&self.path, self.aside(1))?,
        }
        self.reopen()
    }

    fn aside(&self, number: usize) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{number}"));
        name.into()
    }
}

fn open(path: &Path) -> io::Result<(File, u64)> {
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    let bytes = file.metadata()?.len();
    Ok((file, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(path: &Path, suffix: &str) -> Option<String> {
        std::fs::read_to_string(format!("{}{suffix}", path.display())).ok()
    }

    #[test]
    fn a_full_log_is_set_aside_and_the_oldest_removed() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("audit.log");
        let mut log = LogFile::open(&path, Rotation { max_bytes: Some(20), keep: 2 }).expect("open");
        for number in 0..7 {
            log.append(format!("line {number} x\n").as_bytes()).expect("append");
        }
        assert_eq!(read(&path, "").as_deref(), Some("line 6 x\n"));
        assert_eq!(read(&path, ".1").as_deref(), Some("line 4 x\nline 5 x\n"));
        assert_eq!(read(&path, ".2").as_deref(), Some("line 2 x\nline 3 x\n"));
        assert_eq!(read(&path, ".3"), None);
    }

    #[test]
    fn what_is_there_counts_and_a_line_longer_than_the_limit_is_written() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("audit.log");
        std::fs::write(&path, "before\n").expect("write");
        let mut log = LogFile::open(&path, Rotation { max_bytes: Some(10), keep: 1 }).expect("open");
        log.append(b"a line that is too long\n").expect("append");
        assert_eq!(read(&path, ".1").as_deref(), Some("before\n"));
        assert_eq!(read(&path, "").as_deref(), Some("a line that is too long\n"));
    }

    #[test]
    fn a_log_that_was_moved_away_is_made_anew_on_demand() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("audit.log");
        let mut log = LogFile::open(&path, Rotation::NEVER).expect("open");
        log.append(b"1\n").expect("append");
        std::fs::rename(&path, dir.path().join("audit.log-2026")).expect("rename");
        log.append(b"2\n").expect("append");
        assert_eq!(read(&path, "-2026").as_deref(), Some("1\n2\n"), "until told, it goes on where it was");
        log.reopen().expect("reopen");
        log.append(b"3\n").expect("append");
        assert_eq!(read(&path, "").as_deref(), Some("3\n"));
    }
}
