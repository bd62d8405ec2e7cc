//! The checkpoints on record.

use forkd_types::{Digest, SandboxId, Tag};
use rusqlite::{Row, params};

use super::{Base, Database, DatabaseError};
use crate::process::ProcessKey;

/// Where a recorded checkpoint is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// In a frozen copy: its process, and the name of its control socket.
    Memory(ProcessKey, String),
    /// In a snapshot.
    Disk(Base),
}

/// One recorded checkpoint.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct CheckpointRecord {
    pub(crate) sandbox: SandboxId,
    pub(crate) name: String,
    pub(crate) created_at_unix: u64,
    pub(crate) pause_us: u64,
    /// Disks of the machine.
    pub(crate) disks: usize,
    /// Whether it was made without being asked for by name.
    pub(crate) automatic: bool,
    /// The snapshot that its memory and disks are changes of; none when an earlier release made the sandbox.
    pub(crate) base: Option<Base>,
    pub(crate) place: Place,
}

impl Database {
    /// Records a checkpoint, or where it is now; does not wait. A frozen copy ceases to be a helper, which the
    /// next start would end.
    pub(crate) fn note_checkpoint(&self, record: CheckpointRecord) {
        self.post("note a checkpoint", move |db| {
            let (base_tag, base_digest) = Base::columns(record.base.as_ref());
            let (process, disk) = match &record.place {
                Place::Memory(key, name) => (Some((key, name)), None),
                Place::Disk(snapshot) => (None, Some(snapshot)),
            };
            let (disk_tag, disk_digest) = Base::columns(disk);
            if let Some((key, _)) = process {
                db.execute("DELETE FROM helper WHERE pid = ?1 AND pid_started = ?2", params![key.pid, key.started])?;
            }
            db.execute(
                "INSERT INTO checkpoint (sandbox, name, created_at_unix, pause_us, disks, automatic, base_tag,
                                         base_digest, pid, pid_started, process_name, disk_tag, disk_digest)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)
                 ON CONFLICT (sandbox, name) DO UPDATE SET pid = ?9, pid_started = ?10, process_name = ?11,
                                                           disk_tag = ?12, disk_digest = ?13",
                params![
                    record.sandbox.as_str(),
                    record.name,
                    record.created_at_unix,
                    record.pause_us,
                    record.disks,
                    record.automatic,
                    base_tag,
                    base_digest,
                    process.map(|(key, _)| key.pid),
                    process.map(|(key, _)| key.started),
                    process.map(|(_, name)| name),
                    disk_tag,
                    disk_digest,
                ],
            )
        });
    }

    /// Forgets a checkpoint; does not wait.
    pub(crate) fn forget_checkpoint(&self, sandbox: SandboxId, name: String) {
        self.post("forget a checkpoint", move |db| {
            db.execute("DELETE FROM checkpoint WHERE sandbox = ?1 AND name = ?2", params![sandbox.as_str(), name])
        });
    }

    /// All recorded checkpoints in the order in which they were made.
    pub(crate) async fn checkpoints(&self) -> Result<Vec<CheckpointRecord>, DatabaseError> {
        let rows: Vec<Option<CheckpointRecord>> = self
            .call("read the checkpoints", |db| {
                db.prepare("SELECT * FROM checkpoint ORDER BY serial")?.query_map([], record_from)?.collect()
            })
            .await?;
        // What this code could not have written is of no use, and nothing else depends on it.
        Ok(rows.into_iter().flatten().collect())
    }
}

/// Nothing when a stored value makes no sense.
fn record_from(row: &Row<'_>) -> rusqlite::Result<Option<CheckpointRecord>> {
    let process = match (row.get("pid")?, row.get("pid_started")?, row.get("process_name")?) {
        (Some(pid), Some(started), Some(name)) => Some(Place::Memory(ProcessKey { pid, started }, name)),
        _ => None,
    };
    let disk = base_from(row, "disk_tag", "disk_digest")?.map(Place::Disk);
    let sandbox: String = row.get("sandbox")?;
    let (Ok(sandbox), Some(place)) = (sandbox.parse(), disk.or(process)) else { return Ok(None) };
    Ok(Some(CheckpointRecord {
        sandbox,
        name: row.get("name")?,
        created_at_unix: row.get("created_at_unix")?,
        pause_us: row.get("pause_us")?,
        disks: row.get("disks")?,
        automatic: row.get("automatic")?,
        base: base_from(row, "base_tag", "base_digest")?,
        place,
    }))
}

/// The snapshot in two columns of a row, if they name one.
pub(super) fn base_from(row: &Row<'_>, tag: &str, digest: &str) -> rusqlite::Result<Option<Base>> {
    let tag: Option<Tag> = row.get::<_, Option<String>>(tag)?.and_then(|text| text.parse().ok());
    let digest: Option<Digest> = row.get::<_, Option<String>>(digest)?.and_then(|text| text.parse().ok());
    Ok(tag.zip(digest).map(|(tag, digest)| Base { tag, digest }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn checkpoints_are_kept_in_order_and_move_to_disk() {
        let dir = tempfile::tempdir().expect("tempdir");
        let db = Database::open(&dir.path().join("forkd.db")).expect("open");
        let sandbox = SandboxId::new(7, 1);
        let base = |tag: &str| Base { tag: tag.parse().expect("legal tag"), digest: Digest::from_bytes([7; 32]) };
        let key = ProcessKey { pid: 12, started: 34 };
        let record = |name: &str| CheckpointRecord {
            sandbox: sandbox.clone(),
            name: name.to_owned(),
            created_at_unix: 5,
            pause_us: 900,
            disks: 1,
            automatic: name != "b",
            base: Some(base("py")),
            place: Place::Memory(key, format!("frozen-{name}")),
        };
        for name in ["b", "a", "c"] {
            db.note_helper(key, "frozen".to_owned());
            db.note_checkpoint(record(name));
        }
        assert_eq!(db.helpers().await.expect("read"), [], "the next start must not end it");
        assert_eq!(db.checkpoints().await.expect("read"), [record("b"), record("a"), record("c")]);
        let spilled = CheckpointRecord { place: Place::Disk(base("checkpoint-1")), ..record("a") };
        db.note_checkpoint(spilled.clone());
        db.forget_checkpoint(sandbox.clone(), "b".to_owned());
        assert_eq!(db.checkpoints().await.expect("read"), [spilled, record("c")]);
    }
}
