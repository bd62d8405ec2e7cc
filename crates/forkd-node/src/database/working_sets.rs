//! The working sets on record.

use forkd_types::{Digest, Tag};
use rusqlite::{OptionalExtension, params};

use super::{Database, DatabaseError};

impl Database {
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
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
