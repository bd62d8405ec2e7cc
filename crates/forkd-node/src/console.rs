//! Guest consoles: bounded files, their last lines, and following one while it grows.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A console file that outgrows this is cut.
pub(crate) const SIZE_LIMIT: u64 = 8 << 20;

/// What a cut leaves: the newest part.
const KEPT: u64 = 1 << 20;

/// How often a followed console is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The last `limit` lines of `text`, trailing white space left out.
pub(crate) fn last_lines(text: &str, limit: usize) -> String {
    let lines: Vec<_> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(limit)..].join("\n")
}

/// Creates the file that a monitor appends its guest's console to.
pub(crate) fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

/// What the console file holds, at most [`SIZE_LIMIT`] bytes of its end.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(SIZE_LIMIT)))?;
    let mut bytes = Vec::new();
    file.take(SIZE_LIMIT).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Cuts a console that has outgrown [`SIZE_LIMIT`] down to its newest part.
///
/// Monitors write with `O_APPEND`, so they go on at the new end. What a guest writes during the
/// cut, microseconds, may be lost.
pub(crate) fn cut_if_large(path: &Path) -> io::Result<bool> {
    let mut file = OpenOptions::new().read(true).append(true).open(path)?;
    let len = file.metadata()?.len();
    if len <= SIZE_LIMIT {
        return Ok(false);
    }
    let mut kept = vec![0; KEPT as usize];
    file.read_exact_at(&mut kept, len - KEPT)?;
    file.set_len(0)?;
    file.write_all(b"[earlier output was cut]\n")?;
    file.write_all(&kept)?;
    Ok(true)
}

/// Reads a console piece by piece while a guest writes it.
pub(crate) struct Follower {
    path: PathBuf,
    offset: u64,
}

impl Follower {
    /// Follows `path` from its start.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, offset: 0 }
    }

    /// Waits for the next piece; never returns an empty one.
    pub(crate) async fn next(&mut self) -> io::Result<String> {
        loop {
            let piece = self.take()?;
            if !piece.is_empty() {
                return Ok(piece);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// What was written since the last look.
    pub(crate) fn take(&mut self) -> io::Result<String> {
        let mut file = File::open(&self.path)?;
        // Cut since the last look: what was kept is told again rather than anything missed.
        if file.metadata()?.len() < self.offset {
            self.offset = 0;
        }
        file.seek(SeekFrom::Start(self.offset))?;
        let mut bytes = Vec::new();
        file.take(256 << 10).read_to_end(&mut bytes)?;
        self.offset += bytes.len() as u64;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_lines_are_whole_lines() {
        assert_eq!(last_lines("a\nb\nc\n\n", 2), "b\nc");
        assert_eq!(last_lines("a\r\nb", 9), "a\nb");
        assert_eq!(last_lines("", 3), "");
    }

    #[test]
    fn a_large_console_keeps_its_end_and_its_writer_goes_on() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("console");
        let mut writer = create(&path).expect("create");
        writer.write_all(&vec![b'x'; SIZE_LIMIT as usize]).expect("write");
        assert!(!cut_if_large(&path).expect("small enough"));
        writer.write_all(b"the end\n").expect("write");
        assert!(cut_if_large(&path).expect("cut"));
        writer.write_all(b"and more\n").expect("write");
        let text = String::from_utf8(read(&path).expect("read")).expect("text");
        assert!(text.starts_with("[earlier output was cut]\n") && text.ends_with("xthe end\nand more\n"));
        assert!(text.len() < 2 * KEPT as usize);
    }

    #[tokio::test]
    async fn a_follower_sees_everything_once() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("console");
        let mut writer = create(&path).expect("create");
        let mut follower = Follower::new(path);
        assert_eq!(follower.take().expect("empty"), "");
        writer.write_all(b"one").expect("write");
        assert_eq!(follower.next().await.expect("piece"), "one");
        writer.write_all(b"two").expect("write");
        assert_eq!(follower.next().await.expect("piece"), "two");
        assert_eq!(follower.take().expect("nothing new"), "");
    }
}
