//! Tells a client of changes to files, from inotify.
//!
//! inotify watches directories one by one: a recursive watch puts one on every directory below, and on
//! each that comes later. What came into such a directory before its watch was set is looked up and told
//! as created, so nothing that exists when things are quiet has gone untold; a file may be told as
//! created twice.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use forkd_proto::agent::{ChangeKind, Failure, FileChange, Response};
use forkd_proto::frame::FrameError;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;

use super::absolute;
use crate::connection::Connection;
use crate::failure;

/// What is asked of the kernel for every watch.
const INTEREST: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::EXCL_UNLINK);

/// Room for events of one read; one with the longest name takes 272 bytes.
const BUFFER: usize = 64 << 10;

/// Tells of changes to `path` until the client closes or what is watched is gone.
pub fn serve(connection: &Connection, path: &str, recursive: bool) -> Result<(), FrameError> {
    let mut watch = match Watch::start(path, recursive) {
        Ok(watch) => watch,
        Err(failure) => return connection.fail(failure),
    };
    connection.respond(&Response::Done)?;
    loop {
        if client_is_gone(connection, &watch.inotify)? {
            return Ok(());
        }
        let (changes, over) = match watch.changes() {
            Ok(read) => read,
            Err(error) => {
                return connection.fail(failure::from_io(format_args!("cannot go on watching {path}"), &error));
            }
        };
        for change in changes {
            connection.respond(&Response::Changed(change))?;
        }
        if over {
            return connection.fail(failure::not_found(format!("{path} is not there any more")));
        }
    }
}

/// Waits for events; whether the client has gone instead. It has nothing to say, so that it says something
/// is as good as going.
fn client_is_gone(connection: &Connection, inotify: &OwnedFd) -> io::Result<bool> {
    loop {
        let mut fds = [PollFd::new(connection, PollFlags::IN | PollFlags::RDHUP), PollFd::new(inotify, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) if !fds[0].revents().is_empty() => return Ok(true),
            Ok(_) if !fds[1].revents().is_empty() => return Ok(false),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

struct Watch {
    inotify: OwnedFd,
    recursive: bool,
    root: PathBuf,
    root_watch: i32,
    /// The directory of each watch, or the one file that is watched.
    watched: HashMap<i32, PathBuf>,
}

/// An event, detached from the buffer that it was read into.
struct Event {
    watch: i32,
    flags: ReadFlags,
    cookie: u32,
    name: Option<PathBuf>,
}

impl Watch {
    fn start(path: &str, recursive: bool) -> Result<Self, Failure> {
        let root = absolute(path)?.to_owned();
        let failed = |error: io::Error| failure::from_io(format_args!("cannot watch {path}"), &error);
        let inotify =
            inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).map_err(|error| failed(error.into()))?;
        let mut watch = Self { inotify, recursive, root: root.clone(), root_watch: -1, watched: HashMap::new() };
        watch.root_watch = watch.add(&root).map_err(failed)?;
        if recursive && root.is_dir() {
            watch.add_below(&root, &mut Vec::new(), false).map_err(failed)?;
        }
        Ok(watch)
    }

    fn add(&mut self, path: &Path) -> io::Result<i32> {
        let watch = inotify::add_watch(&self.inotify, path, INTEREST).map_err(|error| match error {
            Errno::NOSPC => io::Error::new(
                io::ErrorKind::QuotaExceeded,
                "the guest allows no more watches; raise fs.inotify.max_user_watches",
            ),
            other => other.into(),
        })?;
        self.watched.insert(watch, path.to_owned());
        Ok(watch)
    }

    /// Watches the directories below `directory`; with `tell` what is in them is reported as created.
    fn add_below(&mut self, directory: &Path, changes: &mut Vec<FileChange>, tell: bool) -> io::Result<()> {
        let mut pending = vec![directory.to_owned()];
        while let Some(directory) = pending.pop() {
            let entries = match fs::read_dir(&directory) {
                // Gone already, or a mount that does not let itself be read.
                Err(error) if is_passing(&error) => continue,
                entries => entries?,
            };
            for entry in entries {
                let Ok(entry) = entry else { break };
                let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
                if tell {
                    changes.push(change(ChangeKind::Created, &entry.path(), is_directory));
                }
                if is_directory {
                    match self.add(&entry.path()) {
                        Ok(_) => pending.push(entry.path()),
                        Err(error) if is_passing(&error) => {}
                        Err(error) => return Err(error),
                    }
                }
            }
        }
        Ok(())
    }

    /// What has happened, and whether what is watched is gone.
    fn changes(&mut self) -> io::Result<(Vec<FileChange>, bool)> {
        let events = self.read()?;
        let mut changes: Vec<FileChange> = Vec::new();
        let mut moved_from: HashMap<u32, usize> = HashMap::new();
        let mut over = false;
        for event in events {
            if event.flags.contains(ReadFlags::QUEUE_OVERFLOW) {
                changes.push(change(ChangeKind::Missed, &self.root, true));
                continue;
            }
            if event.flags.contains(ReadFlags::IGNORED) {
                self.watched.remove(&event.watch);
                over |= event.watch == self.root_watch;
                continue;
            }
            let Some(watched) = self.watched.get(&event.watch) else { continue };
            let path = event.name.as_ref().map_or_else(|| watched.clone(), |name| watched.join(name));
            let is_root = event.name.is_none() && event.watch == self.root_watch;
            // A directory is told of by the one above it, which is watched too, unless it is the root.
            if event.name.is_none() && !is_root {
                continue;
            }
            let directory = event.flags.contains(ReadFlags::ISDIR);
            if event.flags.contains(ReadFlags::MOVE_SELF) {
                changes.push(change(ChangeKind::Removed, &path, directory));
                over = true;
                continue;
            }
            let Some(kind) = kind_of(event.flags) else { continue };
            if event.flags.contains(ReadFlags::MOVED_FROM) {
                moved_from.insert(event.cookie, changes.len());
                if directory {
                    self.forget_below(&path);
                }
            }
            let came = event.flags.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO);
            let from = event.flags.contains(ReadFlags::MOVED_TO).then(|| moved_from.remove(&event.cookie)).flatten();
            match from {
                Some(index) => {
                    let from = std::mem::take(&mut changes[index].path);
                    changes[index] = FileChange { from: Some(from), ..change(ChangeKind::Moved, &path, directory) };
                }
                None => {
                    let next = change(kind, &path, directory);
                    if changes.last() != Some(&next) {
                        changes.push(next);
                    }
                }
            }
            if came && directory && self.recursive {
                match self.add(&path) {
                    // What was moved here as a whole was told as one.
                    Ok(_) => self.add_below(&path, &mut changes, from.is_none())?,
                    Err(error) if is_passing(&error) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok((changes, over))
    }

    /// Ends the watches on a directory that went elsewhere, and below it: their paths are not theirs any more.
    fn forget_below(&mut self, path: &Path) {
        let gone: Vec<i32> =
            self.watched.iter().filter(|(_, own)| own.starts_with(path)).map(|(watch, _)| *watch).collect();
        for watch in gone {
            self.watched.remove(&watch);
            // It may have ended by itself.
            let _ = inotify::remove_watch(&self.inotify, watch);
        }
    }

    fn read(&self) -> io::Result<Vec<Event>> {
        let mut buffer = vec![MaybeUninit::uninit(); BUFFER];
        let mut reader = inotify::Reader::new(&self.inotify, &mut buffer);
        let mut events = Vec::new();
        loop {
            match reader.next() {
                Ok(event) => events.push(Event {
                    watch: event.wd(),
                    flags: event.events(),
                    cookie: event.cookie(),
                    name: event.file_name().map(|name| Path::new(std::ffi::OsStr::from_bytes(name.to_bytes())).into()),
                }),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Ok(events),
                Err(error) => return Err(error.into()),
            }
            // One buffer full at a time: a guest that never stops writing must not keep this here.
            if reader.is_buffer_empty() {
                return Ok(events);
            }
        }
    }
}

fn kind_of(flags: ReadFlags) -> Option<ChangeKind> {
    let kinds = [
        (ReadFlags::CREATE | ReadFlags::MOVED_TO, ChangeKind::Created),
        (ReadFlags::DELETE | ReadFlags::DELETE_SELF | ReadFlags::MOVED_FROM, ChangeKind::Removed),
        (ReadFlags::CLOSE_WRITE, ChangeKind::Written),
        (ReadFlags::MODIFY, ChangeKind::Modified),
        (ReadFlags::ATTRIB, ChangeKind::Attributes),
    ];
    kinds.into_iter().find(|(of_kind, _)| flags.intersects(*of_kind)).map(|(_, kind)| kind)
}

fn change(kind: ChangeKind, path: &Path, directory: bool) -> FileChange {
    FileChange { change: kind, path: path.to_string_lossy().into_owned(), from: None, directory }
}

/// Whether a directory is merely gone or closed to us, which is no reason to end the watch of others.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied | io::ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(watch: &mut Watch) -> Vec<(ChangeKind, String)> {
        let root = watch.root.clone();
        let name = |path: &str| Path::new(path).strip_prefix(&root).expect("below the root").display().to_string();
        let (changes, _) = watch.changes().expect("read");
        changes.into_iter().map(|change| (change.change, name(&change.path))).collect()
    }

    #[test]
    fn a_tree_that_grows_and_shrinks_is_told() {
        let dir = tempfile::tempdir().expect("tempdir");
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("old")).expect("mkdir");
        let mut watch = Watch::start(dir.path().to_str().expect("text"), true).expect("watch");
        fs::write(at("old/file"), "x").expect("write");
        assert_eq!(
            told(&mut watch),
            [
                (ChangeKind::Created, "old/file".into()),
                (ChangeKind::Modified, "old/file".into()),
                (ChangeKind::Written, "old/file".into())
            ]
        );
        // Both levels are there before the watch on the first can be set.
        fs::create_dir_all(at("new/deep")).expect("mkdir");
        assert_eq!(told(&mut watch), [(ChangeKind::Created, "new".into()), (ChangeKind::Created, "new/deep".into())]);
        fs::write(at("new/deep/file"), "x").expect("write");
        assert!(told(&mut watch).contains(&(ChangeKind::Written, "new/deep/file".into())));

        fs::rename(at("new"), at("moved")).expect("rename");
        let (changes, over) = watch.changes().expect("read");
        assert_eq!((changes.len(), over), (1, false), "{changes:?}");
        assert_eq!(changes[0].change, ChangeKind::Moved);
        assert_eq!(changes[0].from.as_deref(), at("new").to_str());
        fs::write(at("moved/deep/file"), "y").expect("write");
        assert!(told(&mut watch).contains(&(ChangeKind::Written, "moved/deep/file".into())), "paths follow the move");

        fs::remove_dir_all(at("moved")).expect("remove");
        let gone = told(&mut watch);
        assert!(gone.ends_with(&[(ChangeKind::Removed, "moved".into())]), "{gone:?}");
        fs::remove_dir_all(dir.path()).expect("remove");
        let (_, over) = watch.changes().expect("read");
        assert!(over, "what was watched is gone");
    }

    #[test]
    fn without_recursion_only_the_directory_itself_is_told_of() {
        let dir = tempfile::tempdir().expect("tempdir");
        fs::create_dir(dir.path().join("below")).expect("mkdir");
        let mut watch = Watch::start(dir.path().to_str().expect("text"), false).expect("watch");
        fs::write(dir.path().join("below/file"), "x").expect("write");
        fs::write(dir.path().join("here"), "").expect("write");
        assert_eq!(told(&mut watch), [(ChangeKind::Created, "here".into()), (ChangeKind::Written, "here".into())]);
    }

    #[test]
    fn what_is_not_there_cannot_be_watched() {
        let failure = Watch::start("/nowhere/at/all", true).err().expect("not there");
        assert_eq!(failure.code, forkd_proto::agent::FailureCode::NotFound);
        assert!(failure.message.contains("/nowhere/at/all"), "{failure}");
    }
}
