//! One fan-out, measured: fork, first evaluation in each child, memory before and after.
//!
//! Shared by `quickstart`, which shows it, and `bench spawn`, which repeats it.

use std::time::Instant;

use forkd_types::SandboxId;
use forkd_types::rest::{EvalRequest, SandboxMemory, SpawnTimings};
use futures_util::StreamExt;

use crate::children::{CONCURRENCY, Children};
use crate::client::Client;
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

/// Measures children that are up, one piece of Python in each. The evaluations run all at once, as
/// a fan-out would; memory is read before the first and after the last.
pub(crate) async fn measure(
    client: &Client,
    children: &Children,
    code: &str,
    progress: &Progress,
) -> anyhow::Result<(Vec<Child>, u64)> {
    let timings = &children.report().timings;
    let ids: Vec<_> = timings.iter().map(|timing| timing.id.clone()).collect();
    let at_birth = memory(client, &ids, "Memory at birth", progress).await;
    let began = Instant::now();
    let first = evaluate(client, &ids, code, "First evaluation", progress).await;
    let evaluated_us = began.elapsed().as_micros() as u64;
    let after_eval = memory(client, &ids, "Memory after the first evaluation", progress).await;
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
    Ok((children, evaluated_us))
}

/// Runs `code` in every child at once; a failure is part of the result.
pub(crate) async fn evaluate(
    client: &Client,
    ids: &[SandboxId],
    code: &str,
    title: &str,
    progress: &Progress,
) -> Vec<Evaluation> {
    counted(ids, title, progress, |id| async move {
        let request = EvalRequest { code: code.to_owned(), language: Some("python".to_owned()), timeout_secs: 120 };
        let began = Instant::now();
        let outcome = client.eval(id, &request).await;
        let us = began.elapsed().as_micros() as u64;
        match outcome {
            Ok(answer) => {
                Evaluation { result: answer.result.unwrap_or_default(), stdout: answer.stdout, us, error: answer.error }
            }
            Err(error) => {
                Evaluation { result: String::new(), stdout: String::new(), us, error: Some(error.to_string()) }
            }
        }
    })
    .await
}

/// What every child costs now; none for a child that cannot be asked.
async fn memory(client: &Client, ids: &[SandboxId], title: &str, progress: &Progress) -> Vec<Option<SandboxMemory>> {
    counted(ids, title, progress, |id| async move { client.memory(id).await.ok() }).await
}

/// Calls `call` for every child, many at once, under a counted bar; results in order.
async fn counted<'a, T, F: Future<Output = T>>(
    ids: &'a [SandboxId],
    title: &str,
    progress: &Progress,
    call: impl Fn(&'a SandboxId) -> F,
) -> Vec<T> {
    let step = progress.quick_step(title);
    step.set_items(ids.len() as u64);
    let mut results = Vec::with_capacity(ids.len());
    let mut answers = futures_util::stream::iter(ids).map(call).buffered(CONCURRENCY.max(ids.len()));
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
