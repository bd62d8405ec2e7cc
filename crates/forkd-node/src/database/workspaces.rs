//! The workspaces on record.

use forkd_types::rest::WorkspaceStatus;
use forkd_types::{SandboxId, Tag};
use rusqlite::{Connection, Row, params};

use super::{Database, DatabaseError, note_ending};
use crate::process::ProcessKey;

/// How the sandbox of a workspace is made, every time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Shape {
    pub(crate) per_child_netns: bool,
    pub(crate) memory_limit_mib: Option<u64>,
    pub(crate) hugepages: bool,
}

/// One recorded workspace.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct WorkspaceRecord {
    pub(crate) name: String,
    pub(crate) id: String,
    /// The snapshot it began as.
    pub(crate) source: Tag,
    /// The snapshot of its newest suspend.
    pub(crate) state: Option<Tag>,
    /// Its sandbox, while it runs.
    pub(crate) sandbox: Option<SandboxId>,
    pub(crate) status: WorkspaceStatus,
    pub(crate) created_at_unix: u64,
    pub(crate) last_active_unix: u64,
    /// Memory file of its newest state.
    pub(crate) memory_path: Option<String>,
    pub(crate) shape: Shape,
    pub(crate) idle_suspend_secs: Option<u64>,
}

impl Database {
    /// Records a workspace as it is now.
    pub(crate) async fn note_workspace(&self, record: WorkspaceRecord) -> Result<(), DatabaseError> {
        self.call("record a workspace", move |db| write(db, &record)).await
    }

    /// Records a workspace as suspended, and in the same step that the process of its sandbox, which is no sandbox
    /// any more, is yet to be ended.
    pub(crate) async fn note_suspended(
        &self,
        record: WorkspaceRecord,
        sandbox: SandboxId,
        process: ProcessKey,
    ) -> Result<(), DatabaseError> {
        self.call("record a suspended workspace", move |db| {
            write(db, &record)?;
            note_ending(db, &sandbox, process)?;
            db.execute("DELETE FROM sandbox WHERE id = ?1", [sandbox.as_str()]).map(drop)
        })
        .await
    }

    /// Notes when something was last run in a workspace; does not wait.
    pub(crate) fn note_activity(&self, name: String, at_unix: u64) {
        self.post("note a workspace's activity", move |db| {
            db.execute("UPDATE workspace SET last_active_unix = ?2 WHERE name = ?1", params![name, at_unix])
        });
    }

    /// Forgets a workspace.
    pub(crate) async fn forget_workspace(&self, name: String) -> Result<(), DatabaseError> {
        self.call("forget a workspace", move |db| db.execute("DELETE FROM workspace WHERE name = ?1", [name]).map(drop))
            .await
    }

    /// All recorded workspaces, by name.
    pub(crate) async fn workspaces(&self) -> Result<Vec<WorkspaceRecord>, DatabaseError> {
        let rows: Vec<Option<WorkspaceRecord>> = self
            .call("read the workspaces", |db| {
                db.prepare("SELECT * FROM workspace ORDER BY name")?.query_map([], record_from)?.collect()
            })
            .await?;
        match rows.into_iter().collect() {
            Some(records) => Ok(records),
            None => {
                let what = "a workspace's snapshot has no legal name".to_owned();
                Err(DatabaseError::Damaged { path: self.path.clone(), what })
            }
        }
    }
}

fn write(db: &Connection, record: &WorkspaceRecord) -> rusqlite::Result<()> {
    let status = match record.status {
        WorkspaceStatus::Running => "running",
        WorkspaceStatus::Suspended => "suspended",
        WorkspaceStatus::Stale => "stale",
    };
    db.execute(
        "INSERT OR REPLACE INTO workspace (name, id, source_tag, state_tag, sandbox, status, created_at_unix,
                                           last_active_unix, memory_path, per_child_netns, memory_limit_mib,
                                           hugepages, idle_suspend_secs)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)",
        params![
            record.name,
            record.id,
            record.source.as_str(),
            record.state.as_ref().map(Tag::as_str),
            record.sandbox.as_ref().map(SandboxId::as_str),
            status,
            record.created_at_unix,
            record.last_active_unix,
            record.memory_path,
            record.shape.per_child_netns,
            record.shape.memory_limit_mib,
            record.shape.hugepages,
            record.idle_suspend_secs,
        ],
    )
    .map(drop)
}

/// Nothing when a stored value makes no sense.
fn record_from(row: &Row<'_>) -> rusqlite::Result<Option<WorkspaceRecord>> {
    let status = match row.get::<_, String>("status")?.as_str() {
        "running" => WorkspaceStatus::Running,
        "suspended" => WorkspaceStatus::Suspended,
        _ => WorkspaceStatus::Stale,
    };
    let source: String = row.get("source_tag")?;
    let state: Option<String> = row.get("state_tag")?;
    let sandbox: Option<String> = row.get("sandbox")?;
    let (Ok(source), Ok(state)) = (source.parse(), state.map(|tag| tag.parse()).transpose()) else { return Ok(None) };
    Ok(Some(WorkspaceRecord {
        name: row.get("name")?,
        id: row.get("id")?,
        source,
        state,
        sandbox: sandbox.and_then(|id| id.parse().ok()),
        status,
        created_at_unix: row.get("created_at_unix")?,
        last_active_unix: row.get("last_active_unix")?,
        memory_path: row.get("memory_path")?,
        shape: Shape {
            per_child_netns: row.get("per_child_netns")?,
            memory_limit_mib: row.get("memory_limit_mib")?,
            hugepages: row.get("hugepages")?,
        },
        idle_suspend_secs: row.get("idle_suspend_secs")?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::database::{Origin, RecordState};

    fn record() -> WorkspaceRecord {
        WorkspaceRecord {
            name: "w".to_owned(),
            id: "ws-sb-7-0000".to_owned(),
            source: "py".parse().expect("legal tag"),
            state: None,
            sandbox: Some(SandboxId::new(7, 0)),
            status: WorkspaceStatus::Running,
            created_at_unix: 7,
            last_active_unix: 8,
            memory_path: None,
            shape: Shape { per_child_netns: true, memory_limit_mib: Some(64), hugepages: true },
            idle_suspend_secs: Some(600),
        }
    }

    #[tokio::test]
    async fn a_suspend_is_recorded_in_one_step_with_what_is_left_to_end() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("forkd.db");
        let db = Database::open(&path).expect("open");
        let origin = Origin {
            snapshot_tag: "py".parse().expect("legal tag"),
            snapshot_digest: None,
            forked_from: None,
            created_at_unix: 7,
            limits: Default::default(),
            disks: 1,
            base: None,
            auto_checkpoint: false,
        };
        let id = db.begin(origin, None, 1).await.expect("begin").remove(0);
        let key = ProcessKey { pid: 12, started: 34 };
        db.running(vec![(id.clone(), key)]).await.expect("running");
        db.note_workspace(record()).await.expect("note");
        db.note_activity("w".to_owned(), 9);
        drop(db);

        let db = Database::open(&path).expect("open again");
        assert_eq!(db.workspaces().await.expect("read"), [WorkspaceRecord { last_active_unix: 9, ..record() }]);
        assert_eq!(db.sandboxes().await.expect("read")[0].state, RecordState::Running);
        let suspended = WorkspaceRecord {
            status: WorkspaceStatus::Suspended,
            sandbox: None,
            state: Some("ws-w-state".parse().expect("legal tag")),
            memory_path: Some("/s/memory.layer".to_owned()),
            ..record()
        };
        db.note_suspended(suspended.clone(), id.clone(), key).await.expect("note");
        assert_eq!(db.workspaces().await.expect("read"), [suspended]);
        assert!(db.sandboxes().await.expect("read").is_empty());
        assert_eq!(db.helpers().await.expect("read"), [(key, id.to_string())]);
        db.forget_workspace("w".to_owned()).await.expect("forget");
        assert!(db.workspaces().await.expect("read").is_empty());
    }
}
