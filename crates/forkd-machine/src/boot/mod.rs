//! What the machine does when it boots: the script on its root disk, and the configuration
//! directory that it is given at every start.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use crate::error::MachineError;
use crate::options::{PROGRAMS, Resolved};
use crate::record::Record;

/// Lies on the root disk at [`BOOTSTRAP_PATH`].
pub(crate) const BOOTSTRAP: &str = include_str!("bootstrap.sh");

/// The agent runs what is in this directory before it listens.
pub(crate) const BOOTSTRAP_PATH: &str = "/etc/forkd/boot.d/10-forkd-machine";

/// Where the boot script leaves its verdict.
pub(crate) const OUTCOME_PATH: &str = "/run/forkd/boot-outcome";

/// The verdict when all is well.
pub(crate) const OUTCOME_READY: &str = "ready";

/// The 9p tag of the configuration directory.
pub(crate) const CONFIG_TAG: &str = "forkd-config";

const BOOT: &str = include_str!("boot.sh");

/// A directory of the host as QEMU exports it.
pub(crate) struct Export<'a> {
    pub(crate) tag: String,
    pub(crate) host: &'a Path,
    pub(crate) guest: &'a str,
    pub(crate) writable: bool,
}

/// Every directory that the machine mounts besides its configuration.
pub(crate) fn exports(options: &Resolved) -> Vec<Export<'_>> {
    let programs = Export { tag: "forkd-programs".into(), host: &options.programs, guest: PROGRAMS, writable: false };
    let asked = options.shares.iter().enumerate().map(|(number, share)| Export {
        tag: format!("forkd-share-{number}"),
        host: &share.host,
        guest: &share.guest,
        writable: share.writable,
    });
    std::iter::once(programs).chain(asked).collect()
}

/// Writes the configuration directory anew.
pub(crate) fn write_config(
    directory: &Path,
    options: &Resolved,
    record: &Record,
    exports: &[Export<'_>],
) -> Result<(), MachineError> {
    if directory.exists() {
        fs::remove_dir_all(directory).map_err(MachineError::file("replace", directory))?;
    }
    fs::DirBuilder::new().mode(0o700).create(directory).map_err(MachineError::file("create", directory))?;
    let shares: String = exports
        .iter()
        .map(|export| format!("{} {} {}\n", export.tag, export.guest, if export.writable { "rw" } else { "ro" }))
        .collect();
    let keep_alive: String = options.keep_alive.iter().map(|word| format!("{word}\n")).collect();
    let mut files = vec![
        ("boot.sh", BOOT),
        ("agent-token", &record.agent_token),
        ("api-token", &record.api_token),
        ("shares", &shares),
        ("keep-alive", &keep_alive),
    ];
    if options.controller {
        files.push(("controller", ""));
    }
    for (name, contents) in files {
        write_private(&directory.join(name), contents)?;
    }
    Ok(())
}

fn write_private(path: &Path, contents: &str) -> Result<(), MachineError> {
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    options
        .open(path)
        .and_then(|mut file| std::io::Write::write_all(&mut file, contents.as_bytes()))
        .map_err(MachineError::file("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn the_scripts_are_ones_that_a_plain_shell_accepts() {
        for script in [BOOTSTRAP, BOOT] {
            assert!(Command::new("sh").args(["-n", "-c", script]).status().expect("sh exists").success());
        }
        assert!(BOOT.contains(OUTCOME_PATH) && BOOTSTRAP.contains(CONFIG_TAG) && BOOT.contains(PROGRAMS));
        assert!(crate::keep_alive::HELD.starts_with("keep-alive: holding") && BOOT.contains("^keep-alive: holding"));
    }
}
