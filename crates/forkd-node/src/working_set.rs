//! Which of a snapshot's pages a copy needs to come up.
//!
//! The first copy of a snapshot on this host is asked for its pages as soon as its agent has answered. From
//! then on every zygote of the snapshot has them read ahead when it starts, in a few long reads, instead of
//! leaving its first copies to wait for the disk page by page.
//!
//! The record is kept in the state database under the digest of the snapshot's description: beside the
//! snapshot, which never changes, and of this host, whose disk it is about. Nothing depends on it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use forkd_proto::monitor::Command;
use forkd_types::{Digest, PageRun, Tag};

use crate::control::{Control, expect_event};
use crate::host::Host;

/// Pages that are read along rather than begin another read: 64 KiB, what the kernel maps around a page
/// that is touched.
const GAP: u64 = 16;

/// What is known of the working set of one snapshot.
#[derive(Debug)]
pub(crate) struct WorkingSet {
    snapshot: Digest,
    tag: Tag,
    /// What is to be read ahead; empty until it is recorded.
    pub(crate) runs: Vec<PageRun>,
    /// Whether a copy is still to be asked.
    wanted: AtomicBool,
}

impl WorkingSet {
    /// One that is neither known nor asked for: of memory that no file backs.
    pub(crate) fn unused(snapshot: Digest, tag: Tag) -> Self {
        Self { snapshot, tag, runs: Vec::new(), wanted: AtomicBool::new(false) }
    }

    /// What was recorded for the snapshot called `tag`.
    pub(crate) async fn recorded(host: &Host, snapshot: Digest, tag: Tag) -> Self {
        let recorded = host.database.working_set(snapshot).await.unwrap_or_else(|error| {
            tracing::warn!(%tag, %error, "goes without its working set");
            None
        });
        let runs: Option<Vec<PageRun>> = recorded.and_then(|text| serde_json::from_str(&text).ok());
        let wanted = AtomicBool::new(runs.is_none());
        Self { snapshot, tag, runs: runs.unwrap_or_default(), wanted }
    }

    /// Asks a copy that has just come up, unless another was asked before; does not wait.
    pub(crate) fn learn(&self, host: &Arc<Host>, control: Arc<Control>) {
        if !self.wanted.swap(false, Ordering::Relaxed) {
            return;
        }
        let (host, snapshot, tag) = (Arc::clone(host), self.snapshot, self.tag.clone());
        tokio::spawn(async move {
            let event = control.request(&Command::Pages, Vec::new()).wait().await;
            match event.and_then(|event| expect_event!(tag, event, Pages { present })) {
                Ok(present) => {
                    let runs = join(&present);
                    tracing::info!(%tag, pages = PageRun::total(&runs).0, runs = runs.len(), "noted the working set");
                    let text = serde_json::to_string(&runs).expect("runs of numbers are JSON");
                    host.database.note_working_set(snapshot, tag, text);
                }
                // The next zygote asks again.
                Err(error) => tracing::debug!(%tag, %error, "a copy went before it could be asked for its pages"),
            }
        });
    }
}

/// Joins ascending runs whose gaps are not worth a read of their own.
fn join(runs: &[PageRun]) -> Vec<PageRun> {
    let mut joined: Vec<PageRun> = Vec::new();
    for run in runs {
        match joined.last_mut() {
            Some(last) if run.first - last.end() <= GAP => last.count = run.end() - last.first,
            _ => joined.push(*run),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_types::PageCount;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn joined_runs_cover_all_pages_and_lie_far_apart(pages in proptest::collection::btree_set(0u64..2000, 0..100)) {
            let mut runs = Vec::new();
            pages.iter().for_each(|&page| PageRun::push(&mut runs, page));
            let joined = join(&runs);
            prop_assert_eq!(PageRun::check(&joined, PageCount(2000)), Ok(()));
            prop_assert!(pages.iter().all(|page| joined.iter().any(|run| (run.first..run.end()).contains(page))));
            prop_assert!(joined.windows(2).all(|pair| pair[1].first - pair[0].end() > GAP));
            let ends = |run: &PageRun| pages.contains(&run.first) && pages.contains(&(run.end() - 1));
            prop_assert!(joined.iter().all(ends), "something is read at an end that nobody needs");
        }
    }
}
