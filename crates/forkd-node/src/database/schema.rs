//! The tables, and how those of earlier releases become them.

use std::path::Path;

use rusqlite::Connection;

use super::DatabaseError;

/// The schema version that this code writes.
pub(super) const CURRENT: u32 = 6;

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
    "
-- As JSON, all of them; the memory limit was a column of its own.
ALTER TABLE sandbox ADD COLUMN limits TEXT;
UPDATE sandbox SET limits = json_object('memory_mib', memory_limit_mib) WHERE memory_limit_mib IS NOT NULL;
ALTER TABLE sandbox DROP COLUMN memory_limit_mib;
ALTER TABLE sandbox ADD COLUMN end_code TEXT;
",
];

/// Brings the schema up to date.
pub(super) fn migrate(connection: &mut Connection, path: &Path) -> Result<(), DatabaseError> {
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

#[cfg(test)]
mod tests {
    use super::super::Database;
    use super::super::sandboxes::{Branches, origin};
    use super::*;
    use crate::process::ProcessKey;

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
        assert_eq!(records[0].origin.limits.memory_mib, Some(64), "the limit is among the others now");
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
