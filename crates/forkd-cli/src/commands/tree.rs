//! `tree`: the family of snapshots, sandboxes and checkpoints, drawn.

use clap::Args;
use forkd_types::ByteSize;
use forkd_types::rest::{CheckpointInfo, FamilyKind, FamilyMember, SandboxInfo, SnapshotInfo};
use serde::Serialize;

use super::Context;
use super::checkpoints::{place, size};
use crate::{output, units};

/// Arguments of `forkd tree`.
#[derive(Args, Debug)]
pub(crate) struct TreeArgs {
    /// Print the family as JSON
    #[arg(long)]
    json: bool,
}

/// One member of the family, in words, and what came from it.
#[derive(Serialize, PartialEq, Eq, Debug)]
struct Member {
    kind: FamilyKind,
    name: String,
    /// What it came from, where it does not hang from that.
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<String>,
    /// Age, memory, pause: what a person wants to know of it.
    about: String,
    children: Vec<Member>,
}

impl TreeArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let family: Vec<Member> = context.client().await?.tree().await?.roots.into_iter().map(Member::of).collect();
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

impl Member {
    fn of(member: FamilyMember) -> Self {
        let FamilyMember { kind, name, from, snapshot, sandbox, private_bytes, checkpoint, children } = member;
        let snapshot = snapshot.iter().flat_map(|info| about_snapshot(info));
        let sandbox = sandbox.iter().flat_map(|info| about_sandbox(info, private_bytes));
        let checkpoint = checkpoint.iter().flat_map(|info| about_checkpoint(info));
        let about: Vec<String> = snapshot.chain(sandbox).chain(checkpoint).collect();
        Self { kind, name, from, about: about.join(", "), children: children.into_iter().map(Self::of).collect() }
    }
}

fn about_snapshot(info: &SnapshotInfo) -> Vec<String> {
    let mut about = vec![units::age(info.created_at_unix)];
    about.extend(info.stored_bytes.map(|bytes| ByteSize(bytes).to_string()));
    about.extend(info.pause_ms.map(|ms| format!("source stood still {ms} ms")));
    about.extend(info.warning.clone());
    about
}

fn about_sandbox(info: &SandboxInfo, private_bytes: Option<u64>) -> Vec<String> {
    let mut about = vec![units::age(info.created_at_unix)];
    about.extend(private_bytes.map(|bytes| format!("{} private", ByteSize(bytes))));
    about.extend(info.stopped.clone());
    about
}

fn about_checkpoint(info: &CheckpointInfo) -> Vec<String> {
    let mut about = vec![units::age(info.created_at_unix)];
    about.extend(size(info).map(|size| format!("{size} in {}", place(info.place))));
    about.push(format!("source stood still {}", units::microseconds(info.pause_us)));
    about
}

fn draw(root: &Member) -> String {
    let mut lines = String::new();
    draw_below(root, "", "", &mut lines);
    lines
}

fn draw_below(member: &Member, first: &str, rest: &str, lines: &mut String) {
    let sign = match member.kind {
        FamilyKind::Snapshot => "◆",
        FamilyKind::Sandbox => "●",
        FamilyKind::Checkpoint => "◌",
    };
    let name = match &member.from {
        Some(from) => format!("{} (from {from})", member.name),
        None => member.name.clone(),
    };
    lines.push_str(&format!("{first}{sign} {name}  {}\n", member.about));
    for (index, child) in member.children.iter().enumerate() {
        let last = index + 1 == member.children.len();
        let (branch, stem) = if last { ("└─", "  ") } else { ("├─", "│ ") };
        draw_below(child, &format!("{rest}{branch}"), &format!("{rest}{stem}"), lines);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_family_is_drawn_as_the_daemon_tells_it() {
        let point = serde_json::json!({
            "kind": "checkpoint", "name": "cp-1", "children": [],
            "checkpoint": {"name": "cp-1", "created_at_unix": 0, "pause_us": 5, "place": "disk", "stored_bytes": 1048576},
        });
        let shot = serde_json::json!({
            "kind": "snapshot", "name": "shot", "children": [],
            "snapshot": {"tag": "shot", "dir": "/s", "created_at_unix": 0, "status": "ready", "bootable": true, "pause_ms": 3},
        });
        let sandbox = serde_json::json!({
            "id": "sb-7-0001", "snapshot_tag": "base", "netns": null, "guest_addr": "", "pid": 1, "created_at_unix": 0,
            "memory_limit_mib": null, "has_branched": true, "last_branch_memory_path": null, "branch_count": 1,
        });
        let root: FamilyMember = serde_json::from_value(serde_json::json!({
            "kind": "sandbox", "name": "sb-7-0001", "sandbox": sandbox, "private_bytes": 2097152,
            "children": [point, shot], "from": "sb-7-0000",
        }))
        .expect("what the daemon tells");
        let drawn = draw(&Member::of(root));
        let names: Vec<&str> = drawn.lines().filter_map(|line| Some(line.rsplit_once("  ")?.0)).collect();
        assert_eq!(names, ["● sb-7-0001 (from sb-7-0000)", "├─◌ cp-1", "└─◆ shot"], "{drawn}");
        for said in ["2 MiB private", "1 MiB in disk, source stood still 5 µs", "source stood still 3 ms"] {
            assert!(drawn.contains(said), "{said} is not in\n{drawn}");
        }
    }
}
