//! Files and trees as tar streams, to and from clients.

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;

use forkd_proto::agent::{Failure, Response};
use forkd_proto::frame::{Frame, FrameError, Kind};

use super::absolute;
use crate::connection::Connection;
use crate::failure;

const CHUNK: usize = 256 << 10;

/// Sends what is at `path`; entries start with its own name, or with `.` when it is `/`.
pub fn send(connection: &Connection, path: &str) -> Result<(), FrameError> {
    let failed = |error: io::Error| failure::from_io(format_args!("cannot pack {path}"), &error);
    let source = match absolute(path).and_then(|source| fs::symlink_metadata(source).map(|_| source).map_err(failed)) {
        Ok(source) => source,
        Err(failure) => return connection.fail(failure),
    };
    connection.respond(&Response::Done)?;
    let mut builder = tar::Builder::new(DataWriter { connection, pending: Vec::with_capacity(CHUNK) });
    builder.follow_symlinks(false);
    let name = source.file_name().map_or(Path::new("."), Path::new);
    let packed = pack(&mut builder, source, name).and_then(|()| builder.into_inner()).and_then(|mut out| out.flush());
    match packed {
        Ok(()) => connection.send(&Frame::bytes(Kind::Data, Vec::new())),
        // Where the connection is what failed, this fails too.
        Err(error) => connection.fail(failed(error)),
    }
}

/// Appends `source` and what is below it. What goes away meanwhile, and sockets, which tar has no form
/// for, are left out.
fn pack(builder: &mut tar::Builder<DataWriter<'_>>, source: &Path, name: &Path) -> io::Result<()> {
    let mut pending = vec![(source.to_owned(), name.to_owned())];
    while let Some((file, name)) = pending.pop() {
        let metadata = match fs::symlink_metadata(&file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            metadata => metadata?,
        };
        if std::os::unix::fs::FileTypeExt::is_socket(&metadata.file_type()) {
            continue;
        }
        let appended = if metadata.is_file() {
            append_file(builder, &file, &name)
        } else {
            builder.append_path_with_name(&file, &name)
        };
        match appended {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            appended => appended?,
        }
        if metadata.is_dir() {
            let mut below = fs::read_dir(&file)?.collect::<io::Result<Vec<_>>>()?;
            // The last is taken first.
            below.sort_by_key(|entry| std::cmp::Reverse(entry.file_name()));
            pending.extend(below.into_iter().map(|entry| (entry.path(), name.join(entry.file_name()))));
        }
    }
    Ok(())
}

/// Appends a regular file at the length that it has now: one that grows or shrinks while it is read must not
/// shift all that follows.
fn append_file(builder: &mut tar::Builder<DataWriter<'_>>, file: &Path, name: &Path) -> io::Result<()> {
    let content = fs::File::open(file)?;
    let metadata = content.metadata()?;
    let mut header = tar::Header::new_gnu();
    header.set_metadata(&metadata);
    let exactly = content.chain(io::repeat(0)).take(metadata.len());
    builder.append_data(&mut header, name, exactly)
}

/// Unpacks what the client sends into the directory `path`, and answers.
pub fn receive(connection: Connection, path: &str, owners: bool) -> Result<(), FrameError> {
    let mut frames = DataReader { connection: &connection, current: Vec::new(), at: 0, ended: false };
    let unpacked = unpack(&mut frames, path, owners);
    // The rest is received all the same, so that the client gets to hear of a failure.
    let rest = io::copy(&mut frames, &mut io::sink());
    match (unpacked, rest) {
        (Err(failure), _) => connection.fail(failure)?,
        (Ok(()), Err(error)) => return Err(error.into()),
        (Ok(()), Ok(_)) => connection.respond(&Response::Done)?,
    }
    connection.close_gently();
    Ok(())
}

fn unpack(frames: &mut DataReader<'_>, path: &str, owners: bool) -> Result<(), Failure> {
    let directory = absolute(path)?;
    let failed = |error: io::Error| failure::from_io(format_args!("cannot unpack into {path}"), &error);
    if !fs::metadata(directory).map_err(failed)?.is_dir() {
        return Err(failed(io::ErrorKind::NotADirectory.into()));
    }
    let mut archive = tar::Archive::new(frames);
    archive.set_preserve_permissions(true);
    archive.set_preserve_mtime(true);
    archive.set_preserve_ownerships(owners);
    archive.set_overwrite(true);
    archive.unpack(directory).map_err(|error| failed(plain(error)))
}

/// The error of the system below what the tar library makes of it, whose kind it hides.
fn plain(error: io::Error) -> io::Error {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = error.get_ref().map(|inner| inner as _);
    let mut kind = error.kind();
    while let Some(inner) = cause {
        if let Some(inner) = inner.downcast_ref::<io::Error>() {
            kind = inner.kind();
        }
        cause = inner.source();
    }
    let text = error.get_ref().map_or_else(|| error.to_string(), |inner| failure::with_causes(inner));
    io::Error::new(kind, text)
}

/// Writes data frames.
struct DataWriter<'a> {
    connection: &'a Connection,
    pending: Vec<u8>,
}

impl Write for DataWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(CHUNK - self.pending.len());
        self.pending.extend_from_slice(&bytes[..taken]);
        if self.pending.len() == CHUNK {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let frame = Frame::bytes(Kind::Data, std::mem::take(&mut self.pending));
        self.connection.send(&frame).map_err(into_io)?;
        self.pending = frame.payload;
        self.pending.clear();
        Ok(())
    }
}

/// Reads data frames up to the empty one.
struct DataReader<'a> {
    connection: &'a Connection,
    current: Vec<u8>,
    at: usize,
    ended: bool,
}

impl Read for DataReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.current.len() {
            if self.ended {
                return Ok(0);
            }
            let frame = self.connection.receive().map_err(into_io)?;
            if frame.kind != Kind::Data {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a tar stream must come as data frames"));
            }
            self.ended = frame.payload.is_empty();
            (self.current, self.at) = (frame.payload, 0);
        }
        let taken = buffer.len().min(self.current.len() - self.at);
        buffer[..taken].copy_from_slice(&self.current[self.at..self.at + taken]);
        self.at += taken;
        Ok(taken)
    }
}

fn into_io(error: FrameError) -> io::Error {
    match error {
        FrameError::Io(error) => error,
        FrameError::Closed => io::ErrorKind::UnexpectedEof.into(),
        other => io::Error::new(io::ErrorKind::InvalidData, other),
    }
}
