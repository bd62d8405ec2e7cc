//! Unpacking an archive of a root file system.
//!
//! An archive is not trusted. Member names must be relative and without `..`; directories on the
//! way are opened as if the tree were `/` (`RESOLVE_IN_ROOT`), so a symbolic link, absolute or not,
//! leads where it would lead in the guest and never out of the tree; the last component is never
//! followed. Links may point anywhere, since only the guest will follow them.

use std::cell::Cell;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use tar::{Archive, Entry, EntryType};

use super::correction::{Correction, Corrections};
use crate::kernel::{Compression, Streams};
use crate::progress::Progress;
use crate::{ImageError, Result};

/// Prefix of the PAX records that hold extended attributes.
const ATTRIBUTE: &str = "SCHILY.xattr.";

/// Unpacks `archive` into the directory `root`, which does not exist yet.
///
/// Root gives every file its owner and attributes. Another user cannot, and gets back what is to be
/// corrected in the image.
pub(crate) fn unpack(archive: &Path, root: &Path, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Corrections> {
    let unpacked = Unpacking::begin(archive, root)?.run(progress);
    match unpacked {
        // How much it would have been is known only when all of it was seen.
        Err(ImageError::NoSpace { path, free, .. }) => {
            Err(ImageError::NoSpace { path, free, needed: content_bytes(archive).ok().map(forkd_types::ByteSize) })
        }
        other => other,
    }
}

/// The sum of the sizes of all members.
fn content_bytes(archive: &Path) -> Result<u64> {
    let consumed = Cell::new(0);
    let mut reader = open(archive, &consumed)?;
    let mut total = 0;
    for entry in reader.entries().map_err(unreadable(archive))? {
        total += entry.map_err(unreadable(archive))?.size().next_multiple_of(4096);
    }
    Ok(total)
}

fn open<'a>(path: &Path, consumed: &'a Cell<u64>) -> Result<Archive<Box<dyn Read + 'a>>> {
    let file = File::open(path).map_err(ImageError::io("open the archive", path))?;
    let mut reader = BufReader::with_capacity(1 << 16, Counted { file, consumed });
    let start = reader.fill_buf().map_err(ImageError::io("read the archive", path))?;
    let compression = Compression::of(start);
    let decoded = compression.reader(reader, Streams::All).map_err(unreadable(path))?;
    Ok(Archive::new(decoded))
}

fn unreadable(archive: &Path) -> impl Fn(io::Error) -> ImageError {
    move |error| ImageError::Archive { path: archive.to_owned(), reason: error.to_string() }
}

/// Counts what is read of the file, for progress.
struct Counted<'a> {
    file: File,
    consumed: &'a Cell<u64>,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.file.read(buffer)?;
        self.consumed.set(self.consumed.get() + got as u64);
        Ok(got)
    }
}

struct Unpacking<'a> {
    archive: &'a Path,
    root_path: &'a Path,
    root: OwnedFd,
    /// Modes and times of directories, set when nothing is put into them any more.
    directories: Vec<(PathBuf, Attributes)>,
    /// Whether owners and attributes can be given to files.
    privileged: bool,
    corrections: Corrections,
}

/// What every member has besides its content.
#[derive(Clone)]
struct Attributes {
    mode: Mode,
    owner: Uid,
    group: Gid,
    times: Timestamps,
    extended: Vec<(String, Vec<u8>)>,
}

impl<'a> Unpacking<'a> {
    fn begin(archive: &'a Path, root_path: &'a Path) -> Result<Self> {
        std::fs::create_dir(root_path).map_err(ImageError::io("create directory", root_path))?;
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let root = rustix::fs::open(root_path, flags, Mode::empty()).map_err(ImageError::io("open", root_path))?;
        rustix::fs::fchmod(&root, Mode::from_raw_mode(0o755)).map_err(ImageError::io("set the mode of", root_path))?;
        let privileged = rustix::process::geteuid().is_root();
        let corrections = Corrections::default();
        Ok(Self { archive, root_path, root, directories: Vec::new(), privileged, corrections })
    }

    fn run(mut self, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Corrections> {
        let size = self.archive.metadata().map_err(ImageError::io("read", self.archive))?.len();
        let consumed = Cell::new(0);
        let mut reader = open(self.archive, &consumed)?;
        let mut members = 0u64;
        for entry in reader.entries().map_err(unreadable(self.archive))? {
            let mut entry = entry.map_err(unreadable(self.archive))?;
            self.member(&mut entry)?;
            members += 1;
            if members.is_multiple_of(64) {
                progress(Progress::part("unpacking the archive", consumed.get(), size));
            }
        }
        if members == 0 {
            return Err(unreadable(self.archive)(io::Error::other("it has no members")));
        }
        // Children before parents: setting a child's times changes nothing above it.
        while let Some((path, attributes)) = self.directories.pop() {
            let name = path.display().to_string();
            match self.open_dir(&path, ResolveFlags::NO_SYMLINKS) {
                Ok(dir) => self
                    .give(&dir, &path, FileType::Directory, attributes)
                    .map_err(|error| self.failed(&name)(error))?,
                // A later member took its place.
                Err(Errno::NOTDIR | Errno::LOOP | Errno::NOENT) => {}
                Err(error) => return Err(self.failed(&name)(error)),
            }
        }
        Ok(self.corrections)
    }

    /// Gives an open file its attributes, or notes those that it cannot be given.
    fn give(&mut self, file: &OwnedFd, path: &Path, kind: FileType, attributes: Attributes) -> rustix::io::Result<()> {
        if self.privileged {
            return attributes.apply(file);
        }
        // Whoever makes the image must be able to read it.
        let readable = if kind == FileType::Directory { 0o700 } else { 0o600 };
        rustix::fs::fchmod(file, attributes.mode | Mode::from_raw_mode(readable))?;
        rustix::fs::futimens(file, &attributes.times)?;
        self.correct(path, kind, attributes);
        Ok(())
    }

    /// As [`Self::give`], for what cannot be opened.
    fn give_at(
        &mut self,
        (parent, name): (&OwnedFd, &OsStr),
        path: &Path,
        kind: FileType,
        attributes: Attributes,
    ) -> rustix::io::Result<()> {
        if self.privileged {
            return attributes.apply_at(parent, name);
        }
        rustix::fs::utimensat(parent, name, &attributes.times, AtFlags::SYMLINK_NOFOLLOW)?;
        self.correct(path, kind, attributes);
        Ok(())
    }

    fn correct(&mut self, path: &Path, kind: FileType, attributes: Attributes) {
        let Attributes { mode, owner, group, extended, .. } = attributes;
        let mode = if kind == FileType::Symlink { 0o777 } else { mode.as_raw_mode() };
        self.corrections.note(
            path,
            Correction {
                uid: owner.as_raw(),
                gid: group.as_raw(),
                mode: Some(kind.as_raw_mode() | mode),
                attributes: extended,
            },
        );
    }

    fn member(&mut self, entry: &mut Entry<'_, impl Read>) -> Result<()> {
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let kind = entry.header().entry_type();
        if matches!(kind, EntryType::XGlobalHeader) {
            return Ok(());
        }
        let path = self.inside(&name, OsStr::from_bytes(&entry.path_bytes()), "")?;
        let attributes = Attributes::of(entry).map_err(|reason| self.refuse(&name, &reason))?;
        let Some(last) = path.file_name() else {
            // The root itself.
            if kind.is_dir() {
                self.directories.push((path, attributes));
                return Ok(());
            }
            return Err(self.refuse(&name, "is the root of the archive but not a directory"));
        };
        let parent = self.parent(&path).map_err(|error| self.failed(&name)(error))?;
        match kind {
            EntryType::Directory => {
                self.make_dir(&parent, last).map_err(|error| self.failed(&name)(error))?;
                self.directories.push((path, attributes));
                return Ok(());
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                self.clear(&parent, last, &name)?;
                let file = self.write_file(entry, &parent, last, &name)?;
                self.give(&file, &path, FileType::RegularFile, attributes)
                    .map_err(|error| self.failed(&name)(error))?;
            }
            EntryType::Symlink => {
                let target = entry.link_name_bytes().filter(|target| !target.is_empty());
                let target = target.ok_or_else(|| self.refuse(&name, "is a link to nothing"))?;
                self.clear(&parent, last, &name)?;
                rustix::fs::symlinkat(OsStr::from_bytes(&target), &parent, last)
                    .and_then(|()| self.give_at((&parent, last), &path, FileType::Symlink, attributes))
                    .map_err(|error| self.failed(&name)(error))?;
            }
            EntryType::Link => {
                let target = entry.link_name_bytes().unwrap_or_default().into_owned();
                self.hard_link(&name, &target, (&parent, last), &path)?;
            }
            EntryType::Fifo => {
                self.clear(&parent, last, &name)?;
                rustix::fs::mknodat(&parent, last, FileType::Fifo, attributes.mode, 0)
                    // The process's mask took bits away.
                    .and_then(|()| rustix::fs::chmodat(&parent, last, attributes.mode, AtFlags::empty()))
                    .and_then(|()| self.give_at((&parent, last), &path, FileType::Fifo, attributes))
                    .map_err(|error| self.failed(&name)(error))?;
            }
            EntryType::Char | EntryType::Block => {
                return Err(self.refuse(
                    &name,
                    "is a device node; guests have their own /dev, make the archive without it (tar --exclude)",
                ));
            }
            other => {
                let reason = format!("is of a kind that is not understood ({:?})", other.as_byte() as char);
                return Err(self.refuse(&name, &reason));
            }
        }
        Ok(())
    }

    fn write_file(
        &self,
        entry: &mut Entry<'_, impl Read>,
        parent: &OwnedFd,
        last: &OsStr,
        name: &str,
    ) -> Result<OwnedFd> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(parent, last, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|error| self.failed(name)(error))?;
        let mut file = File::from(file);
        let mut buffer = vec![0; 1 << 16];
        loop {
            // Reading fails because of the archive, writing because of the disk.
            let got = entry.read(&mut buffer).map_err(unreadable(self.archive))?;
            if got == 0 {
                break;
            }
            file.write_all(&buffer[..got]).map_err(|error| self.failed(name)(error))?;
        }
        Ok(OwnedFd::from(file))
    }

    fn hard_link(&mut self, name: &str, target: &[u8], (parent, last): (&OwnedFd, &OsStr), path: &Path) -> Result<()> {
        let text = String::from_utf8_lossy(target).into_owned();
        let target = self.inside(name, OsStr::from_bytes(target), &format!("links to {text:?}, which "))?;
        let from = target.file_name().ok_or_else(|| self.refuse(name, "is a hard link to the root"))?;
        let missing =
            || self.refuse(name, &format!("is a hard link to {text:?}, which is not before it in the archive"));
        let up = target.parent().unwrap_or(Path::new(""));
        let from_dir = self.open_dir(up, ResolveFlags::empty()).map_err(|_| missing())?;
        // Onto itself it would vanish before it is linked.
        let same = |one: rustix::io::Result<rustix::fs::Stat>, other: rustix::io::Result<rustix::fs::Stat>| matches!((one, other), (Ok(one), Ok(other)) if (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino));
        let stat = |dir: &OwnedFd, name: &OsStr| rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW);
        if same(stat(&from_dir, from), stat(parent, last)) {
            return Ok(());
        }
        self.clear(parent, last, name)?;
        match rustix::fs::linkat(&from_dir, from, parent, last, AtFlags::empty()) {
            Ok(()) => {
                // One file: what its first name lacks is lacking under each.
                self.corrections.copy(&target, path);
                Ok(())
            }
            Err(Errno::NOENT) => Err(missing()),
            Err(error) => Err(self.failed(name)(error)),
        }
    }

    /// The path of a member below the root; `what` goes before the reason of a refusal.
    fn inside(&self, member: &str, path: &OsStr, what: &str) -> Result<PathBuf> {
        let mut inside = PathBuf::new();
        for component in Path::new(path).components() {
            match component {
                Component::Normal(part) if part.as_bytes().contains(&0) => {
                    return Err(self.refuse(member, &format!("{what}has a zero byte in its name")));
                }
                Component::Normal(part) => inside.push(part),
                Component::CurDir => {}
                Component::ParentDir => {
                    return Err(self.refuse(member, &format!("{what}leads out of the archive by \"..\"")));
                }
                Component::RootDir | Component::Prefix(_) => {
                    return Err(self.refuse(
                        member,
                        &format!("{what}is absolute; make the archive with relative names (tar -C DIR .)"),
                    ));
                }
            }
        }
        Ok(inside)
    }

    /// Opens the directory that holds `path`, making what is missing.
    fn parent(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        let up = path.parent().unwrap_or(Path::new(""));
        match self.open_dir(up, ResolveFlags::empty()) {
            Err(Errno::NOENT) => {}
            other => return other,
        }
        let mut so_far = PathBuf::new();
        for part in up.components() {
            let above = self.open_dir(&so_far, ResolveFlags::empty())?;
            self.make_dir(&above, part.as_os_str())?;
            so_far.push(part);
        }
        self.open_dir(up, ResolveFlags::empty())
    }

    fn open_dir(&self, path: &Path, resolve: ResolveFlags) -> rustix::io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let resolve = resolve | ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(&self.root, path, flags, Mode::empty(), resolve)
    }

    /// Makes a directory unless there is one, or a link to one.
    fn make_dir(&self, parent: &OwnedFd, name: &OsStr) -> rustix::io::Result<()> {
        match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
            Err(Errno::EXIST) => {}
            other => return other,
        }
        let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Ok(()),
            // As in a system whose /lib is a link to usr/lib: what is in it goes where the link leads.
            FileType::Symlink => Ok(()),
            _ => {
                rustix::fs::unlinkat(parent, name, AtFlags::empty())?;
                rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755))
            }
        }
    }

    /// Makes room for a member: the last of several of one name wins.
    fn clear(&self, parent: &OwnedFd, last: &OsStr, name: &str) -> Result<()> {
        match rustix::fs::unlinkat(parent, last, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::ISDIR) => {}
            Err(error) => return Err(self.failed(name)(error)),
        }
        match rustix::fs::unlinkat(parent, last, AtFlags::REMOVEDIR) {
            Ok(()) => Ok(()),
            Err(Errno::NOTEMPTY) => Err(self.refuse(name, "is in the place of a directory that is not empty")),
            Err(error) => Err(self.failed(name)(error)),
        }
    }

    fn refuse(&self, member: &str, reason: &str) -> ImageError {
        ImageError::Member {
            source_path: self.archive.to_owned(),
            member: member.to_owned(),
            reason: reason.to_owned(),
        }
    }

    /// A system call failed for a member.
    fn failed<E: Into<io::Error>>(&self, member: &str) -> impl FnOnce(E) -> ImageError {
        ImageError::io("unpack", self.root_path.join(member.trim_start_matches(['.', '/'])))
    }
}

impl Attributes {
    fn of(entry: &mut Entry<'_, impl Read>) -> Result<Self, String> {
        let header = entry.header();
        let number = |name: &'static str| move |error: io::Error| format!("has a malformed {name}: {error}");
        let mode = header.mode().map_err(number("mode"))?;
        let id =
            |id: u64, name: &str| u32::try_from(id).map_err(|_| format!("has the {name} {id}, which is too large"));
        let owner = id(header.uid().map_err(number("owner"))?, "owner")?;
        let group = id(header.gid().map_err(number("group"))?, "group")?;
        let mtime = header.mtime().map_err(number("time"))?;
        let time = Timespec { tv_sec: i64::try_from(mtime).unwrap_or(i64::MAX), tv_nsec: 0 };
        let mut extended = Vec::new();
        if let Some(records) = entry.pax_extensions().map_err(number("PAX header"))? {
            for record in records {
                let record = record.map_err(number("PAX header"))?;
                let key = record.key().map_err(|error| format!("has a malformed PAX header: {error}"))?;
                if let Some(name) = key.strip_prefix(ATTRIBUTE) {
                    extended.push((name.to_owned(), record.value_bytes().to_owned()));
                } else if key.starts_with("GNU.sparse.") {
                    return Err(
                        "is stored sparsely in PAX form; make the archive with --format=gnu or without --sparse"
                            .to_owned(),
                    );
                }
            }
        }
        Ok(Self {
            mode: Mode::from_raw_mode(mode & 0o7777),
            owner: Uid::from_raw(owner),
            group: Gid::from_raw(group),
            times: Timestamps { last_access: time, last_modification: time },
            extended,
        })
    }

    /// Owner before mode, because a change of owner clears the set-user-id bit, and before
    /// attributes, because it clears capabilities; times last.
    fn apply(&self, file: &OwnedFd) -> rustix::io::Result<()> {
        rustix::fs::fchown(file, Some(self.owner), Some(self.group))?;
        rustix::fs::fchmod(file, self.mode)?;
        for (name, value) in &self.extended {
            rustix::fs::fsetxattr(file, name.as_str(), value, XattrFlags::empty())?;
        }
        rustix::fs::futimens(file, &self.times)
    }

    /// For what cannot be opened. Neither links nor FIFOs carry attributes in practice.
    fn apply_at(&self, parent: &OwnedFd, name: &OsStr) -> rustix::io::Result<()> {
        let parent = parent.as_fd();
        rustix::fs::chownat(parent, name, Some(self.owner), Some(self.group), AtFlags::SYMLINK_NOFOLLOW)?;
        rustix::fs::utimensat(parent, name, &self.times, AtFlags::SYMLINK_NOFOLLOW)
    }
}
