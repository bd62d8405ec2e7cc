//! The image's own programs that run after a fork.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::reaper::Reaper;
use crate::spawn::{self, Program, Streams};

/// Executable files in `directory`, in name order; none when there is no such directory.
pub fn executables(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| fs::metadata(path).is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0))
        .collect();
    files.sort();
    files
}

/// Runs `path` with its output on the agent's own; says what went wrong. What it leaves running in
/// the background goes on.
pub fn run(
    reaper: &Arc<Reaper>,
    path: &Path,
    environment: BTreeMap<String, String>,
    limit: Option<Duration>,
) -> Result<(), String> {
    let program = Program {
        path: path.to_owned(),
        args: vec![path.to_string_lossy().into_owned()],
        environment,
        directory: "/".into(),
        credentials: None,
        streams: Streams::Inherited,
        keeps: Vec::new(),
    };
    let (watch, _) =
        spawn::start(reaper, program).map_err(|error| format!("cannot run {}: {error}", path.display()))?;
    match watch.wait(limit.map(|limit| Instant::now() + limit)) {
        Some(code) if code.0 == 0 => Ok(()),
        Some(code) => Err(format!("{} failed: {code}", path.display())),
        None => {
            watch.signal_group(Signal::KILL);
            Err(format!("{} ran longer than {} s and was killed", path.display(), limit.unwrap_or_default().as_secs()))
        }
    }
}
