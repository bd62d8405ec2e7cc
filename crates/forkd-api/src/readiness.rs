//! Whether the daemon can do its work.
//!
//! Nobody needs a token to ask, so that asking must cost nothing: what was found is the answer for a second.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json as Answer;
use axum::extract::State;
use forkd_node::{Node, NodeResult};
use forkd_types::rest::Health;
use tokio::sync::Mutex;

use crate::error::{ApiError, ApiResult};
use crate::router::Api;

/// How long one part may take to show that it works.
const LIMIT: Duration = Duration::from_secs(2);

/// How long an answer is good.
const FRESH: Duration = Duration::from_secs(1);

/// What was found last. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct Readiness(Arc<Mutex<Option<Found>>>);

/// Why the node cannot work, and when that was found.
struct Found {
    at: Instant,
    reasons: Vec<String>,
}

impl Readiness {
    /// Why the node cannot work; nothing when it can.
    async fn reasons(&self, node: &Node) -> Vec<String> {
        let mut found = self.0.lock().await;
        if let Some(Found { at, reasons }) = found.as_ref()
            && at.elapsed() < FRESH
        {
            return reasons.clone();
        }
        let (database, store) =
            tokio::join!(check("the state database", node.try_database()), check("the store", node.try_store()));
        let reasons: Vec<_> = [database, store].into_iter().flatten().collect();
        *found = Some(Found { at: Instant::now(), reasons: reasons.clone() });
        reasons
    }
}

/// Why `part` does not work.
async fn check(part: &str, trying: impl Future<Output = NodeResult<()>>) -> Option<String> {
    match tokio::time::timeout(LIMIT, trying).await {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error.message()),
        Err(_) => Some(format!("{part} has not answered for {} s", LIMIT.as_secs())),
    }
}

/// `GET /readyz`: 200 when the state database and the store can be written, else 503 and why not.
pub(crate) async fn show(State(api): State<Api>) -> ApiResult<Answer<Health>> {
    match api.readiness.reasons(&api.node).await {
        reasons if reasons.is_empty() => Ok(Answer(Health { ok: true })),
        reasons => Err(ApiError::not_ready(&reasons)),
    }
}
