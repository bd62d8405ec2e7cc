//! The monitors on record that are no sandboxes, and the boot of the host in which all processes were started.

use rusqlite::{OptionalExtension, params};

use super::{Database, DatabaseError};
use crate::process::ProcessKey;

impl Database {
    /// Notes a monitor that is not a sandbox; does not wait.
    pub(crate) fn note_helper(&self, process: ProcessKey, name: String) {
        self.post("note a monitor", move |db| {
            db.execute("INSERT OR REPLACE INTO helper VALUES (?1, ?2, ?3)", params![process.pid, process.started, name])
        });
    }

    /// Forgets a monitor that is not a sandbox; does not wait.
    pub(crate) fn forget_helper(&self, process: ProcessKey) {
        self.post("forget a monitor", move |db| {
            db.execute("DELETE FROM helper WHERE pid = ?1 AND pid_started = ?2", params![process.pid, process.started])
        });
    }

    /// All monitors that are not sandboxes.
    pub(crate) async fn helpers(&self) -> Result<Vec<(ProcessKey, String)>, DatabaseError> {
        self.call("read the monitors", |db| {
            db.prepare("SELECT pid, pid_started, name FROM helper")?
                .query_map([], |row| Ok((ProcessKey { pid: row.get(0)?, started: row.get(1)? }, row.get(2)?)))?
                .collect()
        })
        .await
    }

    /// Records that this kernel's boot is `boot_id`; true when an earlier boot was on record, whose
    /// processes are all gone.
    pub(crate) async fn host_rebooted(&self, boot_id: String) -> Result<bool, DatabaseError> {
        self.call("read the host's boot id", move |db| {
            let before: Option<String> = db.query_row("SELECT id FROM boot", [], |row| row.get(0)).optional()?;
            db.execute("DELETE FROM boot", [])?;
            db.execute("INSERT INTO boot VALUES (?1)", [&boot_id])?;
            Ok(before.is_some_and(|before| before != boot_id))
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn helpers_and_reboots_are_remembered() {
        let dir = tempfile::tempdir().expect("tempdir");
        let db = Database::open(&dir.path().join("forkd.db")).expect("open");
        let process = ProcessKey { pid: 7, started: 1 };
        db.note_helper(process, "zygote-py".to_owned());
        assert_eq!(db.helpers().await.expect("read"), [(process, "zygote-py".to_owned())]);
        db.forget_helper(process);
        assert!(db.helpers().await.expect("read").is_empty());
        assert!(!db.host_rebooted("a".to_owned()).await.expect("first start"));
        assert!(!db.host_rebooted("a".to_owned()).await.expect("same boot"));
        assert!(db.host_rebooted("b".to_owned()).await.expect("another boot"));
    }
}
