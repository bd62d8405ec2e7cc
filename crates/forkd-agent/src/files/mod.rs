//! Files of the guest: describing, listing, moving, removing; [`transfer`] carries contents, [`archive`] trees,
//! and [`watch`] tells of changes.

pub mod archive;
pub mod transfer;
pub mod watch;

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;

use forkd_proto::agent::{Failure, FileInfo, FileType, Response};
use forkd_proto::frame::FrameError;

use crate::connection::Connection;
use crate::failure;

/// About how many bytes of names one listing of many holds, well below what a frame can.
const PAGE: usize = 128 << 10;

/// Describes `path`, not following a final symbolic link.
pub fn stat(path: &str) -> Result<FileInfo, Failure> {
    let file = absolute(path)?;
    let metadata =
        fs::symlink_metadata(file).map_err(|error| failure::from_io(format_args!("cannot describe {path}"), &error))?;
    Ok(describe(path.to_owned(), file, &metadata))
}

/// Describes what is in the directory `path`, in name order.
pub fn list(path: &str) -> Result<Vec<FileInfo>, Failure> {
    let directory = absolute(path)?;
    let failed = |error: io::Error| failure::from_io(format_args!("cannot list {path}"), &error);
    let mut entries = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        match entry.metadata() {
            Ok(metadata) => {
                let name = entry.file_name().to_string_lossy().into_owned();
                entries.push(describe(name, &entry.path(), &metadata));
            }
            // Removed since the directory was read.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

/// Sends what is in the directory `path` as listings of bounded size, the last of them empty.
pub fn send_listing(connection: &Connection, path: &str) -> Result<(), FrameError> {
    let entries = match list(path) {
        Ok(entries) => entries,
        Err(failure) => return connection.fail(failure),
    };
    let mut page = Vec::new();
    let mut size = 0;
    for entry in entries {
        size += entry.name.len() + entry.target.as_ref().map_or(0, String::len) + 64;
        page.push(entry);
        if size >= PAGE {
            connection.respond(&Response::Listing { entries: std::mem::take(&mut page) })?;
            size = 0;
        }
    }
    if !page.is_empty() {
        connection.respond(&Response::Listing { entries: page })?;
    }
    connection.respond(&Response::Listing { entries: Vec::new() })
}

/// Removes a file, an empty directory, or with `recursive` a tree.
pub fn remove(path: &str, recursive: bool) -> Result<(), Failure> {
    let file = absolute(path)?;
    let removed = fs::symlink_metadata(file).and_then(|metadata| match (metadata.is_dir(), recursive) {
        (true, true) => fs::remove_dir_all(file),
        (true, false) => fs::remove_dir(file),
        (false, _) => fs::remove_file(file),
    });
    removed.map_err(|error| failure::from_io(format_args!("cannot remove {path}"), &error))
}

/// Makes the directory `path` and its parents; one that is there already is well.
pub fn make_directory(path: &str) -> Result<(), Failure> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(absolute(path)?)
        .map_err(|error| failure::from_io(format_args!("cannot make the directory {path}"), &error))
}

/// Renames within one file system, replacing what is at `to`.
pub fn rename(from: &str, to: &str) -> Result<(), Failure> {
    fs::rename(absolute(from)?, absolute(to)?)
        .map_err(|error| failure::from_io(format_args!("cannot rename {from} to {to}"), &error))
}

/// The path, if it is absolute: the agent's own working directory means nothing to a client.
fn absolute(path: &str) -> Result<&Path, Failure> {
    if path.contains('\0') || !path.starts_with('/') {
        return Err(failure::invalid(format!("{path:?} is not an absolute path")));
    }
    Ok(Path::new(path))
}

fn describe(name: String, file: &Path, metadata: &Metadata) -> FileInfo {
    let kind = metadata.file_type();
    let (file_type, target) = if kind.is_file() {
        (FileType::File, None)
    } else if kind.is_dir() {
        (FileType::Directory, None)
    } else if kind.is_symlink() {
        (FileType::Symlink, fs::read_link(file).ok().map(|target| target.to_string_lossy().into_owned()))
    } else {
        (FileType::Other, None)
    };
    FileInfo {
        name,
        file_type,
        size: metadata.len(),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        modified_unix: metadata.mtime(),
        target,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_proto::agent::FailureCode;

    #[test]
    fn a_tree_is_made_described_moved_and_removed() {
        let root = tempfile::tempdir().expect("tempdir");
        let at = |name: &str| root.path().join(name).display().to_string();
        make_directory(&at("a/b")).expect("made");
        make_directory(&at("a/b")).expect("made again");
        fs::write(at("a/file"), "hello").expect("write");
        std::os::unix::fs::symlink("file", at("a/link")).expect("link");
        let entries = list(&at("a")).expect("listed");
        let seen: Vec<_> = entries.iter().map(|entry| (entry.name.as_str(), entry.file_type)).collect();
        assert_eq!(seen, [("b", FileType::Directory), ("file", FileType::File), ("link", FileType::Symlink)]);
        assert_eq!(entries[2].target.as_deref(), Some("file"));
        assert_eq!(stat(&at("a/file")).expect("stat").size, 5);
        assert_eq!(remove(&at("a"), false).expect_err("not empty").code, FailureCode::Conflict);
        rename(&at("a"), &at("z")).expect("renamed");
        assert_eq!(stat(&at("a")).expect_err("moved").code, FailureCode::NotFound);
        remove(&at("z/link"), false).expect("the link goes, not its target");
        assert_eq!(stat(&at("z/file")).expect("target stays").size, 5);
        remove(&at("z"), true).expect("tree removed");
        assert_eq!(stat("relative").expect_err("relative").code, FailureCode::Invalid);
    }
}
