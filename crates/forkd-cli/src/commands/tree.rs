//! `tree`: the family of snapshots, sandboxes and checkpoints, drawn.

use std::collections::BTreeMap;

use clap::Args;
use forkd_types::rest::{CheckpointInfo, SandboxInfo, SnapshotInfo};
use forkd_types::{ByteSize, SandboxId};
use serde::Serialize;

use super::Context;
use super::checkpoints::{place, size};
use crate::{children, output, units};

/// Arguments of `forkd tree`.
#[derive(Args, Debug)]
pub(crate) struct TreeArgs {
    /// Print the family as JSON
    #[arg(long)]
    json: bool,
}

/// One member of the family and what came from it.
#[derive(Serialize, PartialEq, Eq, Debug)]
struct Member {
    kind: Kind,
    name: String,
    /// Age, memory, pause: what a person wants to know of it.
    about: String,
    children: Vec<Member>,
}

#[derive(Serialize, PartialEq, Eq, Debug, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Snapshot,
    Sandbox,
    Checkpoint,
}

/// What is known of a sandbox besides its listing.
#[derive(Default)]
struct Extra {
    private_bytes: Option<u64>,
    checkpoints: Vec<CheckpointInfo>,
}

impl TreeArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let client = context.client().await?;
        let (snapshots, sandboxes) = (client.snapshots().await?, client.sandboxes().await?);
        let ids: Vec<SandboxId> = sandboxes.iter().map(|sandbox| sandbox.id.clone()).collect();
        let extras = children::for_each(ids, |id| {
            let client = client.clone();
            async move {
                // One that ends meanwhile is drawn with what is known.
                let private_bytes = client.memory(&id).await.ok().map(|memory| memory.private_bytes);
                let checkpoints = client.checkpoints(&id).await.unwrap_or_default();
                (id, Extra { private_bytes, checkpoints })
            }
        });
        let extras: BTreeMap<_, _> = extras.await.into_iter().collect();
        let family = Family { snapshots, sandboxes, extras }.grow();
        if self.json {
            output::json(&family)?;
        } else if family.is_empty() {
            context.progress.say("nothing to draw; `forkd quickstart` makes something");
        } else {
            for member in &family {
                output::line(draw(member).trim_end())?;
            }
        }
        Ok(0)
    }
}

struct Family {
    snapshots: Vec<SnapshotInfo>,
    sandboxes: Vec<SandboxInfo>,
    extras: BTreeMap<SandboxId, Extra>,
}

impl Family {
    /// The roots: what derives from nothing that is still there.
    fn grow(&self) -> Vec<Member> {
        let snapshot_roots = self.snapshots.iter().filter(|snapshot| self.parent_of(snapshot).is_none());
        let mut roots: Vec<Member> = snapshot_roots.map(|snapshot| self.snapshot(snapshot)).collect();
        let orphans = self.sandboxes.iter().filter(|sandbox| {
            self.source_of(sandbox).is_none() && self.snapshots.iter().all(|s| s.tag != sandbox.snapshot_tag)
        });
        roots.extend(orphans.map(|sandbox| self.sandbox(sandbox)));
        roots
    }

    /// What a snapshot hangs from: the sandbox it was taken of, else the snapshot it is a layer over.
    fn parent_of<'a>(&self, snapshot: &'a SnapshotInfo) -> Option<&'a str> {
        let source = snapshot.branched_from.as_deref();
        let source = source.filter(|source| self.sandboxes.iter().any(|sandbox| sandbox.id.as_str() == *source));
        let parent = snapshot.parent_tag.as_ref().map(|parent| parent.as_str());
        source.or(parent.filter(|parent| self.snapshots.iter().any(|other| other.tag.as_str() == *parent)))
    }

    fn source_of<'a>(&self, sandbox: &'a SandboxInfo) -> Option<&'a SandboxId> {
        let source = sandbox.forked_from.as_ref();
        source.filter(|source| self.sandboxes.iter().any(|other| other.id == **source))
    }

    fn snapshots_of(&self, parent: &str) -> impl Iterator<Item = Member> {
        let mine = self.snapshots.iter().filter(move |snapshot| self.parent_of(snapshot) == Some(parent));
        mine.map(|snapshot| self.snapshot(snapshot)).collect::<Vec<_>>().into_iter()
    }

    fn snapshot(&self, snapshot: &SnapshotInfo) -> Member {
        let forked = self
            .sandboxes
            .iter()
            .filter(|sandbox| sandbox.snapshot_tag == snapshot.tag && self.source_of(sandbox).is_none());
        let mut about = vec![units::age(snapshot.created_at_unix)];
        about.extend(snapshot.stored_bytes.map(|bytes| ByteSize(bytes).to_string()));
        about.extend(snapshot.pause_ms.map(|ms| format!("source stood still {ms} ms")));
        about.extend(snapshot.warning.clone());
        let children = self.snapshots_of(snapshot.tag.as_str()).chain(forked.map(|sandbox| self.sandbox(sandbox)));
        let children = children.collect();
        Member { kind: Kind::Snapshot, name: snapshot.tag.to_string(), about: about.join(", "), children }
    }

    fn sandbox(&self, sandbox: &SandboxInfo) -> Member {
        let none = Extra::default();
        let extra = self.extras.get(&sandbox.id).unwrap_or(&none);
        let mut about = vec![units::age(sandbox.created_at_unix)];
        about.extend(extra.private_bytes.map(|bytes| format!("{} private", ByteSize(bytes))));
        about.extend(sandbox.stopped.clone());
        let checkpoints = extra.checkpoints.iter().map(checkpoint);
        let copies = self.sandboxes.iter().filter(|copy| self.source_of(copy) == Some(&sandbox.id));
        let children = checkpoints.chain(self.snapshots_of(sandbox.id.as_str()));
        let children = children.chain(copies.map(|copy| self.sandbox(copy))).collect();
        Member { kind: Kind::Sandbox, name: sandbox.id.to_string(), about: about.join(", "), children }
    }
}

fn checkpoint(info: &CheckpointInfo) -> Member {
    let mut about = vec![units::age(info.created_at_unix)];
    about.extend(size(info).map(|size| format!("{size} in {}", place(info.place))));
    about.push(format!("source stood still {}", units::microseconds(info.pause_us)));
    Member { kind: Kind::Checkpoint, name: info.name.clone(), about: about.join(", "), children: Vec::new() }
}

fn draw(root: &Member) -> String {
    let mut lines = String::new();
    draw_below(root, "", "", &mut lines);
    lines
}

fn draw_below(member: &Member, first: &str, rest: &str, lines: &mut String) {
    let sign = match member.kind {
        Kind::Snapshot => "◆",
        Kind::Sandbox => "●",
        Kind::Checkpoint => "◌",
    };
    lines.push_str(&format!("{first}{sign} {}  {}\n", member.name, member.about));
    for (index, child) in member.children.iter().enumerate() {
        let last = index + 1 == member.children.len();
        let (branch, stem) = if last { ("└─", "  ") } else { ("├─", "│ ") };
        draw_below(child, &format!("{rest}{branch}"), &format!("{rest}{stem}"), lines);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(tag: &str, more: serde_json::Value) -> SnapshotInfo {
        let mut body = serde_json::json!({
            "tag": tag, "dir": "/s", "created_at_unix": 0, "status": "ready", "bootable": true
        });
        body.as_object_mut().expect("object").extend(more.as_object().expect("object").clone());
        serde_json::from_value(body).expect("valid")
    }

    fn sandbox(sequence: u64, tag: &str, from: Option<u64>) -> SandboxInfo {
        serde_json::from_value(serde_json::json!({
            "id": SandboxId::new(7, sequence), "snapshot_tag": tag, "netns": null, "guest_addr": "", "pid": 1,
            "created_at_unix": 0, "memory_limit_mib": null, "has_branched": false, "last_branch_memory_path": null,
            "branch_count": 0, "forked_from": from.map(|from| SandboxId::new(7, from)),
        }))
        .expect("valid")
    }

    #[test]
    fn everything_hangs_from_what_it_came_from() {
        let point = serde_json::json!({"name": "cp-1", "created_at_unix": 0, "pause_us": 5, "place": "disk"});
        let point: CheckpointInfo = serde_json::from_value(point).expect("valid");
        let extra = Extra { private_bytes: None, checkpoints: vec![point] };
        let family = Family {
            snapshots: vec![
                snapshot("base", serde_json::json!({})),
                snapshot("layer", serde_json::json!({"parent_tag": "base"})),
                snapshot("shot", serde_json::json!({"branched_from": "sb-7-0001"})),
            ],
            sandboxes: vec![sandbox(1, "base", None), sandbox(2, "base", Some(1)), sandbox(3, "gone", Some(9))],
            extras: BTreeMap::from([(SandboxId::new(7, 1), extra)]),
        };
        let drawn: String = family.grow().iter().map(draw).collect();
        let names: Vec<&str> = drawn.lines().filter_map(|line| Some(line.rsplit_once("  ")?.0)).collect();
        let expected =
            ["◆ base", "├─◆ layer", "└─● sb-7-0001", "  ├─◌ cp-1", "  ├─◆ shot", "  └─● sb-7-0002", "● sb-7-0003"];
        assert_eq!(names, expected, "{drawn}");
    }
}
