//! The family of snapshots, sandboxes and checkpoints: each under what it came from.

use std::collections::{HashMap, VecDeque};

use forkd_types::SandboxId;
use forkd_types::rest::{CheckpointInfo, Family, FamilyMember, SandboxInfo, SnapshotInfo, TREE_DEPTH};

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
        let members = Members { snapshots, sandboxes, extras };
        Ok(Family { roots: blocking("drawing the family", move || members.grow()).await? })
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

/// Members by number, snapshots before sandboxes, and what hangs from which.
struct Index {
    parents: Vec<Option<usize>>,
    /// In the order of numbers, and so snapshots first.
    children: Vec<Vec<usize>>,
}

/// Where one member is drawn.
#[derive(Clone, Copy)]
struct Place {
    member: usize,
    /// How many are above it in its tree.
    depth: usize,
}

impl Members {
    /// What derives from nothing that is still there, then what hangs too deep. Takes time in proportion to the number
    /// of members, and never goes down by recursion.
    fn grow(self) -> Vec<FamilyMember> {
        let index = self.index();
        let places = index.places();
        let (roots, from) = self.hang(&index, &places);
        let named = |(mut root, parent): (FamilyMember, Option<usize>)| {
            root.from = parent.map(|parent| from[parent].clone());
            root
        };
        roots.into_iter().map(named).collect()
    }

    fn index(&self) -> Index {
        let first_sandbox = self.snapshots.len();
        let tags: HashMap<&str, usize> =
            self.snapshots.iter().enumerate().map(|(number, snapshot)| (snapshot.tag.as_str(), number)).collect();
        let ids: HashMap<&str, usize> = self
            .sandboxes
            .iter()
            .enumerate()
            .map(|(number, sandbox)| (sandbox.id.as_str(), first_sandbox + number))
            .collect();
        // A snapshot hangs from the sandbox it was taken of, else from the snapshot it is a layer over.
        let of_snapshot = |snapshot: &SnapshotInfo| {
            let source = snapshot.branched_from.as_deref().and_then(|source| ids.get(source).copied());
            // Not one that came from this very snapshot, as that of a workspace does whose state was replaced.
            let source = source.filter(|source| self.sandboxes[source - first_sandbox].snapshot_tag != snapshot.tag);
            source.or_else(|| tags.get(snapshot.parent_tag.as_ref()?.as_str()).copied())
        };
        // A sandbox hangs from the one it is a copy of, else from its snapshot.
        let of_sandbox = |sandbox: &SandboxInfo| {
            let source = sandbox.forked_from.as_ref().and_then(|source| ids.get(source.as_str()).copied());
            source.or_else(|| tags.get(sandbox.snapshot_tag.as_str()).copied())
        };
        let parents: Vec<Option<usize>> =
            self.snapshots.iter().map(of_snapshot).chain(self.sandboxes.iter().map(of_sandbox)).collect();
        let mut children = vec![Vec::new(); parents.len()];
        for (number, parent) in parents.iter().enumerate() {
            if let Some(parent) = *parent {
                children[parent].push(number);
            }
        }
        Index { parents, children }
    }

    /// Makes the members and hangs each from its parent, those at depth 0 nowhere: they are given back in the order of
    /// `places`, with the number of a parent they were cut off from; and the names of all.
    fn hang(self, index: &Index, places: &[Place]) -> (Vec<(FamilyMember, Option<usize>)>, Vec<String>) {
        let snapshots = self.snapshots.into_iter().map(|snapshot| FamilyMember::snapshot(snapshot, Vec::new()));
        let mut extras = self.extras;
        let sandboxes = self.sandboxes.into_iter().map(|sandbox| {
            let Extra { private_bytes, checkpoints } = extras.remove(&sandbox.id).unwrap_or_default();
            let checkpoints = checkpoints.into_iter().map(FamilyMember::checkpoint).collect();
            FamilyMember::sandbox(sandbox, private_bytes, checkpoints)
        });
        let mut members: Vec<Option<FamilyMember>> = snapshots.chain(sandboxes).map(Some).collect();
        let names = members.iter().flatten().map(|member| member.name.clone()).collect();
        // Parents come before what hangs from them, so that from behind each member is whole when it is hung up; its
        // own children lie in reverse until then.
        let mut below: Vec<Vec<FamilyMember>> = members.iter().map(|_| Vec::new()).collect();
        let mut roots = Vec::new();
        for place in places.iter().rev() {
            let mut member = members[place.member].take().expect("each member has one place");
            member.children.extend(std::mem::take(&mut below[place.member]).into_iter().rev());
            match index.parents[place.member] {
                Some(parent) if place.depth > 0 => below[parent].push(member),
                cut_off_from => roots.push((member, cut_off_from)),
            }
        }
        roots.reverse();
        (roots, names)
    }
}

impl Index {
    /// Each member's place, parents before what hangs from them. Too deep trees are cut, and circles: a snapshot that
    /// was made anew under the same name may derive from what derives from it.
    fn places(&self) -> Vec<Place> {
        let mut places = Vec::with_capacity(self.parents.len());
        let mut placed = vec![false; self.parents.len()];
        let roots = (0..self.parents.len()).filter(|member| self.parents[*member].is_none());
        let mut waiting: VecDeque<usize> = roots.collect();
        // Whoever has no place when all trees are drawn is in a circle, or hangs from one.
        let mut circles = 0..self.parents.len();
        while let Some(root) = waiting.pop_front().or_else(|| circles.find(|member| !placed[*member])) {
            let mut pending = vec![Place { member: root, depth: 0 }];
            while let Some(place) = pending.pop() {
                if std::mem::replace(&mut placed[place.member], true) {
                    continue;
                }
                places.push(place);
                let depth = place.depth + 1;
                if depth == TREE_DEPTH {
                    waiting.extend(&self.children[place.member]);
                } else {
                    // The first is taken first.
                    let below = self.children[place.member].iter().rev();
                    pending.extend(
                        below.filter(|member| !placed[**member]).map(|member| Place { member: *member, depth }),
                    );
                }
            }
        }
        places
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
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

    fn drawn(members: Members) -> Vec<String> {
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
        assert_eq!(drawn(members), expected);
    }

    #[test]
    fn a_snapshot_that_was_replaced_by_one_of_its_own_child_is_drawn_once() {
        let members = Members {
            snapshots: vec![snapshot("state", json!({"branched_from": "sb-7-0001"}))],
            sandboxes: vec![sandbox(1, "state", None)],
            extras: HashMap::new(),
        };
        assert_eq!(drawn(members), ["state", "  sb-7-0001"]);
    }

    #[test]
    fn a_chain_of_thousands_is_cut_where_readers_would_refuse_it() {
        let count = 10_000;
        let mut sandboxes: Vec<_> = (1..=count).map(|n| sandbox(n, "base", (n > 1).then_some(n - 1))).collect();
        // In whatever order they are listed.
        sandboxes.reverse();
        let members = Members { snapshots: vec![snapshot("base", json!({}))], sandboxes, extras: HashMap::new() };
        let begun = std::time::Instant::now();
        let family = Family { roots: members.grow() };
        assert!(begun.elapsed().as_secs() < 5, "{:?}", begun.elapsed());
        assert_eq!(family.roots.len(), (count as usize + 1).div_ceil(TREE_DEPTH));
        for (index, root) in family.roots.iter().enumerate() {
            // The base counts too.
            let before = SandboxId::new(7, (index * TREE_DEPTH) as u64 - u64::from(index > 0)).to_string();
            assert_eq!(root.from, (index > 0).then_some(before));
        }
        let text = serde_json::to_string(&family).expect("plain data");
        assert_eq!(serde_json::from_str::<Family>(&text).expect("not nested too deeply"), family);
    }

    #[test]
    fn thousands_side_by_side_keep_their_order() {
        let snapshots: Vec<_> =
            (0..2_000).map(|n| snapshot(&format!("layer-{n}"), json!({"parent_tag": "base"}))).collect();
        let snapshots = std::iter::once(snapshot("base", json!({}))).chain(snapshots).collect();
        let sandboxes = (0..20_000).map(|n| sandbox(n, "base", None)).collect();
        let begun = std::time::Instant::now();
        let lines = drawn(Members { snapshots, sandboxes, extras: HashMap::new() });
        assert!(begun.elapsed().as_secs() < 5, "{:?}", begun.elapsed());
        assert_eq!(lines.len(), 22_001);
        assert_eq!((lines[1].as_str(), lines[2_000].as_str()), ("  layer-0", "  layer-1999"));
        assert_eq!((lines[2_001].as_str(), lines[2_002].as_str()), ("  sb-7-0000", "  sb-7-0001"));
    }

    #[test]
    fn a_circle_is_opened_somewhere() {
        let snapshots = vec![
            snapshot("state", json!({"branched_from": "sb-7-0001"})),
            snapshot("layer", json!({"parent_tag": "state"})),
        ];
        let members = Members { snapshots, sandboxes: vec![sandbox(1, "layer", None)], extras: HashMap::new() };
        assert_eq!(drawn(members), ["state", "  layer", "    sb-7-0001"]);
    }

    proptest! {
        #[test]
        fn every_member_is_drawn_once_below_what_it_came_from(
            parents in proptest::collection::vec((any::<bool>(), 0usize..400), 1..300),
        ) {
            let count = parents.len();
            let parents = parents.iter().map(|(has, parent)| Some(*parent).filter(|parent| *has && *parent < count));
            let parents: Vec<Option<usize>> = parents.collect();
            let mut children = vec![Vec::new(); count];
            for (number, parent) in parents.iter().enumerate() {
                if let Some(parent) = parent {
                    children[*parent].push(number);
                }
            }
            let index = Index { parents, children };
            let places = index.places();
            let mut depths = vec![None; count];
            for place in &places {
                prop_assert!(depths[place.member].is_none(), "{} is drawn twice", place.member);
                prop_assert!(place.depth < TREE_DEPTH);
                depths[place.member] = Some(place.depth);
                if place.depth > 0 {
                    let parent = index.parents[place.member].expect("what hangs has a parent");
                    prop_assert_eq!(depths[parent], Some(place.depth - 1));
                }
            }
            prop_assert_eq!(places.len(), count);
        }
    }
}
