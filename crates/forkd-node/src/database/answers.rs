//! What requests with an idempotency key were answered.

use rusqlite::{OptionalExtension, params};

use super::{Database, DatabaseError};
use crate::host::unix_now;

/// How long an answer is kept, in seconds.
const KEPT_SECS: u64 = 24 * 3600;

/// How many answers are kept; the oldest go first.
const KEPT: u32 = 10_000;

/// An answer as it was given.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RememberedAnswer {
    /// Digest of the request that it answers.
    pub request: [u8; 32],
    /// Its status.
    pub status: u16,
    /// What its body is.
    pub content_type: Option<String>,
    /// Its body.
    pub body: Vec<u8>,
}

impl Database {
    /// The answer that was noted under `key`, if it is kept still.
    pub(crate) async fn answer(&self, key: [u8; 32]) -> Result<Option<RememberedAnswer>, DatabaseError> {
        let oldest = unix_now().saturating_sub(KEPT_SECS);
        self.call("look for an answer", move |db| {
            db.query_row(
                "SELECT request, status, content_type, body FROM answer WHERE key = ?1 AND created_at_unix > ?2",
                params![key, oldest],
                |row| {
                    let (request, status, content_type, body) = (row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?);
                    Ok(RememberedAnswer { request, status, content_type, body })
                },
            )
            .optional()
        })
        .await
    }

    /// Notes an answer under `key`.
    pub(crate) async fn note_answer(&self, key: [u8; 32], answer: RememberedAnswer) -> Result<(), DatabaseError> {
        self.note_answer_at(key, answer, unix_now()).await
    }

    async fn note_answer_at(&self, key: [u8; 32], answer: RememberedAnswer, now: u64) -> Result<(), DatabaseError> {
        self.call("note an answer", move |db| {
            db.execute(
                "INSERT OR REPLACE INTO answer VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                params![key, answer.request, answer.status, answer.content_type, answer.body, now],
            )?;
            db.execute("DELETE FROM answer WHERE created_at_unix <= ?1", [now.saturating_sub(KEPT_SECS)])?;
            db.execute(
                "DELETE FROM answer WHERE key IN
                     (SELECT key FROM answer ORDER BY created_at_unix DESC, rowid DESC LIMIT -1 OFFSET ?1)",
                [KEPT],
            )
            .map(drop)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(body: &str) -> RememberedAnswer {
        let content_type = Some("application/json".to_owned());
        RememberedAnswer { request: [9; 32], status: 201, content_type, body: body.into() }
    }

    #[tokio::test]
    async fn answers_are_kept_for_a_day_and_over_restarts() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("forkd.db");
        let db = Database::open(&path).expect("open");
        assert_eq!(db.answer([1; 32]).await.expect("read"), None);
        db.note_answer([1; 32], answer("[]")).await.expect("note");
        let yesterday = unix_now() - KEPT_SECS;
        db.note_answer_at([2; 32], answer("old"), yesterday).await.expect("note");
        drop(db);
        let db = Database::open(&path).expect("open again");
        assert_eq!(db.answer([1; 32]).await.expect("read"), Some(answer("[]")));
        assert_eq!(db.answer([2; 32]).await.expect("read"), None);
    }

    #[tokio::test]
    async fn the_oldest_answers_make_room() {
        let dir = tempfile::tempdir().expect("tempdir");
        let db = Database::open(&dir.path().join("forkd.db")).expect("open");
        let now = unix_now();
        db.call("fill the table", move |db| {
            let mut insert = db.prepare("INSERT INTO answer VALUES (?1, ?1, 201, NULL, ?1, ?2)")?;
            for number in 0..KEPT {
                let mut key = [0; 32];
                key[..4].copy_from_slice(&number.to_le_bytes());
                insert.execute(params![key, now - 100 + u64::from(number > 0)])?;
            }
            Ok(())
        })
        .await
        .expect("fill");
        db.note_answer([7; 32], answer("new")).await.expect("note");
        assert_eq!(db.answer([0; 32]).await.expect("read"), None, "the oldest");
        assert!(db.answer([7; 32]).await.expect("read").is_some());
    }
}
