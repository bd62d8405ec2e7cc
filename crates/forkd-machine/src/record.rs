//! `machine.json`: what is remembered about a machine between uses.

use std::io::{Read, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::MachineError;
use crate::options::Resolved;
use crate::process::ProcessId;

/// The version that is written.
const CURRENT: u32 = 1;

/// A description is a page of text; anything near this size is something else.
const MAX_BYTES: u64 = 64 << 10;

/// A machine, running or not. The tokens make the file secret: it is written with mode 0600.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) version: u32,
    /// What a client of the machine's agent must say first.
    pub(crate) agent_token: String,
    /// What a client of the daemon in the machine must send.
    pub(crate) api_token: String,
    /// The QEMU that runs it, if it was started and not stopped.
    #[serde(default)]
    pub(crate) running: Option<RunningRecord>,
}

/// A machine that was started. Whether it still runs is for the process table to say.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct RunningRecord {
    pub(crate) qemu: ProcessId,
    pub(crate) agent_port: u16,
    pub(crate) api_port: u16,
    pub(crate) started_unix: u64,
    /// Absent while it boots.
    #[serde(default)]
    pub(crate) boot_ms: Option<u64>,
    pub(crate) options: Resolved,
}

impl Record {
    /// A new machine with fresh tokens.
    pub(crate) fn new() -> Self {
        Self { version: CURRENT, agent_token: random_token(), api_token: random_token(), running: None }
    }

    /// Reads a description; `None` when there is none.
    pub(crate) fn load(path: &Path) -> Result<Option<Self>, MachineError> {
        let damaged = |reason: String| MachineError::Record { path: path.to_owned(), reason };
        let file = match std::fs::File::open(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(MachineError::file("open", path))?,
        };
        let mut text = String::new();
        file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(MachineError::file("read", path))?;
        if text.len() as u64 > MAX_BYTES {
            return Err(damaged(format!("it is longer than {MAX_BYTES} bytes")));
        }
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let Version { version } = serde_json::from_str(&text).map_err(|error| damaged(error.to_string()))?;
        if version != CURRENT {
            return Err(damaged(format!("its version is {version}, and this forkd knows version {CURRENT}")));
        }
        serde_json::from_str(&text).map(Some).map_err(|error| damaged(error.to_string()))
    }

    /// Replaces the description in one step.
    pub(crate) fn save(&self, path: &Path) -> Result<(), MachineError> {
        let directory = path.parent().expect("a description lies in the machine's directory");
        let text = serde_json::to_vec_pretty(self).expect("plain data");
        let write = || {
            // tempfile creates files with mode 0600.
            let mut file = tempfile::NamedTempFile::new_in(directory)?;
            file.write_all(&text)?;
            file.as_file().sync_all()?;
            file.persist(path).map_err(|error| error.error)
        };
        write().map(drop).map_err(MachineError::file("write", path))
    }
}

fn random_token() -> String {
    let mut bytes = [0u8; 32];
    // The kernel gives up to 256 bytes whole and uninterrupted once its pool is ready.
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .expect("every Linux since 3.17 has getrandom");
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_of_version_1_is_still_understood() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/machine-1.json");
        let record = Record::load(&path).expect("understood").expect("there");
        let running = record.running.expect("was running");
        assert_eq!((running.qemu.pid, running.agent_port, running.api_port), (4242, 41024, 48889));
        assert!(!running.options.hardware && running.options.controller);
        assert_eq!(running.options.shares[0].guest, "/mnt/out");
    }

    #[test]
    fn saved_descriptions_are_private_and_load_again() {
        use std::os::unix::fs::MetadataExt;
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("machine.json");
        assert_eq!(Record::load(&path).expect("absent is fine"), None);
        let record = Record::new();
        record.save(&path).expect("saved");
        assert_eq!(Record::load(&path).expect("loads"), Some(record.clone()));
        assert_eq!(std::fs::metadata(&path).expect("exists").mode() & 0o777, 0o600);
        assert_eq!(record.agent_token.len(), 64);
        assert_ne!(record.agent_token, record.api_token);
    }

    #[test]
    fn other_versions_and_damage_are_named() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("machine.json");
        for (text, says) in [
            (r#"{"version":7,"later":true}"#.to_owned(), "version is 7"),
            ("{".to_owned(), "EOF"),
            (" ".repeat(70 << 10), "longer than"),
        ] {
            std::fs::write(&path, text).expect("written");
            let error = Record::load(&path).expect_err("refused").to_string();
            assert!(error.contains(says) && error.contains("forkd machine rm"), "{error}");
        }
    }
}
