//! Adding files to an ext4 image without mounting it, by `debugfs` from e2fsprogs.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::error::MachineError;

/// A file to add. Paths and contents are forkd's own, never a user's: `debugfs` has a command language
/// without quoting.
pub(crate) struct RootFile {
    /// Absolute path in the image; missing parents are made.
    pub(crate) path: &'static str,
    pub(crate) contents: &'static str,
    pub(crate) mode: u32,
}

/// Copies the image `from` to `to` with `files` in it, keeping holes. `to` appears whole or not at all.
pub(crate) fn copy_with(from: &Path, to: &Path, files: &[RootFile]) -> Result<(), MachineError> {
    let directory = to.parent().expect("a file lies in a directory");
    let scratch = tempfile::tempdir_in(directory).map_err(MachineError::file("create a directory in", directory))?;
    let image = scratch.path().join("image");
    run("copy the machine's root disk", "coreutils", {
        let mut command = Command::new("cp");
        command.args(["--sparse=always", "--reflink=auto", "--"]).arg(from).arg(&image);
        command
    })?;
    let script = write_script(scratch.path(), files)?;
    run("add files to the machine's root disk", "e2fsprogs", {
        let mut command = Command::new("debugfs");
        command.current_dir(scratch.path()).arg("-w").arg("-f").arg(script).arg(&image);
        command
    })?;
    // debugfs succeeds whatever its commands did, so look at what is there now.
    for file in files {
        let read = run("read back a file of the machine's root disk", "e2fsprogs", {
            let mut command = Command::new("debugfs");
            command.arg("-R").arg(format!("cat {}", file.path)).arg(&image);
            command
        })?;
        if read.stdout != file.contents.as_bytes() {
            return Err(MachineError::Tool {
                attempt: format!("add {} to the machine's root disk", file.path),
                reason: format!("debugfs left other contents there; it says: {}", text(&read.stderr)),
            });
        }
    }
    std::fs::rename(&image, to).map_err(MachineError::file("create", to))
}

/// Commands that add every file; each one's contents lie beside the script under its number.
fn write_script(directory: &Path, files: &[RootFile]) -> Result<PathBuf, MachineError> {
    let parents: BTreeSet<&Path> = files.iter().flat_map(|file| Path::new(file.path).ancestors().skip(1)).collect();
    let mut script = String::new();
    // In order of length every directory comes after its parent. Making one that is there fails, which is fine.
    for parent in parents.into_iter().filter(|parent| parent.parent().is_some()) {
        script += &format!("mkdir {}\n", parent.display());
    }
    for (number, file) in files.iter().enumerate() {
        let source = directory.join(number.to_string());
        std::fs::write(&source, file.contents).map_err(MachineError::file("write", &source))?;
        script += &format!("write {number} {path}\n", path = file.path);
        script += &format!("set_inode_field {} mode 0100{:o}\n", file.path, file.mode);
        script += &format!("set_inode_field {0} uid 0\nset_inode_field {0} gid 0\n", file.path);
    }
    let path = directory.join("script");
    std::fs::File::create(&path)
        .and_then(|mut file| file.write_all(script.as_bytes()))
        .map_err(MachineError::file("write", &path))?;
    Ok(path)
}

fn run(attempt: &str, package: &str, mut command: Command) -> Result<Output, MachineError> {
    let failed = |reason: String| MachineError::Tool { attempt: attempt.to_owned(), reason };
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .map_err(|error| failed(format!("{program} does not run ({error}); install it: apt-get install {package}")))?;
    if output.status.success() { Ok(output) } else { Err(failed(format!("{program} says: {}", text(&output.stderr)))) }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn files_appear_with_their_parents_and_modes() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let (from, to) = (directory.path().join("from.img"), directory.path().join("to.img"));
        std::fs::File::create(&from).expect("created").set_len(64 << 20).expect("sized");
        let made = Command::new("mke2fs").args(["-q", "-t", "ext4"]).arg(&from).status().expect("mke2fs is installed");
        assert!(made.success());
        let files = [
            RootFile { path: "/etc/forkd/boot.d/10-x", contents: "#!/bin/sh\necho hello\n", mode: 0o755 },
            RootFile { path: "/top", contents: "", mode: 0o600 },
        ];
        copy_with(&from, &to, &files).expect("added");
        let listing = Command::new("debugfs").args(["-R", "stat /etc/forkd/boot.d/10-x"]).arg(&to).output();
        let listing = text(&listing.expect("debugfs runs").stdout);
        assert!(listing.contains("Type: regular    Mode:  0755") && listing.contains("User:     0"), "{listing}");
        let check = Command::new("e2fsck").args(["-fn"]).arg(&to).output().expect("e2fsck runs");
        assert!(check.status.success(), "{}", text(&check.stdout));
        assert!(std::fs::metadata(&to).expect("there").blocks() * 512 < 16 << 20, "holes are kept");
        assert_eq!(std::fs::read_dir(directory.path()).expect("lists").count(), 2);
    }

    #[test]
    fn an_image_that_is_none_is_refused_and_leaves_nothing() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let (from, to) = (directory.path().join("from.img"), directory.path().join("to.img"));
        std::fs::write(&from, "no file system").expect("written");
        let file = RootFile { path: "/x", contents: "x", mode: 0o644 };
        assert!(copy_with(&from, &to, &[file]).is_err());
        assert!(!to.exists());
    }
}
