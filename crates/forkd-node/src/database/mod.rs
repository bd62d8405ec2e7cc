//! What must outlive this process: which sandboxes there are, and the next sequence number.
//!
//! One thread owns the SQLite connection. It takes whatever jobs have gathered, runs them in one
//! transaction, and answers only after the commit. The journal is a write-ahead log without a sync
//! per commit: a crash of the daemon loses nothing; a crash of the host may lose the last commits,
//! and with them sandboxes that ended in the same instant.

pub(crate) mod answers;
pub(crate) mod checkpoints;
mod helpers;
mod sandboxes;
mod schema;
mod working_sets;
pub(crate) mod workspaces;

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use forkd_types::SandboxId;
use rusqlite::{Connection, params};
use tokio::sync::oneshot;

use crate::process::ProcessKey;

pub(crate) use sandboxes::{Base, Branches, Expiry, Origin, Record, RecordState};
use schema::CURRENT;

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
        schema::migrate(&mut connection, path)?;
        let (jobs, queue) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("forkd-database".to_owned())
            .spawn(move || serve(connection, queue))
            .map_err(|error| DatabaseError::Damaged { path: path.to_owned(), what: format!("no thread: {error}") })?;
        Ok(Self { path: path.to_owned(), jobs: Some(jobs), thread: Some(thread) })
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

/// Notes the process of a sandbox that nobody needs any more as a helper.
fn note_ending(db: &Connection, id: &SandboxId, process: ProcessKey) -> rusqlite::Result<()> {
    let columns = params![process.pid, process.started, id.as_str()];
    db.execute("INSERT OR REPLACE INTO helper VALUES (?1, ?2, ?3)", columns).map(drop)
}

#[cfg(test)]
mod tests {
    use super::sandboxes::origin;
    use super::*;

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
}
