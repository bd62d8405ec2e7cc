//! Where forks are born.
//!
//! The hierarchy is a cgroup v2 mount of the test's own, which root can make on any kernel, whatever controllers it
//! has. Elsewhere the tests are skipped.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use forkd_vmm::fork::{self, Side};
use libtest_mimic::{Arguments, Failed, Trial};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Pid, WaitOptions, waitpid};

type Test = fn(&Hierarchy) -> Result<(), Failed>;

fn main() {
    // On one thread: a child of a process in which another may be anywhere could not even allocate.
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    let missing = Hierarchy::mounted().err();
    if let Some(reason) = &missing {
        let _ = writeln!(std::io::stderr(), "SKIPPED, every test of this file: cannot mount cgroup v2: {reason}");
    }
    let trials: [(&str, Test); 2] = [
        ("a_child_is_in_its_group_from_its_first_instruction_and_can_have_threads", born_inside),
        ("a_group_that_is_gone_is_an_error_of_the_parent", gone),
    ];
    let trials = trials.map(|(name, test)| {
        let run = move || test(&Hierarchy::mounted()?);
        Trial::test(name, run).with_ignored_flag(missing.is_some())
    });
    libtest_mimic::run(&arguments, trials.into()).exit();
}

/// A mounted hierarchy and a group in it.
struct Hierarchy {
    mounted: tempfile::TempDir,
    group: PathBuf,
}

impl Hierarchy {
    fn mounted() -> Result<Self, std::io::Error> {
        let mounted = tempfile::tempdir()?;
        mount("none", mounted.path(), "cgroup2", MountFlags::empty(), None)?;
        let name = mounted.path().file_name().map(PathBuf::from).unwrap_or_default();
        let group = mounted.path().join(name);
        fs::create_dir(&group)?;
        Ok(Self { mounted, group })
    }

    fn open(&self) -> Result<OwnedFd, std::io::Error> {
        Ok(File::open(&self.group)?.into())
    }
}

impl Drop for Hierarchy {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.group);
        let _ = unmount(self.mounted.path(), UnmountFlags::DETACH);
    }
}

/// The group of this process, by name.
fn own_group() -> Option<String> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    Some(Path::new(path).file_name()?.to_str()?.to_owned())
}

fn born_inside(hierarchy: &Hierarchy) -> Result<(), Failed> {
    let group = hierarchy.open()?;
    let name = hierarchy.group.file_name().and_then(|name| name.to_str()).map(str::to_owned);
    let before = own_group();
    let Side::Parent(pid) = fork::fork_into(Some(&group))? else {
        let inside = own_group() == name;
        // The C library must know the child's own thread id to make and join threads.
        let threads: Vec<_> = (0..4).map(|n| std::thread::spawn(move || n)).collect();
        let joined: u32 = threads.into_iter().map(|thread| thread.join().unwrap_or(100)).sum();
        // And a child of the child, without a group, is where its parent is.
        let Ok(Side::Parent(pid)) = fork::fork_into(None) else {
            fork::exit(i32::from(own_group() != name));
        };
        let inherited = waitpid(Pid::from_raw(pid), WaitOptions::empty()).ok().flatten();
        let inherited = inherited.and_then(|(_, status)| status.exit_status()) == Some(0);
        fork::exit(i32::from(!inside) + 2 * i32::from(joined != 6) + 4 * i32::from(!inherited));
    };
    let (_, status) = waitpid(Pid::from_raw(pid), WaitOptions::empty())?.ok_or("it has ended")?;
    assert_eq!(status.exit_status(), Some(0), "1: not inside, 2: threads, 4: its own child");
    assert_eq!(own_group(), before, "the parent stays where it was");
    Ok(())
}

fn gone(hierarchy: &Hierarchy) -> Result<(), Failed> {
    let group = hierarchy.open()?;
    fs::remove_dir(&hierarchy.group)?;
    match fork::fork_into(Some(&group)) {
        // Which of the two depends on the kernel.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => Ok(()),
        Err(error) => Err(error.into()),
        Ok(Side::Parent(_)) => Err("a child was born into nothing".into()),
        Ok(Side::Child) => fork::exit(9),
    }
}
