//! `cleanup`: what runs of this program left behind that were cut off.
//!
//! Builds and downloads under way live in the cache's scratch directories, and go with their run unless that is
//! killed. What some process has open, or works in, is under way and stays. A daemon sweeps its own directories when
//! it starts.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use clap::Args;

use super::Context;
use crate::failure::advised;
use crate::output;

/// Names in the temporary directory that belong to runs of the program's older versions.
const OLDER: [&str; 6] = ["forkd-fork-", "forkd-parent-", "forkd-run-", "forkd-unpack-", "forkd-pull-", "forkd-push-"];

/// What was touched within this time may be of a run that has its files closed just now.
const YOUNG: Duration = Duration::from_secs(60);

/// Arguments of `forkd cleanup`.
#[derive(Args, Debug)]
pub(crate) struct CleanupArgs {
    /// Remove what is listed; without it, nothing is
    #[arg(short, long)]
    yes: bool,
}

impl CleanupArgs {
    pub(crate) fn run(self, context: &Context) -> anyhow::Result<u8> {
        let in_use = paths_in_use();
        let mut found = Vec::new();
        for directory in [context.data.scratch(), context.data.packs()] {
            found.extend(leftovers(&directory, &in_use, |_| true));
        }
        found.extend(leftovers(&std::env::temp_dir(), &in_use, is_older));
        if found.is_empty() {
            output::line("nothing to clean up")?;
            return Ok(0);
        }
        let mut failed = 0;
        for path in &found {
            output::line(format_args!("DEL {} {}", path.display(), size(path).div_ceil(1024)))?;
            if self.yes
                && let Err(error) = remove(path)
            {
                failed += 1;
                context.progress.warn(format_args!("could not remove {}: {error}", path.display()));
            }
        }
        if !self.yes {
            context.progress.say("nothing was removed; to remove it: forkd cleanup --yes");
        }
        if failed > 0 {
            return Err(advised(anyhow::anyhow!("{failed} could not be removed"), "sudo forkd cleanup --yes"));
        }
        Ok(0)
    }
}

/// What of `directory` has no run any more.
fn leftovers(directory: &Path, in_use: &HashSet<PathBuf>, ours: impl Fn(&OsStr) -> bool) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| ours(&entry.file_name()))
        .map(|entry| entry.path())
        .filter(|path| !is_used(path, in_use) && !is_young(path))
        .collect();
    found.sort();
    found
}

fn is_older(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    OLDER.iter().any(|prefix| name.starts_with(prefix))
}

fn is_used(path: &Path, in_use: &HashSet<PathBuf>) -> bool {
    let real = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    in_use.iter().any(|used| used.starts_with(&real))
}

fn is_young(path: &Path) -> bool {
    let modified = fs::symlink_metadata(path).and_then(|metadata| metadata.modified());
    modified.is_ok_and(|at| SystemTime::now().duration_since(at).unwrap_or_default() < YOUNG)
}

/// Every file that a process has open or works in, as far as this user may see.
fn paths_in_use() -> HashSet<PathBuf> {
    let mut paths = HashSet::new();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    for process in processes.filter(|entry| entry.file_name().to_string_lossy().bytes().all(|b| b.is_ascii_digit())) {
        let own = process.path();
        paths.extend(["cwd", "root", "exe"].iter().filter_map(|link| fs::read_link(own.join(link)).ok()));
        let open = fs::read_dir(own.join("fd")).into_iter().flatten().flatten();
        paths.extend(open.filter_map(|fd| fs::read_link(fd.path()).ok()));
    }
    paths
}

/// Bytes that a file or a tree takes on its disk.
fn size(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(metadata) = fs::symlink_metadata(path) else { return 0 };
    let below = match metadata.is_dir() {
        true => fs::read_dir(path).into_iter().flatten().flatten().map(|entry| size(&entry.path())).sum(),
        false => 0,
    };
    metadata.blocks() * 512 + below
}

fn remove(path: &Path) -> anyhow::Result<()> {
    let metadata = fs::symlink_metadata(path).context("it went away")?;
    let removed = if metadata.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    Ok(removed?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn age(path: &Path) {
        let past = SystemTime::now() - 2 * YOUNG;
        fs::File::open(path).and_then(|file| file.set_modified(past)).expect("set the time");
    }

    #[test]
    fn only_what_nobody_uses_and_is_not_young_is_left_over() {
        let directory = tempfile::tempdir().expect("scratch directory");
        let at = |name: &str| directory.path().join(name);
        for name in ["dead", "open", "young"] {
            fs::create_dir(at(name)).expect("mkdir");
            fs::write(at(name).join("file"), "x").expect("write");
        }
        let _held = fs::File::open(at("open/file")).expect("open");
        age(&at("dead"));
        age(&at("open"));
        assert_eq!(leftovers(directory.path(), &paths_in_use(), |_| true), [at("dead")]);
        assert!(size(&at("dead")) > 0);
        remove(&at("dead")).expect("removed");
        assert!(leftovers(directory.path(), &paths_in_use(), |_| true).is_empty());
    }

    #[test]
    fn names_of_older_versions_are_known() {
        assert!(is_older(OsStr::new("forkd-pull-123")));
        assert!(!is_older(OsStr::new("forkd-daemon-x")) && !is_older(OsStr::new("else")));
    }
}
