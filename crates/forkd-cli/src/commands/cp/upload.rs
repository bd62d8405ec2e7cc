//! To a sandbox.

use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use anyhow::Context as _;
use forkd_proto::agent::{Request, Response};
use forkd_proto::frame::{Frame, Kind};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::place::{is_contents, parent_of};
use super::{Guest, pipe};
use crate::client::{FrameReader, FrameWriter, out_of_turn};
use crate::failure::advised;
use crate::progress::Progress;

/// Bytes in one frame.
const CHUNK: usize = 64 << 10;

/// A tar stream from standard input into the directory `path`.
pub(super) async fn from_stream(guest: &Guest, path: &str, owners: bool) -> anyhow::Result<()> {
    let request = Request::Extract { path: path.to_owned(), owners };
    let (mut reader, mut writer) = guest.connect().await?.begin(&request).await?;
    send(&mut tokio::io::stdin(), &mut writer, |_| ()).await.context("could not read standard input")?;
    finish(&mut reader, &mut writer).await
}

/// What is at `from` on this host to `path`.
pub(super) async fn from_path(
    guest: &Guest,
    from: &Path,
    path: &str,
    owners: bool,
    progress: &Progress,
) -> anyhow::Result<()> {
    let metadata = fs::metadata(from).with_context(|| format!("could not read {}", from.display()))?;
    let contents = is_contents(&from.to_string_lossy());
    let name = fs::canonicalize(from)?.file_name().map(|name| name.to_string_lossy().into_owned());
    let is_directory = guest.is_directory(path).await?;
    let place = match (is_directory, &name) {
        (true, Some(name)) if !contents => format!("{}/{name}", path.trim_end_matches('/')),
        (false, _) if path.ends_with('/') && !metadata.is_dir() => {
            let error = anyhow::anyhow!("{path} is not a directory in {}", guest.sandbox);
            return Err(advised(error, format!("forkd files mkdir {} {path}", guest.sandbox)));
        }
        _ => path.to_owned(),
    };
    if metadata.is_dir() {
        // Contents of a directory that is there go into it; any other tree becomes its place.
        let (into, root) = if contents && is_directory {
            (place.as_str(), ".")
        } else {
            let root = super::place::name_of(&place).unwrap_or(".");
            (parent_of(&place), root)
        };
        return tree(guest, from, into, root, owners, progress).await;
    }
    if !metadata.is_file() {
        anyhow::bail!("{} is neither a file nor a directory", from.display());
    }
    file(guest, from, &metadata, &place, progress).await
}

/// One file, whole or not at all. One that is replaced keeps its owner and mode.
async fn file(guest: &Guest, from: &Path, metadata: &Metadata, path: &str, progress: &Progress) -> anyhow::Result<()> {
    let failed = || format!("could not read {}", from.display());
    let mut content = tokio::fs::File::open(from).await.with_context(failed)?;
    let request = Request::WriteFile { path: path.to_owned(), mode: metadata.mode() & 0o7777, parents: false };
    let (mut reader, mut writer) = guest.connect().await?.begin(&request).await?;
    let step = progress.quick_step(format!("Copying {}", from.display()));
    step.set_bytes(metadata.len());
    send(&mut content, &mut writer, |done| step.set_position(done)).await.with_context(failed)?;
    finish(&mut reader, &mut writer).await?;
    step.vanish();
    Ok(())
}

/// A tree, as `root` in the directory `into`.
async fn tree(
    guest: &Guest,
    from: &Path,
    into: &str,
    root: &str,
    owners: bool,
    progress: &Progress,
) -> anyhow::Result<()> {
    let request = Request::Extract { path: into.to_owned(), owners };
    let (mut reader, mut writer) = guest.connect().await?.begin(&request).await?;
    let (sink, mut pieces) = pipe::from_writer();
    let (source, root) = (from.to_owned(), root.to_owned());
    let packing = tokio::task::spawn_blocking(move || pack(sink, &source, &root));
    let step = progress.quick_step(format!("Copying {}", from.display()));
    let mut done = 0;
    while let Some(piece) = pieces.recv().await {
        done += piece.len() as u64;
        step.detail(forkd_types::ByteSize(done).to_string());
        writer.frame(&Frame::bytes(Kind::Data, piece)).await?;
    }
    packing.await.context("packing was cancelled")?.with_context(|| format!("could not read {}", from.display()))?;
    finish(&mut reader, &mut writer).await?;
    step.vanish();
    Ok(())
}

/// Writes the tree `source` as a tar stream in which it is called `root`. Sockets, which tar has no form for, and
/// what goes away meanwhile are left out.
fn pack(sink: impl Write, source: &Path, root: &str) -> io::Result<()> {
    let mut builder = tar::Builder::new(sink);
    builder.follow_symlinks(false);
    let mut pending = vec![(source.to_owned(), Path::new(root).to_owned())];
    let mut first = true;
    while let Some((file, name)) = pending.pop() {
        // The source itself may be a link to the tree.
        let metadata = if std::mem::take(&mut first) { fs::metadata(&file) } else { fs::symlink_metadata(&file) };
        let metadata = match metadata {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            metadata => metadata?,
        };
        if metadata.file_type().is_socket() {
            continue;
        }
        if metadata.is_file() {
            append_file(&mut builder, &file, &name)?;
        } else if metadata.is_dir() {
            builder.append_dir(&name, &file)?;
            let mut below = fs::read_dir(&file)?.collect::<io::Result<Vec<_>>>()?;
            // The last is taken first.
            below.sort_by_key(|entry| std::cmp::Reverse(entry.file_name()));
            pending.extend(below.into_iter().map(|entry| (entry.path(), name.join(entry.file_name()))));
        } else {
            builder.append_path_with_name(&file, &name)?;
        }
    }
    builder.into_inner()?.flush()
}

/// Appends a regular file at the length that it has now, also if it grows or shrinks meanwhile.
fn append_file(builder: &mut tar::Builder<impl Write>, file: &Path, name: &Path) -> io::Result<()> {
    let content = File::open(file)?;
    let metadata = content.metadata()?;
    let mut header = tar::Header::new_gnu();
    header.set_metadata(&metadata);
    let exactly = content.chain(io::repeat(0)).take(metadata.len());
    builder.append_data(&mut header, name, exactly)
}

/// Sends everything that `source` has; `progress` is told how much that was so far.
async fn send<S: AsyncRead + tokio::io::AsyncWrite>(
    source: &mut (impl AsyncRead + Unpin),
    writer: &mut FrameWriter<S>,
    progress: impl Fn(u64),
) -> anyhow::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut done = 0;
    loop {
        let got = source.read(&mut buffer).await?;
        if got == 0 {
            return Ok(());
        }
        writer.frame(&Frame::bytes(Kind::Data, &buffer[..got])).await?;
        done += got as u64;
        progress(done);
    }
}

/// Says that this was all, and hears whether it arrived.
async fn finish<S: AsyncRead + tokio::io::AsyncWrite>(
    reader: &mut FrameReader<S>,
    writer: &mut FrameWriter<S>,
) -> anyhow::Result<()> {
    writer.frame(&Frame::bytes(Kind::Data, Vec::new())).await?;
    match reader.answer().await? {
        Response::Done => Ok(()),
        other => Err(out_of_turn("done", &other).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_packed_under_its_new_name() {
        let directory = tempfile::tempdir().expect("scratch directory");
        let at = |name: &str| directory.path().join(name);
        fs::create_dir_all(at("sub/empty")).expect("mkdir");
        fs::write(at("file"), "content").expect("write");
        std::os::unix::fs::symlink("file", at("link")).expect("link");
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).expect("bind");
        let mut stream = Vec::new();
        pack(&mut stream, directory.path(), "named").expect("packed");
        let mut archive = tar::Archive::new(&stream[..]);
        let names: Vec<_> = archive
            .entries()
            .expect("entries")
            .map(|entry| entry.expect("entry").path().expect("path").display().to_string())
            .collect();
        let names: Vec<_> = names.iter().map(|name| name.trim_end_matches('/')).collect();
        assert_eq!(names, ["named", "named/file", "named/link", "named/sub", "named/sub/empty"]);
    }
}
