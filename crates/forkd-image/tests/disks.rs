//! Root disks from directories, archives and a Debian suite, looked at with the file system's own tools.

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use forkd_image::{BuildOptions, BuiltDisk, ImageError, RootDiskSource, build};
use forkd_types::ByteSize;
use tar::{EntryType, Header};

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("tempdir"))
    }

    fn options(&self) -> BuildOptions {
        BuildOptions::new(self.0.path().join("cache"), self.0.path().join("scratch"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn build(&self, source: RootDiskSource) -> Result<BuiltDisk, ImageError> {
        build(&source, &self.options(), &mut |_| {})
    }

    /// Nothing half-built is left in scratch or cache.
    fn assert_clean(&self) {
        for parent in ["scratch", "cache/disks"] {
            let Ok(entries) = self.path(parent).read_dir() else { continue };
            let names: Vec<_> = entries.map(|entry| entry.expect("entry").file_name()).collect();
            let left = |name: &&std::ffi::OsString| **name != *".sweep" && !name.to_string_lossy().ends_with(".ext4");
            assert_eq!(names.iter().filter(left).count(), 0, "{parent}: {names:?}");
        }
    }
}

fn can_build() -> bool {
    let able = rustix::process::geteuid().is_root() && support::has("sh");
    if !able {
        support::skip("not root");
    }
    able
}

/// A member of a test archive.
struct Member<'a>(EntryType, &'a str, &'a str, &'a [u8]);

fn archive(path: &Path, members: &[Member<'_>]) {
    let mut builder = tar::Builder::new(File::create(path).expect("create"));
    for Member(kind, name, target, content) in members {
        let mut header = Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(if kind.is_dir() { 0o755 } else { 0o644 });
        header.set_uid(1234);
        header.set_gid(5678);
        header.set_mtime(1_700_000_000);
        header.set_size(content.len() as u64);
        // Written raw: the names that matter here are those a builder would refuse.
        header.as_gnu_mut().expect("gnu").name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_gnu_mut().expect("gnu").linkname[..target.len()].copy_from_slice(target.as_bytes());
        header.set_cksum();
        builder.append(&header, *content).expect("append");
    }
    // The capability of a program such as ping, as the kernel stores it: version 2, CAP_NET_RAW.
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    builder.append_pax_extensions([("SCHILY.xattr.security.capability", &capability[..])]).expect("append");
    let mut header = Header::new_ustar();
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_mode(0o4755);
    header.set_size(4);
    header.set_path(CAPABLE).expect("short");
    header.set_cksum();
    builder.append(&header, &b"ping"[..]).expect("append");
    builder.finish().expect("finish");
}

/// Every test archive ends with this program, which has a capability and is set-user-id.
const CAPABLE: &str = "ping";

fn check_capable(disk: &BuiltDisk) {
    let stat = debugfs(disk, &format!("stat /{CAPABLE}"));
    assert!(stat.contains("Mode:  04755") && stat.contains("security.capability (20)"), "{stat}");
    assert!(stat.contains("01 00 00 02 00 20 00 00"), "{stat}");
}

const DIR: EntryType = EntryType::Directory;
const FILE: EntryType = EntryType::Regular;
const LINK: EntryType = EntryType::Symlink;
const HARD: EntryType = EntryType::Link;

fn debugfs(disk: &BuiltDisk, command: &str) -> String {
    support::run("debugfs", &["-R", command, &disk.path.display().to_string()])
}

fn check(disk: &BuiltDisk) {
    support::run("e2fsck", &["-fn", &disk.path.display().to_string()]);
    let metadata = disk.path.metadata().expect("stat");
    assert_eq!(metadata.len(), disk.logical_bytes);
    assert!(
        metadata.blocks() * 512 < disk.logical_bytes / 2,
        "not sparse: {} of {}",
        metadata.blocks() * 512,
        metadata.len()
    );
}

#[test]
fn an_archive_becomes_a_disk_with_its_owners_modes_links_and_times() {
    if !can_build() {
        return;
    }
    let place = Place::new();
    let tar = place.path("root.tar");
    archive(
        &tar,
        &[
            Member(DIR, "./", "", b""),
            Member(DIR, "usr/", "", b""),
            Member(DIR, "usr/lib/", "", b""),
            Member(LINK, "lib", "usr/lib", b""),
            Member(FILE, "lib/through-link", "", b"first"),
            Member(FILE, "lib/through-link", "", b"last wins"),
            Member(LINK, "etc/absolute", "/usr/lib/through-link", b""),
            Member(HARD, "usr/same", "usr/lib/through-link", b""),
            Member(FILE, "deep/without/parents", "", b"x"),
            Member(EntryType::Fifo, "pipe", "", b""),
        ],
    );
    for compressed in ["root.tar", "root.tar.gz", "root.tar.zst", "root.tar.xz"] {
        let bytes = fs::read(&tar).expect("read");
        let path = place.path(compressed);
        match compressed {
            "root.tar.gz" => {
                let file = File::create(&path).expect("create");
                let mut encoder = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
                encoder.write_all(&bytes).and_then(|()| encoder.finish()).expect("gzip");
            }
            "root.tar.zst" => fs::write(&path, zstd::encode_all(bytes.as_slice(), 1).expect("zstd")).expect("write"),
            "root.tar.xz" if support::has("xz") => drop(support::run("xz", &["-k", &tar.display().to_string()])),
            "root.tar.xz" => continue,
            _ => {}
        }
        let disk = place.build(RootDiskSource::Archive(path)).expect(compressed);
        check(&disk);
        assert!(debugfs(&disk, "cat /usr/lib/through-link").starts_with("last wins"));
        let stat = debugfs(&disk, "stat /usr/same");
        assert!(
            stat.contains("User:  1234") && stat.contains("Group:  5678") && stat.contains("Mode:  0644"),
            "{stat}"
        );
        assert!(stat.contains("Links: 2") && stat.contains("mtime: 0x6553f100"), "{stat}");
        assert!(debugfs(&disk, "stat /etc/absolute").contains("Fast link dest: \"/usr/lib/through-link\""));
        check_capable(&disk);
        assert!(debugfs(&disk, "stat /pipe").contains("Type: FIFO"));
        assert!(debugfs(&disk, "stat /usr").contains("mtime: 0x6553f100"));
        place.assert_clean();
    }
}

#[test]
fn archives_that_could_harm_are_refused_by_member_and_touch_nothing() {
    if !can_build() {
        return;
    }
    let place = Place::new();
    let outside = place.path("outside");
    fs::create_dir(&outside).expect("mkdir");
    let up = format!("../{}", "../".repeat(20));
    let escape = format!("{up}tmp/forkd-escaped");
    let outside_text = outside.display().to_string();
    let cases: [(&str, Vec<Member<'_>>, &str); 9] = [
        ("dot-dot", vec![Member(FILE, "a/../../evil", "", b"x")], "\"..\""),
        ("absolute", vec![Member(FILE, "/etc/evil", "", b"x")], "absolute"),
        ("character device", vec![Member(EntryType::Char, "dev/null", "", b"")], "device node"),
        ("block device", vec![Member(EntryType::Block, "sda", "", b"")], "device node"),
        ("absolute hard link", vec![Member(HARD, "passwd", "/etc/passwd", b"")], "absolute"),
        ("climbing hard link", vec![Member(HARD, "passwd", "../../etc/passwd", b"")], "\"..\""),
        ("hard link to nothing", vec![Member(HARD, "a", "b", b"")], "not before it"),
        ("unknown kind", vec![Member(EntryType::new(b'Z'), "a", "", b"")], "not understood"),
        ("file over tree", vec![Member(FILE, "a/b", "", b"x"), Member(FILE, "a", "", b"y")], "not empty"),
    ];
    for (name, members, word) in cases {
        let tar = place.path("evil.tar");
        archive(&tar, &members);
        let error = place.build(RootDiskSource::Archive(tar)).expect_err(name);
        let member = members.last().expect("one").1;
        assert!(matches!(&error, ImageError::Member { member: named, .. } if named == member), "{name}: {error}");
        assert!(error.to_string().contains(word), "{name}: {error}");
        place.assert_clean();
    }
    // A link that leads out of the tree on the host, then members through it.
    for target in [outside_text.as_str(), escape.as_str()] {
        let tar = place.path("links.tar");
        archive(
            &tar,
            &[
                Member(LINK, "way", target, b""),
                Member(DIR, "way/made", "", b""),
                Member(FILE, "way/evil", "", b"x"),
                Member(HARD, "way/hard", "way/evil", b""),
            ],
        );
        let _ = place.build(RootDiskSource::Archive(tar));
        assert_eq!(outside.read_dir().expect("list").count(), 0, "wrote through a link to {target}");
        assert!(!Path::new("/tmp/forkd-escaped").exists());
        place.assert_clean();
    }
}

#[test]
fn what_is_no_archive_says_so() {
    if !can_build() {
        return;
    }
    let place = Place::new();
    let whole = place.path("whole.tar");
    archive(&whole, &[Member(FILE, "a", "", &[7; 100_000])]);
    let bytes = fs::read(&whole).expect("read");
    let zstd = zstd::encode_all(bytes.as_slice(), 1).expect("zstd");
    for (name, content) in [
        ("empty", &b""[..]),
        ("text", &[b'x'; 2048][..]),
        ("cut", &bytes[..50_000]),
        ("cut-zst", &zstd[..zstd.len() / 2]),
        ("bzip2", &b"BZh91AY&SY"[..]),
    ] {
        let path = place.path(name);
        fs::write(&path, content).expect("write");
        let error = place.build(RootDiskSource::Archive(path)).expect_err(name);
        assert!(matches!(error, ImageError::Archive { .. }), "{name}: {error}");
        place.assert_clean();
    }
    let missing = place.build(RootDiskSource::Archive(place.path("none.tar"))).expect_err("missing");
    assert!(missing.to_string().contains("none.tar"), "{missing}");
}

#[test]
fn a_directory_becomes_a_disk_is_cached_and_built_again_when_it_changes() {
    if !can_build() {
        return;
    }
    let place = Place::new();
    let root = place.path("root");
    fs::create_dir_all(root.join("bin")).expect("mkdir");
    fs::write(root.join("bin/tool"), vec![1; 300_000]).expect("write");
    fs::set_permissions(root.join("bin/tool"), PermissionsExt::from_mode(0o4755)).expect("chmod");
    symlink("tool", root.join("bin/alias")).expect("symlink");
    let source = RootDiskSource::Directory(root.clone());

    let first = place.build(source.clone()).expect("first");
    check(&first);
    assert!(!first.cached);
    assert!(debugfs(&first, "stat /bin/tool").contains("Mode:  04755"));
    assert!(place.build(source.clone()).expect("second").cached);

    // The same input gives the same image, bit for bit.
    let one = fs::read(&first.path).expect("read");
    fs::remove_file(&first.path).expect("remove");
    let again = place.build(source.clone()).expect("again");
    assert!(fs::read(&again.path).expect("read") == one, "not reproducible");

    fs::write(root.join("bin/new"), "x").expect("write");
    let changed = place.build(source).expect("changed");
    assert!(!changed.cached && changed.recipe_digest != first.recipe_digest);
    place.assert_clean();
}

#[test]
fn sizes_are_honoured_and_impossible_ones_refused() {
    if !can_build() {
        return;
    }
    let place = Place::new();
    let root = place.path("root");
    fs::create_dir(&root).expect("mkdir");
    fs::write(root.join("big"), vec![5; 40 << 20]).expect("write");
    let source = RootDiskSource::Directory(root);
    let sized = |size| build(&source, &BuildOptions { size: Some(ByteSize(size)), ..place.options() }, &mut |_| {});
    let disk = sized(200 << 20).expect("200 MiB");
    check(&disk);
    assert_eq!(disk.logical_bytes, 200 << 20);
    assert!(matches!(sized(48 << 20), Err(ImageError::TooSmall { .. })));
    assert!(matches!(sized((200 << 20) + 1), Err(ImageError::Size { .. })));
    place.assert_clean();
}

#[test]
fn a_full_disk_is_named_with_what_was_needed_and_nothing_is_left() {
    if !can_build() {
        return;
    }
    let place = Place::new();
    let small = place.path("small");
    fs::create_dir(&small).expect("mkdir");
    let Some(_mount) = Mount::tmpfs(&small, "size=8m") else { return };
    let tar = place.path("big.tar");
    archive(&tar, &[Member(FILE, "a", "", &vec![1; 6 << 20]), Member(FILE, "b", "", &vec![2; 20 << 20])]);
    let options = BuildOptions::new(place.path("cache"), small.join("scratch"));
    let error = build(&RootDiskSource::Archive(tar), &options, &mut |_| {}).expect_err("too small");
    let ImageError::NoSpace { needed: Some(needed), .. } = &error else { panic!("{error}") };
    assert!((26 << 20..27 << 20).contains(&needed.bytes()), "{error}");
    assert!(error.to_string().contains("small/scratch"), "{error}");
    assert_eq!(small.join("scratch").read_dir().expect("list").count(), 1, "only the sweep lock stays");

    let options = BuildOptions::new(small.join("cache"), place.path("scratch"));
    let root = place.path("root");
    fs::create_dir(&root).expect("mkdir");
    fs::write(root.join("big"), vec![5; 20 << 20]).expect("write");
    let error = build(&RootDiskSource::Directory(root), &options, &mut |_| {}).expect_err("too small");
    assert!(matches!(error, ImageError::NoSpace { .. }), "{error}");
    place.assert_clean();
}

#[test]
fn directories_with_device_nodes_or_mounts_are_refused() {
    if !can_build() {
        return;
    }
    let place = Place::new();
    let root = place.path("root");
    fs::create_dir_all(root.join("dev")).expect("mkdir");
    support::run("mknod", &[&root.join("dev/null").display().to_string(), "c", "1", "3"]);
    let error = place.build(RootDiskSource::Directory(root.clone())).expect_err("device").to_string();
    assert!(error.contains("dev/null") && error.contains("device node"), "{error}");
    fs::remove_file(root.join("dev/null")).expect("remove");
    if let Some(_mount) = Mount::tmpfs(&root.join("dev"), "size=1m") {
        let error = place.build(RootDiskSource::Directory(root)).expect_err("mount").to_string();
        assert!(error.contains("another file system"), "{error}");
    }
    place.assert_clean();
}

#[test]
fn debian_with_numpy_is_a_sound_disk_and_the_second_time_is_instant() {
    if !can_build() || !support::has("mmdebstrap") {
        support::skip("needs root and mmdebstrap");
        return;
    }
    let place = Place::new();
    let options = BuildOptions::new(support::cache(), place.path("scratch"));
    let source: RootDiskSource = "debian:bookworm?include=python3-numpy".parse().expect("source");
    let disk = match build(&source, &options, &mut support::show) {
        Err(error @ ImageError::NoNetwork { .. }) => return support::skip(&error.to_string()),
        built => built.expect("built"),
    };
    check(&disk);
    for file in ["/usr/bin/python3.11", "/usr/lib/python3/dist-packages/numpy/__init__.py", "/etc/machine-id"] {
        assert!(debugfs(&disk, &format!("stat {file}")).contains("Type: regular"), "{file}");
    }
    assert_eq!(debugfs(&disk, "ls -p /dev").matches('/').count() / 7, 2, "only . and .. in /dev");
    assert!(debugfs(&disk, "cat /etc/hostname").contains("forkd"));
    let started = std::time::Instant::now();
    assert!(build(&source, &options, &mut support::show).expect("again").cached);
    assert!(started.elapsed().as_secs() < 2, "{:?}", started.elapsed());
}

#[test]
fn a_missing_package_or_suite_is_named() {
    if !can_build() || !support::has("mmdebstrap") {
        support::skip("needs root and mmdebstrap");
        return;
    }
    let place = Place::new();
    for (source, word) in [
        ("debian:bookworm?include=no-such-package-anywhere", "no package no-such-package-anywhere in bookworm"),
        ("debian:nosuchsuite", "nosuchsuite"),
    ] {
        match place.build(source.parse().expect("source")).expect_err(source) {
            error @ ImageError::NoNetwork { .. } => return support::skip(&error.to_string()),
            error => assert!(error.to_string().contains(word), "{error}"),
        }
        place.assert_clean();
    }
}

#[test]
#[ignore = "run by the test below, as an ordinary user"]
fn apart_as_an_ordinary_user() {
    assert!(!rustix::process::geteuid().is_root());
    let place = Place::new();
    let tar = place.path("root.tar");
    archive(
        &tar,
        &[
            Member(DIR, "etc/", "", b""),
            Member(FILE, "etc/a \"name\"", "", b"quoted"),
            Member(HARD, "etc/same", "etc/a \"name\"", b""),
            Member(LINK, "etc/link", "/nowhere", b""),
        ],
    );
    let disk = place.build(RootDiskSource::Archive(tar)).expect("archive");
    check(&disk);
    check_capable(&disk);
    for path in ["/etc", "/etc/same", "/etc/link"] {
        let stat = debugfs(&disk, &format!("stat {path}"));
        assert!(stat.contains("User:  1234") && stat.contains("Group:  5678"), "{path}: {stat}");
    }
    assert!(debugfs(&disk, "stat /etc/same").contains("Mode:  0644"));
    assert!(debugfs(&disk, "stat /etc").contains("Mode:  0755"));

    let root = place.path("root");
    fs::create_dir(&root).expect("mkdir");
    fs::write(root.join("mine"), "x").expect("write");
    let disk = place.build(RootDiskSource::Directory(root)).expect("directory");
    check(&disk);
    let stat = debugfs(&disk, "stat /mine");
    assert!(stat.contains("User:     0") && stat.contains("Group:     0"), "{stat}");
    place.assert_clean();
}

#[test]
#[ignore = "needs an ordinary user with subordinate ids (package uidmap); run it as one"]
fn debian_as_an_ordinary_user() {
    assert!(!rustix::process::geteuid().is_root());
    let place = Place::new();
    let source: RootDiskSource = "debian:bookworm".parse().expect("source");
    let disk = build(&source, &place.options(), &mut support::show).expect("built");
    check(&disk);
    assert!(debugfs(&disk, "stat /etc/shadow").contains("Group:    42"), "of group shadow");
    assert!(debugfs(&disk, "stat /usr/bin/passwd").contains("Mode:  04755"));
    assert!(debugfs(&disk, "stat /etc").contains("User:     0"));
    place.assert_clean();
}

#[test]
fn an_ordinary_user_gets_the_same_owners_in_the_image() {
    if !rustix::process::geteuid().is_root() || !support::has("setpriv") {
        return support::skip("needs root, to become somebody else, and setpriv");
    }
    // The way to this program may be closed to others.
    let open = Place::new();
    fs::set_permissions(open.0.path(), PermissionsExt::from_mode(0o755)).expect("chmod");
    let copy = open.path("disks");
    fs::copy(std::env::current_exe().expect("own path"), &copy).expect("copy");
    let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"];
    support::run_apart(&copy, "apart_as_an_ordinary_user", &nobody, None);
}

/// A mount that ends with the test.
struct Mount(PathBuf);

impl Mount {
    fn tmpfs(at: &Path, options: &str) -> Option<Self> {
        let options = std::ffi::CString::new(options).expect("no zero byte");
        match rustix::mount::mount("tmpfs", at, "tmpfs", rustix::mount::MountFlags::empty(), options.as_c_str()) {
            Ok(()) => Some(Self(at.to_owned())),
            Err(error) => {
                support::skip(&format!("cannot mount a tmpfs: {error}"));
                None
            }
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH).expect("unmount");
    }
}
