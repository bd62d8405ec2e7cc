//! What must outlive this process: which sandboxes there are, and the next sequence number.
//!
//! One thread owns the SQLite connection. It takes whatever jobs have gathered, runs them in one
//! transaction, and answers only after the commit. The journal is a write-ahead log without a sync
//! per commit: a crash of the daemon loses nothing; a crash of the host may lose the last commits,
//! and with them sandboxes that ended in the same instant.

pub(crate) mod answers;
pub(crate) mod checkpoints;
pub(crate) mod workspaces;

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use forkd_types::rest::OnTimeout;
use forkd_types::{Digest, SandboxId, Tag};
use rusqlite::{Connection, OptionalExtension, Row, params};
use tokio::sync::oneshot;

use crate::process::ProcessKey;

/// Why the database could not be used.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// SQLite said no.
    #[error("state database {}: cannot {action}: {source}", path.display())]
    Sqlite {
        /// The database file.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// What SQLite said.
        source: rusqlite::Error,
    },
    /// It was written by a later release.
    #[error("state database {} has schema version {found}; this release reads up to {CURRENT}: use the newer release, or another state directory", path.display())]
    FromTheFuture {
        /// The database file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// A value that this code could not have written.
    #[error("state database {}: {what}", path.display())]
    Damaged {
        /// The database file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The transaction that the work was part of did not reach the disk.
    #[error("state database {}: cannot {action}: the transaction was not committed: {cause}", path.display())]
    NotCommitted {
        /// The database file.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// What SQLite said.
        cause: String,
    },
    /// Its thread has ended.
    #[error("state database {} is closed", path.display())]
    Closed {
        /// The database file.
        path: PathBuf,
    },
}

/// The schema version that this code writes.
const CURRENT: u32 = 5;

/// Step N brings a database of version N to version N + 1.
const MIGRATIONS: [&str; CURRENT as usize] = [
    "
CREATE TABLE sandbox (
    id               TEXT PRIMARY KEY,
    snapshot_tag     TEXT NOT NULL,
    state            TEXT NOT NULL CHECK (state IN ('starting', 'running', 'stopped')),
    created_at_unix  INTEGER NOT NULL,
    memory_limit_mib INTEGER,
    pid              INTEGER,
    pid_started      INTEGER,
    disks            INTEGER NOT NULL,
    reason           TEXT,
    stopped_at_unix  INTEGER
) STRICT;
-- Monitors that are not sandboxes (zygotes, boots): found here, they are ended at the next start.
CREATE TABLE helper (
    pid         INTEGER NOT NULL,
    pid_started INTEGER NOT NULL,
    name        TEXT NOT NULL,
    PRIMARY KEY (pid, pid_started)
) STRICT;
CREATE TABLE counter (name TEXT PRIMARY KEY, next INTEGER NOT NULL) STRICT;
INSERT INTO counter VALUES ('sandbox', 0);
-- Process start times count from the boot of this kernel.
CREATE TABLE boot (id TEXT NOT NULL) STRICT;
",
    "
ALTER TABLE sandbox ADD COLUMN snapshot_digest TEXT;
ALTER TABLE sandbox ADD COLUMN forked_from TEXT;
ALTER TABLE sandbox ADD COLUMN branches INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sandbox ADD COLUMN last_branch TEXT;
",
    "
-- See `working_set`. A cache: nothing is lost with a row but time.
CREATE TABLE working_set (
    snapshot_digest TEXT PRIMARY KEY,
    snapshot_tag    TEXT NOT NULL,
    runs            TEXT NOT NULL
) STRICT;
",
    "
-- What a sandbox that was rewound to a checkpoint on disk changes since.
ALTER TABLE sandbox ADD COLUMN base_tag TEXT;
ALTER TABLE sandbox ADD COLUMN base_digest TEXT;
ALTER TABLE sandbox ADD COLUMN auto_checkpoint INTEGER NOT NULL DEFAULT 0;
-- Each is in a process or in a snapshot.
CREATE TABLE checkpoint (
    serial          INTEGER PRIMARY KEY,
    sandbox         TEXT NOT NULL,
    name            TEXT NOT NULL,
    created_at_unix INTEGER NOT NULL,
    pause_us        INTEGER NOT NULL,
    disks           INTEGER NOT NULL,
    automatic       INTEGER NOT NULL,
    base_tag        TEXT,
    base_digest     TEXT,
    pid             INTEGER,
    pid_started     INTEGER,
    process_name    TEXT,
    disk_tag        TEXT,
    disk_digest     TEXT,
    UNIQUE (sandbox, name)
) STRICT;
",
    "
ALTER TABLE sandbox ADD COLUMN expires_at_unix INTEGER;
ALTER TABLE sandbox ADD COLUMN on_timeout TEXT;
CREATE TABLE workspace (
    name              TEXT PRIMARY KEY,
    id                TEXT NOT NULL,
    source_tag        TEXT NOT NULL,
    state_tag         TEXT,
    sandbox           TEXT,
    status            TEXT NOT NULL CHECK (status IN ('running', 'suspended', 'stale')),
    created_at_unix   INTEGER NOT NULL,
    last_active_unix  INTEGER NOT NULL,
    memory_path       TEXT,
    per_child_netns   INTEGER NOT NULL,
    memory_limit_mib  INTEGER,
    hugepages         INTEGER NOT NULL,
    idle_suspend_secs INTEGER
) STRICT;
-- What requests with an idempotency key were answered.
CREATE TABLE answer (
    key             BLOB PRIMARY KEY,
    request         BLOB NOT NULL,
    status          INTEGER NOT NULL,
    content_type    TEXT,
    body            BLOB NOT NULL,
    created_at_unix INTEGER NOT NULL
) STRICT;
CREATE INDEX answer_age ON answer (created_at_unix);
",
];

/// Where a recorded sandbox is in its life; see [`crate::sandbox`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum RecordState {
    /// Its fork was asked for; nobody was told that it exists.
    Starting,
    /// Its agent has answered.
    Running,
    /// Its monitor ended by itself.
    Stopped {
        /// Why.
        reason: String,
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
    fn columns(base: Option<&Self>) -> (Option<&str>, Option<String>) {
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
    pub(crate) memory_limit_mib: Option<u64>,
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

/// What a job leaves to do once it is known whether its transaction was committed.
struct Ran {
    /// Whether its own changes are to be kept.
    keep: bool,
    finish: Box<dyn FnOnce(Option<String>) + Send>,
}

type Job = Box<dyn FnOnce(&Connection) -> Ran + Send>;

/// The state database.
#[derive(Debug)]
pub(crate) struct Database {
    path: PathBuf,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Database {
    /// Opens or creates the database at `path`, bringing its schema up to date.
    pub(crate) fn open(path: &Path) -> Result<Self, DatabaseError> {
        let failed = |action| move |source| DatabaseError::Sqlite { path: path.to_owned(), action, source };
        let mut connection = Connection::open(path).map_err(failed("open it"))?;
        connection.busy_timeout(Duration::from_secs(5)).map_err(failed("set a time limit"))?;
        connection.pragma_update(None, "journal_mode", "WAL").map_err(failed("use a write-ahead log"))?;
        connection.pragma_update(None, "synchronous", "NORMAL").map_err(failed("choose when to sync"))?;
        migrate(&mut connection, path)?;
        let (jobs, queue) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("forkd-database".to_owned())
            .spawn(move || serve(connection, queue))
            .map_err(|error| DatabaseError::Damaged { path: path.to_owned(), what: format!("no thread: {error}") })?;
        Ok(Self { path: path.to_owned(), jobs: Some(jobs), thread: Some(thread) })
    }

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
                                      memory_limit_mib, disks, base_tag, base_digest, auto_checkpoint,
                                      expires_at_unix, on_timeout)
                 VALUES (?1, ?2, ?3, ?4, 'starting', ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
            )?;
            let (expires_at, on_timeout) = Expiry::columns(expiry);
            let (base_tag, base_digest) = Base::columns(origin.base.as_ref());
            (first..first + u64::from(count))
                .map(|sequence| {
                    let id = SandboxId::new(origin.created_at_unix, sequence);
                    insert.execute(params![
                        id.as_str(),
                        origin.snapshot_tag.as_str(),
                        origin.snapshot_digest.map(|digest| digest.to_string()),
                        origin.forked_from.as_ref().map(SandboxId::as_str),
                        origin.created_at_unix,
                        origin.memory_limit_mib,
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
        reason: String,
        at_unix: u64,
    ) -> Result<(), DatabaseError> {
        self.call("record a suspended sandbox", move |db| {
            note_ending(db, &id, process)?;
            db.execute(
                "UPDATE sandbox SET state = 'stopped', reason = ?2, stopped_at_unix = ?3, pid = NULL,
                                    pid_started = NULL, expires_at_unix = NULL, on_timeout = NULL WHERE id = ?1",
                params![id.as_str(), reason, at_unix],
            )
            .map(drop)
        })
        .await
    }

    /// Marks a sandbox as stopped by itself; does not wait.
    pub(crate) fn stopped(&self, id: SandboxId, reason: String, at_unix: u64) {
        self.post("record a stopped sandbox", move |db| {
            db.prepare_cached(
                "UPDATE sandbox SET state = 'stopped', reason = ?2, stopped_at_unix = ?3, pid = NULL, pid_started = NULL
                 WHERE id = ?1",
            )?
            .execute(params![id.as_str(), reason, at_unix])
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

    /// Records the working set of a snapshot; does not wait.
    pub(crate) fn note_working_set(&self, snapshot: Digest, tag: Tag, runs: String) {
        self.post("note a working set", move |db| {
            db.execute(
                "INSERT OR REPLACE INTO working_set VALUES (?1, ?2, ?3)",
                params![snapshot.to_string(), tag.as_str(), runs],
            )
        });
    }

    /// Forgets the working sets of every snapshot that was called `tag`; does not wait.
    pub(crate) fn forget_working_set(&self, tag: Tag) {
        self.post("forget a working set", move |db| {
            db.execute("DELETE FROM working_set WHERE snapshot_tag = ?1", [tag.as_str()])
        });
    }

    /// The working set of a snapshot, if it was recorded.
    pub(crate) async fn working_set(&self, snapshot: Digest) -> Result<Option<String>, DatabaseError> {
        self.call("read a working set", move |db| {
            db.query_row("SELECT runs FROM working_set WHERE snapshot_digest = ?1", [snapshot.to_string()], |row| {
                row.get(0)
            })
            .optional()
        })
        .await
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

    /// Commits a change that changes nothing.
    pub(crate) async fn try_to_write(&self) -> Result<(), DatabaseError> {
        self.call("write to it", |db| db.execute("UPDATE counter SET next = next", []).map(drop)).await
    }

    /// Waits until everything posted so far is committed.
    pub(crate) async fn settle(&self) -> Result<(), DatabaseError> {
        self.call("settle", |_| Ok(())).await
    }

    async fn call<T: Send + 'static>(
        &self,
        action: &'static str,
        job: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, DatabaseError> {
        let (answer, answered) = oneshot::channel();
        self.submit(Box::new(move |db| {
            let result = job(db);
            let keep = result.is_ok();
            Ran { keep, finish: Box::new(move |lost| drop(answer.send((result, lost)))) }
        }));
        let path = self.path.clone();
        match answered.await {
            Ok((Err(source), _)) => Err(DatabaseError::Sqlite { path, action, source }),
            Ok((Ok(_), Some(cause))) => Err(DatabaseError::NotCommitted { path, action, cause }),
            Ok((Ok(value), None)) => Ok(value),
            Err(_) => Err(DatabaseError::Closed { path }),
        }
    }

    fn post(&self, action: &'static str, job: impl FnOnce(&Connection) -> rusqlite::Result<usize> + Send + 'static) {
        self.submit(Box::new(move |db| {
            let result = job(db);
            if let Err(error) = &result {
                tracing::error!(%error, "state database: cannot {action}");
            }
            Ran { keep: result.is_ok(), finish: Box::new(|_| {}) }
        }));
    }

    fn submit(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            // The thread ends only when the sender is dropped; a caller that waits sees the loss.
            let _ = jobs.send(job);
        }
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(mut connection: Connection, queue: mpsc::Receiver<Job>) {
    while let Ok(first) = queue.recv() {
        let mut done = Vec::new();
        let committed: rusqlite::Result<()> = (|| {
            let mut transaction = connection.transaction()?;
            for job in std::iter::once(first).chain(queue.try_iter()) {
                // A savepoint, so that a failing job leaves the others alone.
                let savepoint = transaction.savepoint()?;
                let ran = job(&savepoint);
                match ran.keep {
                    true => savepoint.commit()?,
                    false => savepoint.finish()?,
                }
                done.push(ran.finish);
            }
            transaction.commit()
        })();
        if let Err(error) = &committed {
            tracing::error!(%error, "state database: cannot commit");
        }
        let lost: Option<String> = committed.err().map(|error| error.to_string());
        for finish in done {
            finish(lost.clone());
        }
    }
}

fn migrate(connection: &mut Connection, path: &Path) -> Result<(), DatabaseError> {
    let failed = |action| move |source| DatabaseError::Sqlite { path: path.to_owned(), action, source };
    let found: u32 = connection
        .pragma_query_value(None, "user_version", |row| row.get(0))
        .map_err(failed("read its schema version"))?;
    if found > CURRENT {
        return Err(DatabaseError::FromTheFuture { path: path.to_owned(), found });
    }
    for (version, step) in (0..).zip(MIGRATIONS).skip(found as usize) {
        let transaction = connection.transaction().map_err(failed("begin a migration"))?;
        transaction.execute_batch(step).map_err(failed("migrate it"))?;
        transaction.pragma_update(None, "user_version", version + 1).map_err(failed("note its schema version"))?;
        transaction.commit().map_err(failed("finish a migration"))?;
    }
    Ok(())
}

/// Notes the process of a sandbox that nobody needs any more as a helper.
fn note_ending(db: &Connection, id: &SandboxId, process: ProcessKey) -> rusqlite::Result<()> {
    let columns = params![process.pid, process.started, id.as_str()];
    db.execute("INSERT OR REPLACE INTO helper VALUES (?1, ?2, ?3)", columns).map(drop)
}

/// The outer error is SQLite's, the inner one says which stored value makes no sense.
fn record_from(row: &Row<'_>) -> rusqlite::Result<Result<Record, String>> {
    let id: String = row.get("id")?;
    let tag: String = row.get("snapshot_tag")?;
    let state: String = row.get("state")?;
    let state = match state.as_str() {
        "running" => RecordState::Running,
        "stopped" => RecordState::Stopped {
            reason: row.get::<_, Option<String>>("reason")?.unwrap_or_default(),
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
        memory_limit_mib: row.get("memory_limit_mib")?,
        disks: row.get("disks")?,
        base: checkpoints::base_from(row, "base_tag", "base_digest")?,
        auto_checkpoint: row.get("auto_checkpoint")?,
    };
    let branches = Branches { count: row.get("branches")?, last: optional("last_branch")? };
    let expiry = Expiry::from_row(row)?;
    Ok(Ok(Record { id, origin, expiry, state, branches, process }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(at: u64) -> Origin {
        Origin {
            snapshot_tag: "py".parse().expect("legal tag"),
            snapshot_digest: Some(Digest::from_bytes([7; 32])),
            forked_from: Some(SandboxId::new(1, 1)),
            created_at_unix: at,
            memory_limit_mib: Some(256),
            disks: 1,
            base: Some(Base { tag: "cp".parse().expect("legal tag"), digest: Digest::from_bytes([8; 32]) }),
            auto_checkpoint: true,
        }
    }

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
        db.stopped(ids[1].clone(), "was struck".to_owned(), 9);
        let branches = Branches { count: 2, last: Some("/s/b/memory.layer".to_owned()) };
        db.note_branches(ids[0].clone(), branches.clone());
        drop(db);
        let db = Database::open(&path).expect("open again");
        let records = db.sandboxes().await.expect("read");
        assert_eq!(
            records.iter().map(|r| (r.state.clone(), r.process)).collect::<Vec<_>>(),
            [
                (RecordState::Running, Some(process)),
                (RecordState::Stopped { reason: "was struck".to_owned(), at_unix: 9 }, None),
                (RecordState::Starting, Some(process)),
            ]
        );
        assert_eq!((&records[0].origin, &records[0].branches), (&origin(7), &branches));
        assert_eq!(records[1].branches, Branches::default());
        assert!(records.iter().all(|record| record.expiry == Some(EXPIRY)));
        db.note_expiry(ids[0].clone(), None).await.expect("note");
        let reason = "was suspended".to_owned();
        db.stopping(ids[1].clone(), process, reason.clone(), 11).await.expect("note");
        let records = db.sandboxes().await.expect("read");
        assert_eq!((records[0].expiry, records[1].expiry), (None, None));
        assert_eq!(records[1].state, RecordState::Stopped { reason, at_unix: 11 });
        assert_eq!(db.helpers().await.expect("read"), [(process, ids[1].to_string())], "it is ended at the next start");
        db.forget(ids);
        assert!(db.sandboxes().await.expect("read").is_empty());
    }

    #[tokio::test]
    async fn a_failing_job_leaves_its_neighbours_alone() {
        let dir = tempfile::tempdir().expect("tempdir");
        let db = Database::open(&dir.path().join("forkd.db")).expect("open");
        let bad = db.call("fail", |db| db.execute("INSERT INTO nowhere VALUES (1)", []));
        let good = db.begin(origin(1), None, 1);
        let (bad, good) = tokio::join!(bad, good);
        assert!(bad.expect_err("no such table").to_string().contains("nowhere"));
        good.expect("unharmed");
        assert_eq!(db.sandboxes().await.expect("read").len(), 1);
    }

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

    #[tokio::test]
    async fn working_sets_go_with_their_tag() {
        let dir = tempfile::tempdir().expect("tempdir");
        let db = Database::open(&dir.path().join("forkd.db")).expect("open");
        let tag = |name: &str| name.parse().expect("legal tag");
        let digest = |byte| Digest::from_bytes([byte; 32]);
        db.note_working_set(digest(1), tag("py"), "old".to_owned());
        db.note_working_set(digest(1), tag("py"), "new".to_owned());
        db.note_working_set(digest(2), tag("web"), "other".to_owned());
        assert_eq!(db.working_set(digest(1)).await.expect("read").as_deref(), Some("new"));
        db.forget_working_set(tag("py"));
        assert_eq!(db.working_set(digest(1)).await.expect("read"), None);
        assert_eq!(db.working_set(digest(2)).await.expect("read").as_deref(), Some("other"));
    }

    #[tokio::test]
    async fn sandboxes_of_the_first_schema_are_read() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("forkd.db");
        let old = Connection::open(&path).expect("open");
        old.execute_batch(MIGRATIONS[0]).expect("the schema as first released");
        old.pragma_update(None, "user_version", 1).expect("note its version");
        old.execute_batch("INSERT INTO sandbox (id, snapshot_tag, state, created_at_unix, disks) VALUES ('sb-7-0000', 'py', 'running', 7, 1)")
            .expect("a row as first released");
        drop(old);
        let db = Database::open(&path).expect("migrate");
        let records = db.sandboxes().await.expect("read");
        assert_eq!(records[0].origin.snapshot_digest, None);
        assert_eq!(records[0].branches, Branches::default());
    }

    #[tokio::test]
    async fn a_database_of_the_fourth_schema_is_taken_over_with_all_that_is_in_it() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("forkd.db");
        let old = Connection::open(&path).expect("open");
        for step in &MIGRATIONS[..4] {
            old.execute_batch(step).expect("the schema as released");
        }
        old.pragma_update(None, "user_version", 4).expect("note its version");
        old.execute_batch(
            "INSERT INTO sandbox (id, snapshot_tag, state, created_at_unix, disks, memory_limit_mib, base_tag, base_digest,
                                  auto_checkpoint, pid, pid_started)
             VALUES ('sb-7-0000', 'py', 'running', 7, 1, 64, NULL, NULL, 1, 12, 34);
             INSERT INTO checkpoint (sandbox, name, created_at_unix, pause_us, disks, automatic, pid, pid_started,
                                     process_name)
             VALUES ('sb-7-0000', 'cp-1', 8, 9, 1, 0, 13, 35, 'frozen-1');
             UPDATE counter SET next = 1;",
        )
        .expect("rows as released");
        drop(old);
        let db = Database::open(&path).expect("migrate");
        let records = db.sandboxes().await.expect("read");
        assert_eq!((records.len(), records[0].expiry, records[0].origin.auto_checkpoint), (1, None, true));
        assert_eq!(records[0].process, Some(ProcessKey { pid: 12, started: 34 }));
        assert_eq!(db.checkpoints().await.expect("read")[0].name, "cp-1");
        assert!(db.workspaces().await.expect("read").is_empty());
        assert_eq!(db.begin(origin(7), None, 1).await.expect("begin")[0].as_str(), "sb-7-0001");
    }

    #[test]
    fn a_later_schema_is_refused_by_number() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("forkd.db");
        drop(Database::open(&path).expect("open"));
        Connection::open(&path).and_then(|db| db.pragma_update(None, "user_version", CURRENT + 1)).expect("age it");
        let error = Database::open(&path).expect_err("too new").to_string();
        assert!(error.contains(&format!("version {}", CURRENT + 1)), "{error}");
    }
}
