//! Files of a guest: contents both ways, trees, and what changes.

use std::time::Duration;

use bytes::Bytes;
use forkd_proto::agent::{FileChange, FileInfo, Request, Response};
use forkd_proto::frame::{FrameError, Kind};

use super::connection::GuestConnection;
use super::error::{GuestError, unexpected};
use super::frames::{FrameReader, FrameWriter};

/// How long one step on the guest's file system may take. Removing a large tree takes a while.
const STEP_LIMIT: Duration = Duration::from_secs(120);

/// Which bytes of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ByteRange {
    /// The first; counted from the end when negative.
    pub offset: i64,
    /// How many at most.
    pub length: Option<u64>,
}

/// Bytes of a file or of a tar stream on their way out of the guest.
#[derive(Debug)]
pub struct FileContent {
    reader: FrameReader,
    /// A connection closed in one direction means a client that has gone.
    _writer: FrameWriter,
}

impl FileContent {
    /// The next bytes; none at the end. Cancel safe.
    pub async fn next(&mut self) -> Result<Option<Bytes>, GuestError> {
        self.reader.data().await
    }
}

/// Bytes of a file or of a tar stream on their way into the guest. Dropped unfinished, a file stays as it was.
#[derive(Debug)]
pub struct Upload {
    reader: FrameReader,
    writer: FrameWriter,
}

impl Upload {
    /// Sends the next bytes.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), GuestError> {
        self.writer.bytes(Kind::Data, bytes).await
    }

    /// Says that this was all, and waits until the guest has it.
    pub async fn finish(mut self) -> Result<(), GuestError> {
        let finishing = async {
            self.writer.end(Kind::Data).await?;
            done(self.reader.response().await?)
        };
        let late = |_| GuestError::TimedOut { what: "finish what it was sent", limit: STEP_LIMIT };
        tokio::time::timeout(STEP_LIMIT, finishing).await.map_err(late)?
    }
}

/// What happens to watched files.
#[derive(Debug)]
pub struct Changes {
    reader: FrameReader,
    _writer: FrameWriter,
}

impl Changes {
    /// The next change; none when the guest has ended the watch. Cancel safe.
    pub async fn next(&mut self) -> Result<Option<FileChange>, GuestError> {
        match self.reader.response().await {
            Ok(Response::Changed(change)) => Ok(Some(change)),
            Ok(other) => Err(unexpected("Changed", &other)),
            Err(GuestError::Connection(FrameError::Closed)) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl GuestConnection {
    /// Begins to read a file; the description is that of the whole file.
    pub async fn read_file(
        self,
        path: String,
        range: Option<ByteRange>,
    ) -> Result<(FileInfo, FileContent), GuestError> {
        let request = match range {
            // Also agents that do not know of ranges read whole files.
            None => Request::ReadFile { path },
            Some(ByteRange { offset, length }) => Request::ReadRange { path, offset, length },
        };
        match self.begin_stream(&request).await? {
            (Response::File(info), reader, writer) => Ok((info, FileContent { reader, _writer: writer })),
            (other, ..) => Err(unexpected("File", &other)),
        }
    }

    /// Begins to write a file. What is there is replaced when all has come.
    pub async fn write_file(self, path: String, mode: u32, parents: bool) -> Result<Upload, GuestError> {
        let (reader, writer) = self.begin(&Request::WriteFile { path, mode, parents }).await?;
        Ok(Upload { reader, writer })
    }

    /// Begins to read a file or a tree as a tar stream.
    pub async fn archive(self, path: String) -> Result<FileContent, GuestError> {
        let (response, reader, writer) = self.begin_stream(&Request::Archive { path }).await?;
        done(response)?;
        Ok(FileContent { reader, _writer: writer })
    }

    /// Begins to unpack a tar stream into a directory.
    pub async fn extract(self, path: String, owners: bool) -> Result<Upload, GuestError> {
        let (reader, writer) = self.begin(&Request::Extract { path, owners }).await?;
        Ok(Upload { reader, writer })
    }

    /// Lists a directory.
    pub async fn list(self, path: String) -> Result<Vec<FileInfo>, GuestError> {
        let listing = async {
            let (mut reader, _writer) = self.begin(&Request::List { path, pages: true }).await?;
            let mut all = Vec::new();
            loop {
                match reader.response().await {
                    Ok(Response::Listing { entries }) if entries.is_empty() => return Ok(all),
                    Ok(Response::Listing { entries }) => all.extend(entries),
                    Ok(other) => return Err(unexpected("Listing", &other)),
                    // An agent that knows one listing only.
                    Err(GuestError::Connection(FrameError::Closed)) if !all.is_empty() => return Ok(all),
                    Err(error) => return Err(error),
                }
            }
        };
        let late = |_| GuestError::TimedOut { what: "list a directory", limit: STEP_LIMIT };
        tokio::time::timeout(STEP_LIMIT, listing).await.map_err(late)?
    }

    /// Describes a file, not following a final symbolic link.
    pub async fn stat(self, path: String) -> Result<FileInfo, GuestError> {
        match self.ask(&Request::Stat { path }, "describe a file", STEP_LIMIT).await? {
            Response::Stat(info) => Ok(info),
            other => Err(unexpected("Stat", &other)),
        }
    }

    /// Makes a directory and its parents.
    pub async fn make_directory(self, path: String) -> Result<(), GuestError> {
        done(self.ask(&Request::MakeDir { path }, "make a directory", STEP_LIMIT).await?)
    }

    /// Renames within one file system.
    pub async fn rename(self, from: String, to: String) -> Result<(), GuestError> {
        done(self.ask(&Request::Rename { from, to }, "move a file", STEP_LIMIT).await?)
    }

    /// Removes a file, an empty directory, or with `recursive` a tree.
    pub async fn remove(self, path: String, recursive: bool) -> Result<(), GuestError> {
        done(self.ask(&Request::Remove { path, recursive }, "remove a file", STEP_LIMIT).await?)
    }

    /// Begins to watch a file or a directory.
    pub async fn watch(self, path: String, recursive: bool) -> Result<Changes, GuestError> {
        let (response, reader, writer) = self.begin_stream(&Request::Watch { path, recursive }).await?;
        done(response)?;
        Ok(Changes { reader, _writer: writer })
    }
}

fn done(response: Response) -> Result<(), GuestError> {
    match response {
        Response::Done => Ok(()),
        other => Err(unexpected("Done", &other)),
    }
}
