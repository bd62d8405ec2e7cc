//! What each sandbox and zygote costs the host.
//!
//! Asking a thousand monitors for their pages takes a while, so a scrape never does all of it: each look lasts at
//! most [`BUDGET`], goes on where the one before ended, and is shared by scrapes that come close together. A sandbox
//! whose turn has not come shows what was seen last, or nothing yet.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use forkd_node::{Node, ZygoteGauge};
use forkd_types::rest::{SandboxInfo, SandboxMemory};
use forkd_types::{SandboxId, Tag};

/// How long one look may take.
const BUDGET: Duration = Duration::from_millis(500);

/// How long one sandbox may take to answer.
const EACH: Duration = Duration::from_millis(200);

/// How long what was seen is good enough.
const FRESH: Duration = Duration::from_secs(3);

/// The state of looking. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct Survey {
    seen: Arc<RwLock<Seen>>,
    /// Held by the one who looks.
    turn: Arc<tokio::sync::Mutex<Progress>>,
}

/// What was seen.
#[derive(Clone, Default, Debug)]
pub(crate) struct Seen {
    sandboxes: BTreeMap<SandboxId, (Tag, SandboxMemory)>,
    zygotes: Vec<ZygoteGauge>,
}

#[derive(Default)]
struct Progress {
    /// When the last look ended.
    ended: Option<Instant>,
    /// The last sandbox that was asked.
    last: Option<SandboxId>,
}

impl Survey {
    /// What is known, after a look if that is due.
    pub(crate) async fn look(&self, node: &Node) -> Seen {
        let mut progress = self.turn.lock().await;
        if progress.ended.is_none_or(|ended| ended.elapsed() >= FRESH) {
            self.go_on(node, &mut progress).await;
            progress.ended = Some(Instant::now());
        }
        drop(progress);
        self.seen.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn go_on(&self, node: &Node, progress: &mut Progress) {
        let until = Instant::now() + BUDGET;
        let zygotes = tokio::time::timeout(EACH, node.zygotes()).await;
        let running: Vec<_> = node.sandboxes().into_iter().filter(|sandbox| sandbox.stopped.is_none()).collect();
        self.update(|seen| {
            if let Ok(Ok(mut zygotes)) = zygotes {
                zygotes.sort_by(|one, other| (&one.tag, one.huge_pages).cmp(&(&other.tag, other.huge_pages)));
                seen.zygotes = zygotes;
            }
            let there: BTreeSet<_> = running.iter().map(|sandbox| &sandbox.id).collect();
            seen.sandboxes.retain(|id, _| there.contains(id));
        });
        for sandbox in in_turn(running, progress.last.as_ref()) {
            if Instant::now() >= until {
                return;
            }
            let SandboxInfo { id, snapshot_tag, .. } = sandbox;
            progress.last = Some(id.clone());
            if let Ok(Ok(memory)) = tokio::time::timeout(EACH, node.memory(&id)).await {
                self.update(|seen| drop(seen.sandboxes.insert(id, (snapshot_tag, memory))));
            }
        }
    }

    fn update(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut self.seen.write().unwrap_or_else(PoisonError::into_inner));
    }
}

/// `sandboxes`, beginning with the one after `last`.
fn in_turn(mut sandboxes: Vec<SandboxInfo>, last: Option<&SandboxId>) -> Vec<SandboxInfo> {
    sandboxes.sort_by(|one, other| one.id.cmp(&other.id));
    let begin = last.map_or(0, |last| sandboxes.partition_point(|sandbox| sandbox.id <= *last));
    sandboxes.rotate_left(begin);
    sandboxes
}

impl Seen {
    /// Appends it in the text format. Ids and tags need no escapes.
    pub(crate) fn render(&self, text: &mut String) {
        type Value = fn(&SandboxMemory) -> u64;
        let sizes: [(&str, &str, Value); 4] = [
            ("private", "Pages that only this sandbox has.", |memory| memory.private_bytes),
            ("page_table", "Page tables of its monitor.", |memory| memory.page_table_bytes),
            ("guest_dirty", "Guest memory that differs from its snapshot.", |memory| memory.guest_dirty_bytes),
            ("pss", "Its share of all the pages it has.", |memory| memory.pss_bytes),
        ];
        for (name, help, value) in sizes {
            head(text, &format!("forkd_sandbox_{name}_bytes"), help);
            for (id, (tag, memory)) in &self.sandboxes {
                let value = value(memory);
                line(text, format_args!("forkd_sandbox_{name}_bytes{{sandbox=\"{id}\",snapshot=\"{tag}\"}} {value}"));
            }
        }
        head(text, "forkd_zygotes", "Snapshots that are held warm, ready to fork.");
        line(text, format_args!("forkd_zygotes {}", self.zygotes.len()));
        type Part = fn(&ZygoteGauge) -> u64;
        let sizes: [(&str, &str, Part); 2] = [
            ("private", "Pages that only this zygote has.", |zygote| zygote.private_bytes),
            ("page_table", "Page tables of its monitor.", |zygote| zygote.page_table_bytes),
        ];
        for (name, help, value) in sizes {
            head(text, &format!("forkd_zygote_{name}_bytes"), help);
            for zygote in &self.zygotes {
                let (ZygoteGauge { tag, huge_pages, .. }, value) = (zygote, value(zygote));
                line(
                    text,
                    format_args!("forkd_zygote_{name}_bytes{{snapshot=\"{tag}\",huge_pages=\"{huge_pages}\"}} {value}"),
                );
            }
        }
    }
}

fn head(text: &mut String, name: &str, help: &str) {
    line(text, format_args!("# HELP {name} {help}\n# TYPE {name} gauge"));
}

fn line(text: &mut String, what: std::fmt::Arguments<'_>) {
    // Writing to a string does not fail.
    let _ = writeln!(text, "{what}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox(sequence: u64) -> SandboxInfo {
        let id = SandboxId::new(1, sequence);
        serde_json::from_value(serde_json::json!({
            "id": id, "snapshot_tag": "py", "netns": null, "guest_addr": "10.42.0.2:8888", "created_at_unix": 1,
            "pid": 1, "memory_limit_mib": null, "has_branched": false, "last_branch_memory_path": null,
            "branch_count": 0,
        }))
        .expect("what an older daemon would send")
    }

    #[test]
    fn each_look_goes_on_after_the_last_sandbox_and_then_from_the_start() {
        let order = |last: Option<u64>| {
            let last = last.map(|sequence| SandboxId::new(1, sequence));
            let sandboxes = in_turn(vec![sandbox(3), sandbox(1), sandbox(2)], last.as_ref());
            sandboxes.iter().map(|sandbox| sandbox.id.clone()).collect::<Vec<_>>()
        };
        let ids = |sequences: [u64; 3]| sequences.map(|sequence| SandboxId::new(1, sequence)).to_vec();
        assert_eq!(order(None), ids([1, 2, 3]));
        assert_eq!(order(Some(1)), ids([2, 3, 1]));
        assert_eq!(order(Some(3)), ids([1, 2, 3]));
        assert_eq!(order(Some(0)), ids([1, 2, 3]), "one that is gone is no obstacle");
    }

    #[test]
    fn gauges_are_labelled_with_sandbox_and_snapshot() {
        let memory = SandboxMemory { pss_bytes: 4, private_bytes: 1, page_table_bytes: 2, guest_dirty_bytes: 3 };
        let tag: Tag = "py".parse().expect("legal tag");
        let zygotes = vec![ZygoteGauge { tag: tag.clone(), huge_pages: true, private_bytes: 5, page_table_bytes: 6 }];
        let seen = Seen { sandboxes: BTreeMap::from([(SandboxId::new(1, 2), (tag, memory))]), zygotes };
        let mut text = String::new();
        seen.render(&mut text);
        for line in [
            "# TYPE forkd_sandbox_private_bytes gauge\n",
            "forkd_sandbox_guest_dirty_bytes{sandbox=\"sb-1-0002\",snapshot=\"py\"} 3\n",
            "forkd_zygotes 1\n",
            "forkd_zygote_page_table_bytes{snapshot=\"py\",huge_pages=\"true\"} 6\n",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
