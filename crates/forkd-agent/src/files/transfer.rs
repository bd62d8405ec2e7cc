//! Contents of files, to and from clients.
//!
//! A received file replaces the old one whole or not at all: it is written under a temporary name
//! beside it and renamed when the last byte has come, keeping the owner and permissions of the file
//! it replaces. A symbolic link is followed. What is not a regular file (a device, say) is written
//! to directly.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use forkd_proto::agent::{Failure, Response};
use forkd_proto::frame::{Frame, FrameError, Kind};

use super::{absolute, describe};
use crate::connection::Connection;
use crate::failure;

const CHUNK: usize = 256 << 10;

/// Which bytes of a file are wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Range {
    /// The first; counted from the end when negative.
    pub offset: i64,
    /// How many at most.
    pub length: Option<u64>,
}

/// Sends `range` of the file `path`: its description, the bytes, an empty frame.
pub fn send(connection: &Connection, path: &str, range: Range) -> Result<(), FrameError> {
    let seek = |(mut file, info): (File, forkd_proto::agent::FileInfo)| {
        let start = match u64::try_from(range.offset) {
            Ok(start) => start,
            Err(_) => info.size.saturating_sub(range.offset.unsigned_abs()),
        };
        if start > 0 {
            file.seek(SeekFrom::Start(start))
                .map_err(|error| failure::from_io(format_args!("cannot read {path} from byte {start} on"), &error))?;
        }
        Ok((file, info))
    };
    let (file, info) = match open(path).and_then(seek) {
        Ok(opened) => opened,
        Err(failure) => return connection.fail(failure),
    };
    connection.respond(&Response::File(info))?;
    let mut file = file.take(range.length.unwrap_or(u64::MAX));
    let mut frame = Frame::bytes(Kind::Data, Vec::new());
    loop {
        frame.payload.resize(CHUNK, 0);
        match file.read(&mut frame.payload) {
            Ok(got) => {
                frame.payload.truncate(got);
                connection.send(&frame)?;
                if got == 0 {
                    return Ok(());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return connection.fail(failure::from_io(format_args!("cannot read {path}"), &error)),
        }
    }
}

fn open(path: &str) -> Result<(File, forkd_proto::agent::FileInfo), Failure> {
    let failed = |error: io::Error| failure::from_io(format_args!("cannot read {path}"), &error);
    // Opening a FIFO or a terminal must not wait.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(absolute(path)?)
        .map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        let what = if metadata.is_dir() { "a directory" } else { "not a regular file" };
        return Err(failure::invalid(format!("cannot read {path}: it is {what}")));
    }
    let info = describe(path.to_owned(), Path::new(path), &metadata);
    Ok((file, info))
}

/// Receives the file `path` from the client and answers.
pub fn receive(connection: Connection, path: &str, mode: u32, parents: bool) -> Result<(), FrameError> {
    let failed = |error: io::Error| failure::from_io(format_args!("cannot write {path}"), &error);
    let mut destination = Destination::open(path, mode, parents).map_err(|error| error.into_failure(path));
    loop {
        let frame = connection.receive()?;
        if frame.kind != Kind::Data {
            let failure = failure::invalid(format!("cannot write {path}: its bytes must come as data frames"));
            connection.fail(failure)?;
            connection.close_gently();
            return Ok(());
        }
        if frame.payload.is_empty() {
            break;
        }
        // After a failure the rest is received all the same, so that the client gets to hear of it.
        if let Ok(open) = &mut destination
            && let Err(error) = open.file.write_all(&frame.payload)
        {
            destination = Err(failed(error));
        }
    }
    match destination.and_then(|destination| destination.publish().map_err(failed)) {
        Ok(()) => connection.respond(&Response::Done),
        Err(failure) => connection.fail(failure),
    }
}

enum OpenError {
    Path(Failure),
    Io(io::Error),
}

impl From<io::Error> for OpenError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl OpenError {
    fn into_failure(self, path: &str) -> Failure {
        match self {
            Self::Path(failure) => failure,
            Self::Io(error) => failure::from_io(format_args!("cannot write {path}"), &error),
        }
    }
}

/// A file being received.
struct Destination {
    file: File,
    /// Temporary and final name; without them the bytes go where they belong at once.
    rename: Option<(PathBuf, PathBuf)>,
}

impl Destination {
    fn open(path: &str, mode: u32, parents: bool) -> Result<Self, OpenError> {
        let wanted = absolute(path).map_err(OpenError::Path)?;
        if parents && let Some(parent) = wanted.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
        }
        // The file itself, when `path` is a symbolic link to one; a dangling link is replaced.
        let target = fs::canonicalize(wanted).unwrap_or_else(|_| wanted.to_owned());
        let old = fs::metadata(&target).ok();
        if let Some(old) = &old
            && !old.is_file()
        {
            let file = OpenOptions::new().write(true).custom_flags(libc::O_NOCTTY).open(&target)?;
            return Ok(Self { file, rename: None });
        }
        static SEQUENCE: AtomicU64 = AtomicU64::new(0);
        let name = target
            .file_name()
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidFilename))?
            .to_string_lossy()
            .into_owned();
        // A long name plus the suffix may exceed the file system's limit; its start will do.
        let mut kept = name.len().min(200);
        while !name.is_char_boundary(kept) {
            kept -= 1;
        }
        let temporary = target.with_file_name(format!(
            ".{}.forkd-{}-{}",
            &name[..kept],
            std::process::id(),
            SEQUENCE.fetch_add(1, Ordering::Relaxed)
        ));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        let destination = Self { file, rename: Some((temporary, target)) };
        match &old {
            Some(old) => {
                std::os::unix::fs::fchown(&destination.file, Some(old.uid()), Some(old.gid()))?;
                destination.file.set_permissions(Permissions::from_mode(old.mode() & 0o7777))?;
            }
            None => destination.file.set_permissions(Permissions::from_mode(mode & 0o7777))?,
        }
        Ok(destination)
    }

    fn publish(mut self) -> io::Result<()> {
        if let Some((temporary, target)) = &self.rename {
            fs::rename(temporary, target)?;
            self.rename = None;
        }
        Ok(())
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        if let Some((temporary, _)) = &self.rename {
            let _ = fs::remove_file(temporary);
        }
    }
}
