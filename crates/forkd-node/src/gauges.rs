//! What `/metrics` and `/readyz` tell of a node.

use std::io::Write;

use forkd_store::Store;
use forkd_types::{StageTimings, Tag};

use crate::error::{NodeError, NodeResult};
use crate::memory;

/// Numbers that are cheap to tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NodeGauges {
    /// Published snapshots.
    pub snapshots: usize,
    /// Sandboxes that run.
    pub sandboxes: usize,
    /// Branches under way, also those that go on after their request was answered.
    pub branches_in_flight: usize,
    /// The most of them.
    pub branch_cap: usize,
}

/// A warm zygote and what it costs the host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ZygoteGauge {
    /// Its snapshot.
    pub tag: Tag,
    /// Whether its memory is in reserved huge pages.
    pub huge_pages: bool,
    /// Pages that it alone has.
    pub private_bytes: u64,
    /// Page tables.
    pub page_table_bytes: u64,
}

/// A warm zygote and its process.
pub(crate) struct WarmZygote {
    pub(crate) tag: Tag,
    pub(crate) huge_pages: bool,
    pub(crate) pid: i32,
}

impl WarmZygote {
    /// With its sizes, unless it has just ended.
    pub(crate) fn measure(self) -> Option<ZygoteGauge> {
        let own = memory::of_process(self.pid).ok()?;
        let Self { tag, huge_pages, .. } = self;
        Some(ZygoteGauge { tag, huge_pages, private_bytes: own.private, page_table_bytes: own.page_tables })
    }
}

/// Records how long a branch took, stage by stage.
pub(crate) fn observe_branch(pause_us: u64, stages: &StageTimings) {
    metrics::histogram!("forkd_branch_pause_seconds").record(pause_us as f64 / 1e6);
    for stage in &stages.0 {
        metrics::histogram!("forkd_branch_stage_seconds", "stage" => stage.name.clone()).record(stage.us as f64 / 1e6);
    }
}

/// Writes a file that vanishes into the store.
pub(crate) fn try_to_write(store: &Store) -> NodeResult<()> {
    let mut probe = store.stage_blob()?;
    let written = probe.write_all(&[1; 4096]).and_then(|()| probe.flush());
    written.map_err(NodeError::io(format!("write to the store {}", store.root().display())))
}
