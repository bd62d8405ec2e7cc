//! The family of snapshots, sandboxes and checkpoints: each under what it came from.

use std::collections::HashMap;

use forkd_types::SandboxId;
use forkd_types::rest::{CheckpointInfo, Family, FamilyMember, SandboxInfo, SnapshotInfo};

use crate::error::NodeResult;
use crate::host::blocking;
use crate::memory;
use crate::node::Node;

impl Node {
    /// Everything there is, each under what it came from.
    pub async fn family(&self) -> NodeResult<Family> {
        let snapshots = self.snapshots().await?;
        let known = self.roster.all();
        let pids: Vec<_> = known
            .iter()
            .filter_map(|sandbox| Some((sandbox.id.clone(), sandbox.machine()?.process.key().pid)))
            .collect();
        let mut extras: HashMap<SandboxId, Extra> = HashMap::new();
        for sandbox in &known {
            let checkpoints = self.checkpoints.list(sandbox).await;
            extras.insert(sandbox.id.clone(), Extra { private_bytes: None, checkpoints });
        }
        // One that ends meanwhile is drawn with what is known.
        let measure = move || pids.into_iter().map(|(id, pid)| (id, memory::of_process(pid).ok())).collect::<Vec<_>>();
        for (id, sizes) in blocking("reading the sizes of monitors", measure).await? {
            extras.entry(id).or_default().private_bytes = sizes.map(|sizes| sizes.private);
        }
        let sandboxes = known.iter().map(|sandbox| sandbox.info()).collect();
        Ok(Family { roots: Members { snapshots, sandboxes, extras }.grow() })
    }
}

/// What is told of a sandbox besides its listing.
#[derive(Default)]
struct Extra {
    private_bytes: Option<u64>,
    checkpoints: Vec<CheckpointInfo>,
}

struct Members {
    snapshots: Vec<SnapshotInfo>,
    sandboxes: Vec<SandboxInfo>,
    extras: HashMap<SandboxId, Extra>,
}

impl Members {
    /// The roots: what derives from nothing that is still there.
    fn grow(&self) -> Vec<FamilyMember> {
        let snapshot_roots = self.snapshots.iter().filter(|snapshot| self.parent_of(snapshot).is_none());
        let mut roots: Vec<FamilyMember> = snapshot_roots.map(|snapshot| self.snapshot(snapshot)).collect();
        let orphans = self.sandboxes.iter().filter(|sandbox| {
            self.source_of(sandbox).is_none() && self.snapshots.iter().all(|s| s.tag != sandbox.snapshot_tag)
        });
        roots.extend(orphans.map(|sandbox| self.sandbox(sandbox)));
        roots
    }

    /// What a snapshot hangs from: the sandbox it was taken of, else the snapshot it is a layer over.
    fn parent_of<'a>(&self, snapshot: &'a SnapshotInfo) -> Option<&'a str> {
        let source = snapshot.branched_from.as_deref();
        let source = source.filter(|source| {
            // Not one that came from this very snapshot, as that of a workspace does whose state was replaced.
            self.sandboxes.iter().any(|sandbox| sandbox.id.as_str() == *source && sandbox.snapshot_tag != snapshot.tag)
        });
        let parent = snapshot.parent_tag.as_ref().map(|parent| parent.as_str());
        source.or(parent.filter(|parent| self.snapshots.iter().any(|other| other.tag.as_str() == *parent)))
    }

    fn source_of<'a>(&self, sandbox: &'a SandboxInfo) -> Option<&'a SandboxId> {
        let source = sandbox.forked_from.as_ref();
        source.filter(|source| self.sandboxes.iter().any(|other| other.id == **source))
    }

    fn snapshots_of(&self, parent: &str) -> Vec<FamilyMember> {
        let mine = self.snapshots.iter().filter(|snapshot| self.parent_of(snapshot) == Some(parent));
        mine.map(|snapshot| self.snapshot(snapshot)).collect()
    }

    fn snapshot(&self, snapshot: &SnapshotInfo) -> FamilyMember {
        let mut children = self.snapshots_of(snapshot.tag.as_str());
        let forked = self.sandboxes.iter().filter(|sandbox| sandbox.snapshot_tag == snapshot.tag);
        let forked = forked.filter(|sandbox| self.source_of(sandbox).is_none());
        children.extend(forked.map(|sandbox| self.sandbox(sandbox)));
        FamilyMember::snapshot(snapshot.clone(), children)
    }

    fn sandbox(&self, sandbox: &SandboxInfo) -> FamilyMember {
        let none = Extra::default();
        let extra = self.extras.get(&sandbox.id).unwrap_or(&none);
        let mut children: Vec<_> = extra.checkpoints.iter().cloned().map(FamilyMember::checkpoint).collect();
        children.extend(self.snapshots_of(sandbox.id.as_str()));
        let copies = self.sandboxes.iter().filter(|copy| self.source_of(copy) == Some(&sandbox.id));
        children.extend(copies.map(|copy| self.sandbox(copy)));
        FamilyMember::sandbox(sandbox.clone(), extra.private_bytes, children)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn snapshot(tag: &str, more: serde_json::Value) -> SnapshotInfo {
        let mut body = json!({ "tag": tag, "dir": "/s", "created_at_unix": 0, "status": "ready", "bootable": true });
        body.as_object_mut().expect("object").extend(more.as_object().expect("object").clone());
        serde_json::from_value(body).expect("valid")
    }

    fn sandbox(sequence: u64, tag: &str, from: Option<u64>) -> SandboxInfo {
        serde_json::from_value(json!({
            "id": SandboxId::new(7, sequence), "snapshot_tag": tag, "netns": null, "guest_addr": "", "pid": 1,
            "created_at_unix": 0, "memory_limit_mib": null, "has_branched": false, "last_branch_memory_path": null,
            "branch_count": 0, "forked_from": from.map(|from| SandboxId::new(7, from)),
        }))
        .expect("valid")
    }

    fn outline(members: &[FamilyMember], depth: usize, lines: &mut Vec<String>) {
        for member in members {
            lines.push(format!("{}{}", "  ".repeat(depth), member.name));
            outline(&member.children, depth + 1, lines);
        }
    }

    fn drawn(members: &Members) -> Vec<String> {
        let mut lines = Vec::new();
        outline(&members.grow(), 0, &mut lines);
        lines
    }

    #[test]
    fn everything_hangs_from_what_it_came_from() {
        let point = json!({ "name": "cp-1", "created_at_unix": 0, "pause_us": 5, "place": "disk" });
        let point: CheckpointInfo = serde_json::from_value(point).expect("valid");
        let members = Members {
            snapshots: vec![
                snapshot("base", json!({})),
                snapshot("layer", json!({"parent_tag": "base"})),
                snapshot("shot", json!({"branched_from": "sb-7-0001"})),
            ],
            sandboxes: vec![sandbox(1, "base", None), sandbox(2, "base", Some(1)), sandbox(3, "gone", Some(9))],
            extras: HashMap::from([(SandboxId::new(7, 1), Extra { private_bytes: None, checkpoints: vec![point] })]),
        };
        let expected = ["base", "  layer", "  sb-7-0001", "    cp-1", "    shot", "    sb-7-0002", "sb-7-0003"];
        assert_eq!(drawn(&members), expected);
    }

    #[test]
    fn a_snapshot_that_was_replaced_by_one_of_its_own_child_is_drawn_once() {
        let members = Members {
            snapshots: vec![snapshot("state", json!({"branched_from": "sb-7-0001"}))],
            sandboxes: vec![sandbox(1, "state", None)],
            extras: HashMap::new(),
        };
        assert_eq!(drawn(&members), ["state", "  sb-7-0001"]);
    }
}
