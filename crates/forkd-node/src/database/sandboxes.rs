//! The sandboxes on record.

use forkd_types::rest::{EndCode, OnTimeout, SandboxLimits};
use forkd_types::{Digest, SandboxId, Tag};
use rusqlite::{Row, params};

use super::{Database, DatabaseError, checkpoints, note_ending};
use crate::lifecycle::End;
use crate::process::ProcessKey;

/// Where a recorded sandbox is in its life; see [`crate::sandbox`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum RecordState {
    /// Its fork was asked for; nobody was told that it exists.
    Starting,
    /// Its agent has answered.
    Running,
    /// Its monitor ended by itself.
    Stopped {
        /// How.
        end: End,
        /// When.
        at_unix: u64,
    },
}

/// A snapshot that memory and disks of a machine are changes of, by its tag and the digest of its description.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Base {
    pub(crate) tag: Tag,
    pub(crate) digest: Digest,
}

impl Base {
    /// What two columns hold of it.
    pub(super) fn columns(base: Option<&Self>) -> (Option<&str>, Option<String>) {
        base.map(|base| (base.tag.as_str(), base.digest.to_string())).unzip()
    }
}

/// What a sandbox came from; equal for all that one request made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Origin {
    /// The snapshot whose memory and disks it changes, itself or by way of sandboxes it is a copy of.
    pub(crate) snapshot_tag: Tag,
    /// Digest of that snapshot's description; none when an earlier release made the sandbox.
    pub(crate) snapshot_digest: Option<Digest>,
    /// The sandbox it is a copy of.
    pub(crate) forked_from: Option<SandboxId>,
    pub(crate) created_at_unix: u64,
    /// What it may take of the host.
    pub(crate) limits: SandboxLimits,
    pub(crate) disks: usize,
    /// What it changes, if that is not the snapshot itself: a checkpoint on disk.
    pub(crate) base: Option<Base>,
    /// Whether a checkpoint is taken before every program that is run in it.
    pub(crate) auto_checkpoint: bool,
}

impl Origin {
    /// The snapshot itself; unknown which one of its tag when an earlier release made the sandbox.
    pub(crate) fn snapshot(&self) -> Option<Base> {
        self.snapshot_digest.map(|digest| Base { tag: self.snapshot_tag.clone(), digest })
    }

    /// What the sandbox changed when it began; unknown when an earlier release made it.
    pub(crate) fn base(&self) -> Option<Base> {
        self.base.clone().or_else(|| self.snapshot())
    }
}

/// The snapshots that were taken of a sandbox.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Branches {
    /// How many were tried.
    pub(crate) count: u64,
    /// Memory file of the newest.
    pub(crate) last: Option<String>,
}

/// When a sandbox ends by itself, and how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Expiry {
    pub(crate) at_unix: u64,
    pub(crate) then: OnTimeout,
}

impl Expiry {
    /// What two columns hold of it.
    fn columns(expiry: Option<Self>) -> (Option<u64>, Option<&'static str>) {
        let word = |then| match then {
            OnTimeout::Kill => "kill",
            OnTimeout::Suspend => "suspend",
        };
        expiry.map(|expiry| (expiry.at_unix, word(expiry.then))).unzip()
    }

    fn from_row(row: &Row<'_>) -> rusqlite::Result<Option<Self>> {
        let at: Option<u64> = row.get("expires_at_unix")?;
        let then = match row.get::<_, Option<String>>("on_timeout")?.as_deref() {
            Some("suspend") => OnTimeout::Suspend,
            _ => OnTimeout::Kill,
        };
        Ok(at.map(|at_unix| Self { at_unix, then }))
    }
}

/// One recorded sandbox.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Record {
    pub(crate) id: SandboxId,
    pub(crate) origin: Origin,
    pub(crate) expiry: Option<Expiry>,
    pub(crate) state: RecordState,
    pub(crate) branches: Branches,
    pub(crate) process: Option<ProcessKey>,
}

impl Database {
    /// Reserves as many consecutive sequence numbers as `count` and records a starting sandbox for
    /// each; returns their ids.
    pub(crate) async fn begin(
        &self,
        origin: Origin,
        expiry: Option<Expiry>,
        count: u32,
    ) -> Result<Vec<SandboxId>, DatabaseError> {
        self.call("record a spawn", move |db| {
            let first: u64 = db.query_row(
                "UPDATE counter SET next = next + ?1 WHERE name = 'sandbox' RETURNING next - ?1",
                [count],
                |row| row.get(0),
            )?;
            let mut insert = db.prepare_cached(
                "INSERT INTO sandbox (id, snapshot_tag, snapshot_digest, forked_from, state, created_at_unix,
                                      limits, disks, base_tag, base_digest, auto_checkpoint,
                                      expires_at_unix, on_timeout)
                 VALUES (?1, ?2, ?3, ?4, 'starting', ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
            )?;
            let (expires_at, on_timeout) = Expiry::columns(expiry);
            let (base_tag, base_digest) = Base::columns(origin.base.as_ref());
            let limits = limits_column(&origin.limits);
            (first..first + u64::from(count))
                .map(|sequence| {
                    let id = SandboxId::new(origin.created_at_unix, sequence);
                    insert.execute(params![
                        id.as_str(),
                        origin.snapshot_tag.as_str(),
                        origin.snapshot_digest.map(|digest| digest.to_string()),
                        origin.forked_from.as_ref().map(SandboxId::as_str),
                        origin.created_at_unix,
                        limits,
                        origin.disks,
                        base_tag,
                        base_digest,
                        origin.auto_checkpoint,
                        expires_at,
                        on_timeout,
                    ])?;
                    Ok(id)
                })
                .collect()
        })
        .await
    }

    /// Notes the process of a starting sandbox; does not wait.
    pub(crate) fn note_process(&self, id: SandboxId, process: ProcessKey) {
        self.post("note a sandbox's process", move |db| {
            db.prepare_cached("UPDATE sandbox SET pid = ?2, pid_started = ?3 WHERE id = ?1")?.execute(params![
                id.as_str(),
                process.pid,
                process.started
            ])
        });
    }

    /// Marks sandboxes as running.
    pub(crate) async fn running(&self, ids: Vec<(SandboxId, ProcessKey)>) -> Result<(), DatabaseError> {
        self.call("record running sandboxes", move |db| {
            let mut update =
                db.prepare_cached("UPDATE sandbox SET state = 'running', pid = ?2, pid_started = ?3 WHERE id = ?1")?;
            for (id, process) in ids {
                update.execute(params![id.as_str(), process.pid, process.started])?;
            }
            Ok(())
        })
        .await
    }

    /// Records what a sandbox changes from now on; does not wait.
    pub(crate) fn note_base(&self, id: SandboxId, base: Option<Base>) {
        self.post("note what a sandbox changes", move |db| {
            let (tag, digest) = Base::columns(base.as_ref());
            db.execute(
                "UPDATE sandbox SET base_tag = ?2, base_digest = ?3 WHERE id = ?1",
                params![id.as_str(), tag, digest],
            )
        });
    }

    /// Records when a sandbox ends by itself.
    pub(crate) async fn note_expiry(&self, id: SandboxId, expiry: Option<Expiry>) -> Result<(), DatabaseError> {
        self.call("note a sandbox's lifetime", move |db| {
            let (at, then) = Expiry::columns(expiry);
            let columns = params![id.as_str(), at, then];
            db.execute("UPDATE sandbox SET expires_at_unix = ?2, on_timeout = ?3 WHERE id = ?1", columns).map(drop)
        })
        .await
    }

    /// Marks a sandbox as stopped whose process, if there is one, is yet to be ended: a helper from now on, which
    /// the next start would end.
    pub(crate) async fn stopping(
        &self,
        id: SandboxId,
        process: ProcessKey,
        end: End,
        at_unix: u64,
    ) -> Result<(), DatabaseError> {
        self.call("record a suspended sandbox", move |db| {
            note_ending(db, &id, process)?;
            db.execute(
                "UPDATE sandbox SET state = 'stopped', reason = ?2, stopped_at_unix = ?3, end_code = ?4, pid = NULL,
                                    pid_started = NULL, expires_at_unix = NULL, on_timeout = NULL WHERE id = ?1",
                params![id.as_str(), end.reason, at_unix, end.code.name()],
            )
            .map(drop)
        })
        .await
    }

    /// Marks a sandbox as stopped by itself; does not wait.
    pub(crate) fn stopped(&self, id: SandboxId, end: End, at_unix: u64) {
        self.post("record a stopped sandbox", move |db| {
            db.prepare_cached(
                "UPDATE sandbox SET state = 'stopped', reason = ?2, stopped_at_unix = ?3, end_code = ?4, pid = NULL,
                                    pid_started = NULL WHERE id = ?1",
            )?
            .execute(params![id.as_str(), end.reason, at_unix, end.code.name()])
        });
    }

    /// Notes what snapshots were taken of a sandbox; does not wait.
    pub(crate) fn note_branches(&self, id: SandboxId, branches: Branches) {
        self.post("note a branch", move |db| {
            db.prepare_cached("UPDATE sandbox SET branches = ?2, last_branch = ?3 WHERE id = ?1")?.execute(params![
                id.as_str(),
                branches.count,
                branches.last
            ])
        });
    }

    /// Forgets sandboxes; does not wait.
    pub(crate) fn forget(&self, ids: Vec<SandboxId>) {
        self.post("forget sandboxes", move |db| {
            let mut delete = db.prepare_cached("DELETE FROM sandbox WHERE id = ?1")?;
            for id in ids {
                delete.execute([id.as_str()])?;
            }
            Ok(0)
        });
    }

    /// All recorded sandboxes, by id.
    pub(crate) async fn sandboxes(&self) -> Result<Vec<Record>, DatabaseError> {
        let rows = self
            .call("read the sandboxes", |db| {
                db.prepare("SELECT * FROM sandbox ORDER BY id")?.query_map([], record_from)?.collect()
            })
            .await?;
        let rows: Vec<Result<Record, String>> = rows;
        rows.into_iter()
            .collect::<Result<_, _>>()
            .map_err(|what| DatabaseError::Damaged { path: self.path.clone(), what })
    }
}

/// What a column holds of limits.
fn limits_column(limits: &SandboxLimits) -> Option<String> {
    let text = || serde_json::to_string(limits).expect("plain data can be written");
    (!limits.is_empty()).then(text)
}

fn limits_from(row: &Row<'_>) -> rusqlite::Result<Result<SandboxLimits, String>> {
    let Some(text) = row.get::<_, Option<String>>("limits")? else { return Ok(Ok(SandboxLimits::default())) };
    Ok(serde_json::from_str(&text).map_err(|error| format!("limits {text:?} that make no sense: {error}")))
}

/// One that is not known is an earlier release's.
fn code_from(row: &Row<'_>) -> rusqlite::Result<EndCode> {
    let name: Option<String> = row.get("end_code")?;
    Ok(name.and_then(|name| EndCode::named(&name)).unwrap_or(EndCode::Lost))
}

/// The outer error is SQLite's, the inner one says which stored value makes no sense.
fn record_from(row: &Row<'_>) -> rusqlite::Result<Result<Record, String>> {
    let id: String = row.get("id")?;
    let tag: String = row.get("snapshot_tag")?;
    let state: String = row.get("state")?;
    let state = match state.as_str() {
        "running" => RecordState::Running,
        "stopped" => RecordState::Stopped {
            end: End { code: code_from(row)?, reason: row.get::<_, Option<String>>("reason")?.unwrap_or_default() },
            at_unix: row.get::<_, Option<u64>>("stopped_at_unix")?.unwrap_or_default(),
        },
        _ => RecordState::Starting,
    };
    let process = match (row.get("pid")?, row.get("pid_started")?) {
        (Some(pid), Some(started)) => Some(ProcessKey { pid, started }),
        _ => None,
    };
    let (id, snapshot_tag) = match (id.parse(), tag.parse()) {
        (Ok(id), Ok(tag)) => (id, tag),
        _ => return Ok(Err(format!("sandbox {id:?} of snapshot {tag:?} has no legal name"))),
    };
    let optional = |column: &str| row.get::<_, Option<String>>(column);
    let origin = Origin {
        snapshot_tag,
        snapshot_digest: optional("snapshot_digest")?.and_then(|text| text.parse().ok()),
        forked_from: optional("forked_from")?.and_then(|text| text.parse().ok()),
        created_at_unix: row.get("created_at_unix")?,
        limits: match limits_from(row)? {
            Ok(limits) => limits,
            Err(what) => return Ok(Err(format!("sandbox {id} has {what}"))),
        },
        disks: row.get("disks")?,
        base: checkpoints::base_from(row, "base_tag", "base_digest")?,
        auto_checkpoint: row.get("auto_checkpoint")?,
    };
    let branches = Branches { count: row.get("branches")?, last: optional("last_branch")? };
    let expiry = Expiry::from_row(row)?;
    Ok(Ok(Record { id, origin, expiry, state, branches, process }))
}

/// The origin of sandboxes in tests.
#[cfg(test)]
pub(super) fn origin(at: u64) -> Origin {
    Origin {
        snapshot_tag: "py".parse().expect("legal tag"),
        snapshot_digest: Some(Digest::from_bytes([7; 32])),
        forked_from: Some(SandboxId::new(1, 1)),
        created_at_unix: at,
        limits: SandboxLimits { memory_mib: Some(256), disk_mib: Some(7), ..SandboxLimits::default() },
        disks: 1,
        base: Some(Base { tag: "cp".parse().expect("legal tag"), digest: Digest::from_bytes([8; 32]) }),
        auto_checkpoint: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPIRY: Expiry = Expiry { at_unix: 99, then: OnTimeout::Suspend };

    #[tokio::test]
    async fn sequence_numbers_go_on_after_a_restart() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("forkd.db");
        let db = Database::open(&path).expect("open");
        let first = db.begin(origin(7), None, 2).await.expect("begin");
        assert_eq!(first.iter().map(SandboxId::as_str).collect::<Vec<_>>(), ["sb-7-0000", "sb-7-0001"]);
        drop(db);
        let db = Database::open(&path).expect("open again");
        assert_eq!(db.begin(origin(7), None, 1).await.expect("begin")[0].as_str(), "sb-7-0002");
    }

    #[tokio::test]
    async fn a_life_is_recorded() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("forkd.db");
        let db = Database::open(&path).expect("open");
        let ids = db.begin(origin(7), Some(EXPIRY), 3).await.expect("begin");
        let process = ProcessKey { pid: 41, started: 4_000_000_000 };
        db.note_process(ids[2].clone(), process);
        db.running(vec![(ids[0].clone(), process), (ids[1].clone(), process)]).await.expect("running");
        let struck = End { code: EndCode::Oom, reason: "was struck".to_owned() };
        db.stopped(ids[1].clone(), struck.clone(), 9);
        let branches = Branches { count: 2, last: Some("/s/b/memory.layer".to_owned()) };
        db.note_branches(ids[0].clone(), branches.clone());
        drop(db);
        let db = Database::open(&path).expect("open again");
        let records = db.sandboxes().await.expect("read");
        assert_eq!(
            records.iter().map(|r| (r.state.clone(), r.process)).collect::<Vec<_>>(),
            [
                (RecordState::Running, Some(process)),
                (RecordState::Stopped { end: struck, at_unix: 9 }, None),
                (RecordState::Starting, Some(process)),
            ]
        );
        assert_eq!((&records[0].origin, &records[0].branches), (&origin(7), &branches));
        assert_eq!(records[1].branches, Branches::default());
        assert!(records.iter().all(|record| record.expiry == Some(EXPIRY)));
        db.note_expiry(ids[0].clone(), None).await.expect("note");
        let end = End { code: EndCode::Suspended, reason: "was suspended".to_owned() };
        db.stopping(ids[1].clone(), process, end.clone(), 11).await.expect("note");
        let records = db.sandboxes().await.expect("read");
        assert_eq!((records[0].expiry, records[1].expiry), (None, None));
        assert_eq!(records[1].state, RecordState::Stopped { end, at_unix: 11 });
        assert_eq!(db.helpers().await.expect("read"), [(process, ids[1].to_string())], "it is ended at the next start");
        db.forget(ids);
        assert!(db.sandboxes().await.expect("read").is_empty());
    }
}
