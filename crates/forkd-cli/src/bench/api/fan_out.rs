//! Many children of one call, and as many of one call each: from the first request until each has evaluated.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use forkd_types::Tag;
use forkd_types::rest::SpawnRequest;
use futures_util::StreamExt;
use serde::Serialize;

use crate::children::Children;
use crate::client::Client;
use crate::interrupt::Interrupts;
use crate::measurement::{CHILD_LIMIT, evaluate_one};
use crate::progress::Progress;
use crate::statistics::{Summary, summarise};

/// How long a child that nobody killed lives.
const LIFETIME: Duration = Duration::from_secs(1800);

/// Both ways to ask for `n` children.
#[derive(Debug, Serialize)]
pub(super) struct FanOut {
    pub(super) n: u32,
    pub(super) one_call: Way,
    pub(super) separate_calls: Way,
}

/// One way to ask for them.
#[derive(Debug, Serialize)]
pub(super) struct Way {
    /// Children that have evaluated.
    pub(super) evaluated: usize,
    /// Why the others have not.
    pub(super) failures: Vec<String>,
    /// From the first request until a child had evaluated, per child; the largest is when all had.
    pub(super) evaluated_ms: Summary,
}

impl Way {
    fn of(outcomes: Vec<Result<Duration, String>>) -> Self {
        let (done, failed): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
        let times: Vec<_> = done.into_iter().flatten().map(|time| time.as_secs_f64() * 1e3).collect();
        let failures = failed.into_iter().filter_map(Result::err).collect();
        Self { evaluated: times.len(), failures, evaluated_ms: summarise(times) }
    }
}

/// Forks `n` children both ways, one after the other.
pub(super) async fn measure(
    client: &Client,
    tag: &Tag,
    n: u32,
    code: &str,
    interrupts: &mut Interrupts,
    progress: &Progress,
) -> anyhow::Result<FanOut> {
    let title = format!("{n} children of one call");
    let step = progress.step(&title);
    let one_call = one_call(client, tag, n, code, interrupts, progress).await?;
    step.done(title);
    let title = format!("{n} children of a call each");
    let step = progress.step(&title);
    let separate_calls = separate_calls(client, tag, n, code, interrupts, progress).await?;
    step.done(title);
    Ok(FanOut { n, one_call, separate_calls })
}

async fn one_call(
    client: &Client,
    tag: &Tag,
    n: u32,
    code: &str,
    interrupts: &mut Interrupts,
    progress: &Progress,
) -> anyhow::Result<Way> {
    let began = Instant::now();
    let children = Children::spawn(client, &SpawnRequest::of(tag, n), interrupts, progress).await?;
    let report = children.report().clone();
    let work = async {
        let evaluating = report.sandboxes.iter().map(|sandbox| evaluated(client, &sandbox.id, code, began));
        Ok(futures_util::future::join_all(evaluating).await)
    };
    let mut outcomes = children.scope(interrupts, work).await?;
    outcomes.extend(report.failures.into_iter().map(|failure| Err(failure.error)));
    Ok(Way::of(outcomes))
}

async fn separate_calls(
    client: &Client,
    tag: &Tag,
    n: u32,
    code: &str,
    interrupts: &mut Interrupts,
    progress: &Progress,
) -> anyhow::Result<Way> {
    // A signal may cut calls off whose children are not known here yet: those end by themselves.
    let request = SpawnRequest { timeout_secs: Some(LIFETIME.as_secs()), ..SpawnRequest::of(tag, 1) };
    let born = Mutex::new(Vec::new());
    let began = Instant::now();
    let one = |_| async {
        let mut report = client.spawn(&request).await.map_err(|error| error.to_string())?;
        let Some(sandbox) = report.sandboxes.pop() else {
            return Err(report.failures.pop().map(|failure| failure.error).unwrap_or_default());
        };
        born.lock().unwrap_or_else(PoisonError::into_inner).push(sandbox.id.clone());
        evaluated(client, &sandbox.id, code, began).await
    };
    let asking = futures_util::stream::iter(0..n).map(one).buffer_unordered(n as usize).collect::<Vec<_>>();
    let outcomes = interrupts.guard(async { Ok(asking.await) }).await;
    let ids = std::mem::take(&mut *born.lock().unwrap_or_else(PoisonError::into_inner));
    for (id, outcome) in crate::children::kill(client, ids).await {
        if let Err(error) = outcome {
            progress.warn(format_args!("could not kill {id}: {error}"));
        }
    }
    Ok(Way::of(outcomes?))
}

/// The time since `began` when the child has evaluated.
async fn evaluated(
    client: &Client,
    id: &forkd_types::SandboxId,
    code: &str,
    began: Instant,
) -> Result<Duration, String> {
    match evaluate_one(client, id, code, CHILD_LIMIT).await.error {
        None => Ok(began.elapsed()),
        Some(error) => Err(format!("{id}: {error}")),
    }
}
