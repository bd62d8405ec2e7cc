//! From a sandbox.
//!
//! A guest is not trusted: a tree is unpacked in a fresh directory beside its place, where the tar library keeps
//! every entry inside, and moved to its place when all has come.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use forkd_proto::agent::{FileType, Request, Response};

use super::place::{is_contents, name_of};
use super::{Guest, pipe};
use crate::client::out_of_turn;
use crate::failure::advised;
use crate::output;
use crate::progress::Progress;

/// The tar stream of `path` to standard output.
pub(super) async fn to_stream(guest: &Guest, path: &str) -> anyhow::Result<()> {
    let request = Request::Archive { path: path.to_owned() };
    let (mut reader, _writer) = guest.connect().await?.begin_stream(&request, "pack files").await?;
    while let Some(bytes) = reader.data().await? {
        tokio::task::block_in_place(|| output::bytes(&bytes))?;
    }
    Ok(())
}

/// `path` to the path `to` of this host.
pub(super) async fn to_path(guest: &Guest, path: &str, to: &Path, progress: &Progress) -> anyhow::Result<()> {
    let Some(info) = guest.stat(path).await? else {
        let error = anyhow::anyhow!("there is no {path} in {}", guest.sandbox);
        return Err(advised(error, format!("forkd files ls {} {}", guest.sandbox, super::place::parent_of(path))));
    };
    let name = name_of(path);
    let into = |name: &str| if to.is_dir() { to.join(name) } else { to.to_owned() };
    if info.file_type == FileType::File {
        let name = name.context("the root of a guest is no file")?;
        if to.as_os_str().to_string_lossy().ends_with('/') && !to.is_dir() {
            anyhow::bail!("{} is not a directory", to.display());
        }
        return file(guest, path, info.size, &into(name), progress).await;
    }
    let place = match name {
        Some(name) if !is_contents(path) => into(name),
        _ => to.to_owned(),
    };
    tree(guest, path, &place, progress).await
}

/// One file, whole or not at all.
async fn file(guest: &Guest, path: &str, size: u64, to: &Path, progress: &Progress) -> anyhow::Result<()> {
    let failed = || format!("could not write {}", to.display());
    let connection = guest.connect().await?;
    let (mut reader, _writer) = connection.begin(&Request::ReadFile { path: path.to_owned() }).await?;
    let info = match reader.answer().await? {
        Response::File(info) => info,
        other => return Err(out_of_turn("file", &other).into()),
    };
    let mut temporary = tempfile::NamedTempFile::new_in(parent(to)).with_context(failed)?;
    let step = progress.quick_step(format!("Copying {path}"));
    step.set_bytes(size);
    let mut done = 0;
    while let Some(bytes) = reader.data().await? {
        tokio::task::block_in_place(|| temporary.write_all(&bytes)).with_context(failed)?;
        done += bytes.len() as u64;
        step.set_position(done);
    }
    temporary.as_file().set_permissions(fs::Permissions::from_mode(info.mode & 0o777)).with_context(failed)?;
    temporary.persist(to).with_context(failed)?;
    step.vanish();
    Ok(())
}

/// A tree, which becomes `place` or is laid over it.
async fn tree(guest: &Guest, path: &str, place: &Path, progress: &Progress) -> anyhow::Result<()> {
    let request = Request::Archive { path: path.trim_end_matches("/.").to_owned() };
    let request = match request {
        Request::Archive { path } if path.is_empty() => Request::Archive { path: "/".to_owned() },
        other => other,
    };
    let (mut reader, _writer) = guest.connect().await?.begin_stream(&request, "pack files").await?;
    let beside = tempfile::Builder::new().prefix(".forkd-cp-").tempdir_in(parent(place));
    let staging = beside.with_context(|| format!("could not make a directory in {}", parent(place).display()))?;
    let (pieces, source) = pipe::to_reader();
    let root = staging.path().to_owned();
    let unpacking = tokio::task::spawn_blocking(move || unpack(source, &root));
    let step = progress.quick_step(format!("Copying {path}"));
    let mut done = 0;
    let receiving = loop {
        match reader.data().await {
            Ok(Some(bytes)) => {
                done += bytes.len() as u64;
                step.detail(forkd_types::ByteSize(done).to_string());
                if pieces.send(Ok(bytes)).await.is_err() {
                    break Ok(());
                }
            }
            Ok(None) => break Ok(()),
            Err(error) => {
                let _ = pieces.send(Err(io::Error::other("the copy broke off"))).await;
                break Err(error);
            }
        }
    };
    drop(pieces);
    let unpacked = unpacking.await.context("unpacking was cancelled")?;
    receiving?;
    unpacked.with_context(|| format!("could not unpack {path} of {}", guest.sandbox))?;
    step.vanish();
    settle(&staging.path().join(ROOT), place).with_context(|| format!("could not write {}", place.display()))
}

/// What the root of a tree is called while it is unpacked.
const ROOT: &str = "tree";

/// Unpacks the stream into `staging`; whatever its root is called, it becomes [`ROOT`].
fn unpack(mut source: impl Read, staging: &Path) -> io::Result<()> {
    let raw = staging.join("raw");
    fs::create_dir(&raw)?;
    let mut archive = tar::Archive::new(&mut source);
    archive.set_preserve_mtime(true);
    archive.unpack(&raw)?;
    io::copy(&mut source, &mut io::sink())?;
    let roots = fs::read_dir(&raw)?.collect::<io::Result<Vec<_>>>()?;
    match &roots[..] {
        // The root of a guest has no name of its own: its entries are those of the stream.
        [root] if root.file_name() != "." => fs::rename(root.path(), staging.join(ROOT)),
        _ => fs::rename(&raw, staging.join(ROOT)),
    }
}

/// Moves `from` to `to`; where both are directories, what is in one is laid over the other.
fn settle(from: &Path, to: &Path) -> io::Result<()> {
    let is_directory = fs::symlink_metadata(from)?.is_dir();
    if is_directory && to.is_dir() {
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            settle(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    fs::rename(from, to)
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(entries: &[(&str, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, content) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            // As bytes: the library refuses to write what it must refuse to unpack.
            header.as_gnu_mut().expect("gnu").name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_cksum();
            builder.append(&header, content.as_bytes()).expect("append");
        }
        builder.into_inner().expect("stream")
    }

    #[test]
    fn a_tree_is_laid_over_what_is_there() {
        let directory = tempfile::tempdir().expect("scratch directory");
        let staging = directory.path().join("staging");
        fs::create_dir(&staging).expect("mkdir");
        unpack(&stream(&[("own/a", "new"), ("own/sub/b", "b")])[..], &staging).expect("unpacked");
        let place = directory.path().join("place");
        fs::create_dir_all(place.join("sub")).expect("mkdir");
        fs::write(place.join("a"), "old").expect("write");
        fs::write(place.join("kept"), "kept").expect("write");
        settle(&staging.join(ROOT), &place).expect("moved");
        let read = |name: &str| fs::read_to_string(place.join(name)).expect("read");
        assert_eq!([read("a"), read("kept"), read("sub/b")], ["new", "kept", "b"]);
    }

    #[test]
    fn entries_that_would_leave_their_directory_do_not() {
        let directory = tempfile::tempdir().expect("scratch directory");
        let staging = directory.path().join("staging");
        fs::create_dir(&staging).expect("mkdir");
        let _ = unpack(&stream(&[("own/a", "a"), ("../../escaped", "x"), ("/escaped", "x")])[..], &staging);
        assert!(!directory.path().join("escaped").exists() && !Path::new("/escaped").exists());
    }
}
