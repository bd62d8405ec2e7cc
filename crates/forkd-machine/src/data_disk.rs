//! The machine's data disk: a sparse file that holds an ext4 file system and survives stop and start.

use std::path::Path;
use std::process::Command;

use forkd_types::ByteSize;

use crate::error::MachineError;
use crate::progress::{Report, step};

/// Below this there is no room for one snapshot.
const LEAST_SIZE: ByteSize = ByteSize::gib(1);

/// Creates and formats the disk unless it is there. An existing one keeps its size.
pub(crate) fn ensure(path: &Path, size: ByteSize, report: Report<'_>) -> Result<(), MachineError> {
    if path.exists() {
        return Ok(());
    }
    if size < LEAST_SIZE {
        return Err(MachineError::BadOption {
            option: "disk",
            value: size.to_string(),
            reason: format!("the machine's disk needs at least {LEAST_SIZE}; it takes space only as it fills"),
        });
    }
    step(report, "creating the machine's disk");
    // Formatted under another name first, so that an interrupted run leaves no half-made disk.
    let directory = path.parent().expect("the disk lies in the machine's directory");
    let unfinished = tempfile::NamedTempFile::new_in(directory).map_err(MachineError::file("create", path))?;
    unfinished.as_file().set_len(size.bytes()).map_err(MachineError::file("size", path))?;
    let attempt = || format!("format {}", path.display());
    let output = Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-m", "0", "-L", "forkd-data", "-E", "lazy_itable_init=1,lazy_journal_init=1"])
        .arg(unfinished.path())
        .output()
        .map_err(|error| MachineError::Tool {
            attempt: attempt(),
            reason: format!("mke2fs does not run ({error}); install it: apt-get install e2fsprogs"),
        })?;
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(MachineError::Tool { attempt: attempt(), reason });
    }
    unfinished.persist(path).map(drop).map_err(|error| MachineError::file("create", path)(error.error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn the_disk_is_sparse_made_once_and_never_half() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("disk.img");
        let mut steps = 0;
        ensure(&path, ByteSize::gib(64), &mut |_| steps += 1).expect("mke2fs is installed");
        let made = std::fs::metadata(&path).expect("there");
        assert_eq!(made.len(), 64 << 30);
        assert!(made.blocks() * 512 < 256 << 20, "{} blocks are allocated", made.blocks());
        ensure(&path, ByteSize::gib(2), &mut |_| steps += 1).expect("kept");
        assert_eq!((std::fs::metadata(&path).expect("there").len(), steps), (64 << 30, 1));
        assert_eq!(std::fs::read_dir(directory.path()).expect("lists").count(), 1);
        let error = ensure(&directory.path().join("small"), ByteSize::mib(1), &mut |_| {}).expect_err("too small");
        assert!(error.to_string().contains("at least 1 GiB"), "{error}");
    }
}
