//! The block device that a directory lies on, by the number that `io.max` wants.

use std::fmt;
use std::fs;
use std::path::Path;
use std::str::FromStr;

use rustix::fs::{major, minor, stat};

/// A block device's number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceNumber {
    /// Which driver.
    pub major: u32,
    /// Which of its devices.
    pub minor: u32,
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl FromStr for DeviceNumber {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (major, minor) = text.trim().split_once(':').unwrap_or((text, ""));
        Ok(Self { major: major.parse()?, minor: minor.parse()? })
    }
}

impl DeviceNumber {
    /// The whole disk below the file system of `path`.
    ///
    /// None where the file system is not on a block device of its own: in memory, over a network, made of several
    /// devices or of other file systems.
    pub fn of_disk_below(path: &Path) -> Option<Self> {
        let found = stat(path).ok()?;
        let device = Self { major: major(found.st_dev), minor: minor(found.st_dev) };
        whole_disk(Path::new("/sys/dev/block"), device)
    }
}

/// `io.max` takes disks only; a partition's directory lies in that of its disk.
fn whole_disk(by_number: &Path, device: DeviceNumber) -> Option<DeviceNumber> {
    let own = fs::canonicalize(by_number.join(device.to_string())).ok()?;
    let disk = if own.join("partition").exists() { own.parent()? } else { &own };
    fs::read_to_string(disk.join("dev")).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_partition_is_limited_by_its_disk_and_memory_has_none() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (disk, by_number) = (dir.path().join("devices/vda"), dir.path().join("block"));
        let partition = disk.join("vda1");
        fs::create_dir_all(&partition).expect("mkdir");
        fs::create_dir(&by_number).expect("mkdir");
        for (path, number) in [(&disk, "254:0\n"), (&partition, "254:1\n")] {
            fs::write(path.join("dev"), number).expect("write");
            symlink(path, by_number.join(number.trim())).expect("symlink");
        }
        fs::write(partition.join("partition"), "1\n").expect("write");
        let whole = DeviceNumber { major: 254, minor: 0 };
        assert_eq!(whole_disk(&by_number, whole), Some(whole));
        assert_eq!(whole_disk(&by_number, DeviceNumber { minor: 1, ..whole }), Some(whole));
        assert_eq!(whole_disk(&by_number, DeviceNumber { major: 0, minor: 23 }), None);
        assert_eq!(DeviceNumber::of_disk_below(Path::new("/proc")), None, "not on a disk");
    }

    #[test]
    fn numbers_are_read_back_as_written() {
        let number = DeviceNumber { major: 259, minor: 7 };
        assert_eq!(number.to_string().parse(), Ok(number));
        assert!("259".parse::<DeviceNumber>().is_err());
    }
}
