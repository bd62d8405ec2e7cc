//! One fan-out, measured: fork, first evaluation in each child, memory before and after.
//!
//! Shared by `quickstart`, which shows it, and `bench spawn`, which repeats it. Every question to a child has
//! a deadline: one that is wedged is counted as failed and holds up nobody for ever.

use std::time::{Duration, Instant};

use forkd_types::SandboxId;
use forkd_types::rest::{EvalRequest, SandboxMemory, SpawnTimings};
use futures_util::StreamExt;

use crate::children::{CONCURRENCY, Children};
use crate::client::Client;
use crate::endpoint::Place;
use crate::progress::Progress;

/// What one child did and cost.
#[derive(Clone, Debug)]
pub(crate) struct Child {
    /// Its id.
    pub(crate) id: SandboxId,
    /// How long it took to come up.
    pub(crate) timings: SpawnTimings,
    /// Memory when its agent had answered.
    pub(crate) at_birth: Option<SandboxMemory>,
    /// Its first evaluation.
    pub(crate) first: Evaluation,
    /// Memory after the first evaluation.
    pub(crate) after_eval: Option<SandboxMemory>,
}

/// An evaluation in a child.
#[derive(Clone, Debug)]
pub(crate) struct Evaluation {
    /// `repr` of the value.
    pub(crate) result: String,
    /// What it printed.
    pub(crate) stdout: String,
    /// From sending until the answer.
    pub(crate) us: u64,
    /// Why it failed.
    pub(crate) error: Option<String>,
}

/// How long one child may take over one question, unless the caller says otherwise.
pub(crate) const CHILD_LIMIT: Duration = Duration::from_secs(120);

/// How children are asked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Manner {
    /// How long one child may take over one question.
    pub(crate) limit: Duration,
    /// How far apart evaluations begin that run at the same time.
    pub(crate) apart: Duration,
}

impl Manner {
    /// All at once; but not through QEMU's user network, which resets some of a hundred connections that come in the
    /// same instant.
    pub(crate) fn of(place: Place, limit: Duration) -> Self {
        let apart = if place == Place::Machine { Duration::from_millis(10) } else { Duration::ZERO };
        Self { limit, apart }
    }
}

/// What the daemon and the way to it may take on top of what the child may take.
const WAY_THERE: Duration = Duration::from_secs(15);

/// Measures children that are up, one piece of Python in each. The evaluations run all at once, as
/// a fan-out would; memory is read before the first and after the last.
pub(crate) async fn measure(
    client: &Client,
    children: &Children,
    code: &str,
    manner: Manner,
    progress: &Progress,
) -> (Vec<Child>, u64) {
    let timings = &children.report().timings;
    let ids: Vec<_> = timings.iter().map(|timing| timing.id.clone()).collect();
    let at_birth = memory(client, &ids, manner.limit, "Memory at birth", progress).await;
    let began = Instant::now();
    let first = evaluate(client, &ids, code, manner, "First evaluation", progress).await;
    let evaluated_us = began.elapsed().as_micros() as u64;
    let after_eval = memory(client, &ids, manner.limit, "Memory after the first evaluation", progress).await;
    let children = timings
        .iter()
        .zip(at_birth)
        .zip(first)
        .zip(after_eval)
        .map(|(((timings, at_birth), first), after_eval)| Child {
            id: timings.id.clone(),
            timings: timings.clone(),
            at_birth,
            first,
            after_eval,
        })
        .collect();
    (children, evaluated_us)
}

/// Runs `code` in every child at once; a failure, or no answer in time, is part of the result.
pub(crate) async fn evaluate(
    client: &Client,
    ids: &[SandboxId],
    code: &str,
    manner: Manner,
    title: &str,
    progress: &Progress,
) -> Vec<Evaluation> {
    let Manner { limit, apart } = manner;
    let numbered: Vec<_> = (0u32..).zip(ids).collect();
    counted(&numbered, ids.len(), title, progress, |&(number, id)| async move {
        tokio::time::sleep(apart * number).await;
        evaluate_one(client, id, code, limit).await
    })
    .await
}

/// Runs `code` in one child.
pub(crate) async fn evaluate_one(client: &Client, id: &SandboxId, code: &str, limit: Duration) -> Evaluation {
    let (code, language) = (code.to_owned(), Some("python".to_owned()));
    let request = EvalRequest { code, language, timeout_secs: limit.as_secs().max(1) };
    let began = Instant::now();
    let outcome = tokio::time::timeout(limit + WAY_THERE, client.eval(id, &request)).await;
    let us = began.elapsed().as_micros() as u64;
    let failed = |error| Evaluation { result: String::new(), stdout: String::new(), us, error: Some(error) };
    match outcome {
        Ok(Ok(answer)) => {
            Evaluation { result: answer.result.unwrap_or_default(), stdout: answer.stdout, us, error: answer.error }
        }
        Ok(Err(error)) => failed(error.to_string()),
        Err(_) => failed(format!("no answer within {} s", (limit + WAY_THERE).as_secs())),
    }
}

/// What every child costs now; none for a child that cannot be asked.
async fn memory(
    client: &Client,
    ids: &[SandboxId],
    limit: Duration,
    title: &str,
    progress: &Progress,
) -> Vec<Option<SandboxMemory>> {
    counted(ids, CONCURRENCY, title, progress, |id| async move {
        tokio::time::timeout(limit, client.memory(id)).await.ok()?.ok()
    })
    .await
}

/// Calls `call` for each of `items`, `at_once` of them at a time, under a counted bar; results in order.
async fn counted<'a, I, T, F: Future<Output = T>>(
    items: &'a [I],
    at_once: usize,
    title: &str,
    progress: &Progress,
    call: impl Fn(&'a I) -> F,
) -> Vec<T> {
    let step = progress.quick_step(title);
    step.set_items(items.len() as u64);
    let mut results = Vec::with_capacity(items.len());
    let mut answers = futures_util::stream::iter(items).map(call).buffered(at_once.max(1));
    while let Some(result) = answers.next().await {
        results.push(result);
        step.set_position(results.len() as u64);
    }
    step.vanish();
    results
}

/// The stages of several children by name, in the order in which they ran: microseconds per child.
pub(crate) fn stages<'a>(timings: impl Iterator<Item = &'a SpawnTimings>) -> Vec<(String, Vec<u64>)> {
    let mut stages: Vec<(String, Vec<u64>)> = Vec::new();
    for stage in timings.flat_map(|timings| &timings.stages.0) {
        match stages.iter_mut().find(|(name, _)| *name == stage.name) {
            Some((_, values)) => values.push(stage.us),
            None => stages.push((stage.name.clone(), vec![stage.us])),
        }
    }
    stages
}
