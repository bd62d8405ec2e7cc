//! The JSON bodies of the REST API, `/v1`.
//!
//! Field names, order, presence and defaults are what existing clients rely on. Additions are
//! optional fields, which those clients ignore. Times are Unix seconds; sizes are bytes unless the
//! name says otherwise; durations say their unit in the name.

use serde::{Deserialize, Serialize};

use crate::{SandboxId, StageTimings, Tag};

/// The version of the API that `GET /version` reports.
pub const API_VERSION: &str = "v1";

/// The guest agent's address as every sandbox reports it; it is the same inside each network
/// namespace.
pub const GUEST_ADDR: &str = "10.42.0.2:8888";

/// The most children that one spawn may ask for.
pub const SPAWN_LIMIT: u32 = 1000;

/// Body of every error answer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What went wrong, on which object, and what would be right.
    pub error: String,
    /// Stable machine-readable code, for example `snapshot_not_found`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
}

/// `GET /healthz`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Health {
    /// Always true when the daemon answers at all.
    pub ok: bool,
}

/// `GET /version`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Version {
    /// The daemon's version.
    pub version: String,
    /// [`API_VERSION`].
    pub api: String,
}

/// `POST /v1/sandboxes`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SpawnRequest {
    /// The snapshot to fork.
    pub snapshot_tag: String,
    /// How many children, 1 to [`SPAWN_LIMIT`].
    #[serde(default = "one")]
    pub n: u32,
    /// Give each child its own network namespace.
    #[serde(default)]
    pub per_child_netns: bool,
    /// Memory limit of each child's monitor.
    #[serde(default)]
    pub memory_limit_mib: Option<u64>,
    /// Accepted for existing clients; children need no warming.
    #[serde(default)]
    pub prewarm: bool,
    /// Accepted for existing clients; every child can be branched while it runs.
    #[serde(default)]
    pub live_fork: bool,
    /// Back the zygote's memory with huge pages.
    #[serde(default)]
    pub hugepages: bool,
    /// Take a checkpoint of a child before each of these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_checkpoint: Option<AutoCheckpoint>,
}

/// What an automatic checkpoint is taken before.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AutoCheckpoint {
    /// Every program and every evaluation that a client asks for.
    Exec,
}

impl SpawnRequest {
    /// A request for `n` children of `tag`, with defaults for the rest.
    pub fn of(tag: &Tag, n: u32) -> Self {
        let (per_child_netns, prewarm, live_fork, hugepages) = (false, false, false, false);
        let (memory_limit_mib, auto_checkpoint) = (None, None);
        let snapshot_tag = tag.to_string();
        Self { snapshot_tag, n, per_child_netns, memory_limit_mib, prewarm, live_fork, hugepages, auto_checkpoint }
    }
}

fn one() -> u32 {
    1
}

/// `POST /v1/sandboxes/:id/fork`: copies of a running sandbox, all of one instant. Answered as a spawn is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ForkRequest {
    /// How many copies, 1 to [`SPAWN_LIMIT`].
    #[serde(default = "one")]
    pub n: u32,
    /// Memory limit of each copy's monitor.
    #[serde(default)]
    pub memory_limit_mib: Option<u64>,
}

/// How `branch` was once asked to copy memory. The source stands still equally little in all of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BranchMode {
    /// The default.
    Full,
    /// Also reports what changed, and may record its parent.
    Diff,
    /// May be answered before the copy is written.
    Live,
}

/// `POST /v1/sandboxes/:id/branch`: a snapshot of a running sandbox.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BranchRequest {
    /// Name of the snapshot; generated when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// How the copy is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<BranchMode>,
    /// The older way to say `mode: diff`.
    #[serde(default)]
    pub diff: bool,
    /// The older way to say `mode: live`.
    #[serde(default)]
    pub live: bool,
    /// Report what changed as `mode: diff` does.
    #[serde(default)]
    pub measure_diff: bool,
    /// Answer only when the snapshot is ready; false needs `mode: live`.
    #[serde(default = "yes")]
    pub wait: bool,
    /// Keep the snapshot as a layer over this one, which must be the sandbox's own snapshot. Without it the
    /// snapshot depends on no other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_tag: Option<String>,
    /// Flush the guest's file systems first, so that the disk is clean and not only as after a power cut.
    #[serde(default)]
    pub sync: bool,
    /// Replace a snapshot of the same tag, in one step when the new one is whole.
    #[serde(default)]
    pub replace: bool,
}

impl Default for BranchRequest {
    fn default() -> Self {
        let (diff, live, measure_diff, sync, replace) = (false, false, false, false, false);
        Self { tag: None, mode: None, diff, live, measure_diff, wait: true, parent_tag: None, sync, replace }
    }
}

fn yes() -> bool {
    true
}

/// `POST /v1/snapshots/:tag/compact`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CompactRequest {
    /// Name of the snapshot to make: an equal without a parent, in one layer.
    pub to: String,
}

/// `POST /v1/sandboxes/:id/checkpoints`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct CheckpointRequest {
    /// Its name; `cp-N` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Put it on disk at once, where it outlives the host's memory.
    #[serde(default)]
    pub disk: bool,
}

/// Where a checkpoint is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckpointPlace {
    /// In a frozen copy of the machine.
    #[default]
    Memory,
    /// In a snapshot that is not listed.
    Disk,
}

/// One checkpoint of a sandbox.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CheckpointInfo {
    /// Its name, unique within the sandbox.
    pub name: String,
    /// Creation time.
    pub created_at_unix: u64,
    /// How long the sandbox stood still for it.
    pub pause_us: u64,
    /// Where it is.
    #[serde(default)]
    pub place: CheckpointPlace,
    /// Whether it was taken because the sandbox has automatic checkpoints.
    #[serde(default)]
    pub automatic: bool,
    /// In memory: guest memory that it shares with no file, as of now; some of it with the sandbox and other
    /// checkpoints.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub private_bytes: Option<u64>,
    /// On disk: what it takes there and shares with no snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored_bytes: Option<u64>,
}

/// `POST /v1/sandboxes/:id/rewind`: back to a checkpoint, which stays; later ones go.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct RewindRequest {
    /// The checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// How many checkpoints back, 1 being the newest. Absent with no name: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub back: Option<u32>,
}

/// One sandbox. All keys but the optional last ones are always present, in this order.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SandboxInfo {
    /// Identity, `sb-…`.
    pub id: SandboxId,
    /// The snapshot it was forked from.
    pub snapshot_tag: Tag,
    /// Its network namespace, if it has one.
    pub netns: Option<String>,
    /// [`GUEST_ADDR`].
    pub guest_addr: String,
    /// Creation time.
    pub created_at_unix: u64,
    /// Process id of its monitor.
    pub pid: Option<u32>,
    /// Memory limit of its monitor.
    pub memory_limit_mib: Option<u64>,
    /// Whether it was ever branched.
    pub has_branched: bool,
    /// Memory file of its newest branch.
    pub last_branch_memory_path: Option<String>,
    /// How often it was branched.
    pub branch_count: u64,
    /// How it ended, when its monitor ended by itself; left out while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
    /// The sandbox that it is a copy of; left out when it was forked from the snapshot itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forked_from: Option<SandboxId>,
}

/// One child that did not come up, in a [`SpawnReport`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SpawnFailure {
    /// The id it would have had.
    pub id: SandboxId,
    /// What went wrong.
    pub error: String,
}

/// How long one child took to come up.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SpawnTimings {
    /// The child.
    pub id: SandboxId,
    /// From the request's arrival until the child's agent answered.
    pub answered_us: u64,
    /// Where that time went, as the monitor and the node saw it.
    pub stages: StageTimings,
}

/// `POST /v1/sandboxes?detail=true`: what the plain array cannot say.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SpawnReport {
    /// The children that are up and whose agent answered.
    pub sandboxes: Vec<SandboxInfo>,
    /// The children that are not.
    pub failures: Vec<SpawnFailure>,
    /// Stage timings of each child that is up.
    pub timings: Vec<SpawnTimings>,
    /// From the request's arrival until the last child's agent answered.
    pub total_us: u64,
    /// What was done otherwise than asked, each with what to do about it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// `GET /v1/sandboxes/:id/memory`: what one child costs the host.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SandboxMemory {
    /// Proportional set size of the monitor.
    pub pss_bytes: u64,
    /// Pages that only this monitor holds and that no file holds too, page tables not counted.
    pub private_bytes: u64,
    /// Page tables of the monitor.
    pub page_table_bytes: u64,
    /// Guest pages that differ from the snapshot.
    pub guest_dirty_bytes: u64,
}

/// `POST /v1/sandboxes/:id/exec`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ExecRequest {
    /// The program and its arguments; no shell.
    pub args: Vec<String>,
    /// The process group is killed after this long.
    #[serde(default = "thirty")]
    pub timeout_secs: u64,
    /// Environment added to the agent's.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// Working directory.
    #[serde(default)]
    pub cwd: Option<String>,
    /// User name or numeric id.
    #[serde(default)]
    pub user: Option<String>,
    /// Text for standard input; without it standard input is empty.
    #[serde(default)]
    pub stdin: Option<String>,
}

fn thirty() -> u64 {
    30
}

/// Answer of `exec`. Output that is not UTF-8 has its bad bytes replaced.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ExecResponse {
    /// Standard output.
    pub stdout: String,
    /// Standard error; also says why a program could not be started.
    pub stderr: String,
    /// Exit code; negative signal number when killed by a signal; 1 when it could not be started.
    pub exit_code: i32,
    /// Set when the time limit ended it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub timed_out: bool,
}

/// `POST /v1/sandboxes/:id/eval`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EvalRequest {
    /// Source text.
    pub code: String,
    /// `python` or `node`; the guest's default when absent.
    #[serde(default)]
    pub language: Option<String>,
    /// The evaluation is abandoned after this long.
    #[serde(default = "thirty")]
    pub timeout_secs: u64,
}

/// Answer of `eval`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EvalResponse {
    /// `repr` of the value (Python) or its JSON text (Node).
    pub result: Option<String>,
    /// The error with its traceback.
    pub error: Option<String>,
    /// 0, or 1 on error.
    pub exit_code: i32,
    /// What the code printed.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub stdout: String,
}

/// Whether a snapshot can be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotStatus {
    /// Whole and usable.
    Ready,
    /// Being written.
    Writing,
    /// Not usable; `warning` says why.
    Failed,
}

/// One snapshot. Absent optional fields are left out.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// Name.
    pub tag: Tag,
    /// Directory, on the daemon's host.
    pub dir: String,
    /// Creation time.
    pub created_at_unix: u64,
    /// The sandbox it was branched from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branched_from: Option<String>,
    /// How long its source stood still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_ms: Option<u64>,
    /// How long finding and writing what changed took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff_ms: Option<u64>,
    /// What changed, in bytes as stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff_physical_bytes: Option<u64>,
    /// Size of the memory in which it was looked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff_logical_bytes: Option<u64>,
    /// Where the time of its making went; only in the answer to the request that made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stages: Option<StageTimings>,
    /// The snapshot that it is a layer over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_tag: Option<Tag>,
    /// Why it cannot be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
    /// Whether it can be used.
    pub status: SnapshotStatus,
    /// `status` is ready.
    pub bootable: bool,
    /// Guest memory size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// What the snapshot occupies on disk, its root disk not counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored_bytes: Option<u64>,
}

/// Answer of `POST /v1/packs`: what came of a pack.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct UnpackReport {
    /// The snapshot that was packed, by the name that it has here.
    pub tag: Tag,
    /// It and all that it derives from, the base first.
    pub snapshots: Vec<UnpackedSnapshot>,
    /// Kernels, initramfs images and root disks that are new.
    pub new_blobs: usize,
    /// Those that were there.
    pub reused_blobs: usize,
    /// What was written, holes not counted.
    pub written_bytes: u64,
    /// Whether a signature was asked for and is good.
    pub verified: bool,
}

/// What came of one snapshot of a pack.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct UnpackedSnapshot {
    /// Its name here.
    pub tag: Tag,
    /// What came of it.
    pub fate: UnpackFate,
}

/// What becomes of a snapshot that comes in a pack.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UnpackFate {
    /// It is new.
    Published,
    /// It was there already.
    Reused,
    /// It took the place of another one of its tag.
    Replaced,
}

/// `POST /v1/bakes`: boot a root disk, warm it, snapshot it. Answered by a stream of [`BakeEvent`],
/// one JSON object a line.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BakeRequest {
    /// Name of the snapshot to make.
    pub tag: String,
    /// Digest of a root disk that was uploaded before (`PUT /v1/blobs/:digest`).
    pub disk: String,
    /// Digest of an uploaded kernel.
    pub kernel: String,
    /// Digest of an uploaded initramfs.
    pub initramfs: String,
    /// vCPUs, 1 to 8.
    #[serde(default = "one")]
    pub vcpus: u32,
    /// Guest memory, 128 to 16384 MiB.
    #[serde(default = "default_memory")]
    pub memory_mib: u64,
    /// Commands run before the snapshot, each must exit 0.
    #[serde(default)]
    pub run: Vec<Vec<String>>,
    /// Source run in a language's warm runtime before the snapshot, each must succeed.
    #[serde(default)]
    pub warm: Vec<WarmStep>,
    /// How long the guest may take to reach its agent.
    #[serde(default = "default_boot_timeout")]
    pub boot_timeout_secs: u64,
    /// Kernel command line added to the built-in one.
    #[serde(default)]
    pub kernel_args: Option<String>,
    /// Replace a snapshot of the same tag.
    #[serde(default)]
    pub replace: bool,
}

fn default_memory() -> u64 {
    512
}

fn default_boot_timeout() -> u64 {
    180
}

/// One statement run in a warm runtime.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WarmStep {
    /// `python` or `node`.
    pub language: String,
    /// Source text.
    pub code: String,
}

/// Progress of a bake.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum BakeEvent {
    /// A step began.
    Step {
        /// What is being done, for a person.
        message: String,
    },
    /// A piece of the guest's console.
    Console {
        /// Text as it came.
        text: String,
    },
    /// The snapshot is there.
    Done {
        /// The new snapshot.
        snapshot: Box<SnapshotInfo>,
        /// Where the time went.
        stages: StageTimings,
    },
    /// The bake failed; nothing was published.
    Failed {
        /// Why, with the end of the guest's console where that helps.
        error: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sandbox_is_written_with_every_key_in_the_known_order() {
        let info = SandboxInfo {
            id: SandboxId::new(0x6b02_c814, 0),
            snapshot_tag: "py".parse().expect("legal tag"),
            netns: None,
            guest_addr: GUEST_ADDR.to_owned(),
            created_at_unix: 1_795_344_404,
            pid: Some(4724),
            memory_limit_mib: None,
            has_branched: false,
            last_branch_memory_path: None,
            branch_count: 0,
            stopped: None,
            forked_from: None,
        };
        assert_eq!(
            serde_json::to_string(&info).expect("plain data"),
            r#"{"id":"sb-6b02c814-0000","snapshot_tag":"py","netns":null,"guest_addr":"10.42.0.2:8888","created_at_unix":1795344404,"pid":4724,"memory_limit_mib":null,"has_branched":false,"last_branch_memory_path":null,"branch_count":0}"#
        );
    }

    #[test]
    fn a_minimal_spawn_request_gets_the_documented_defaults() {
        let request: SpawnRequest = serde_json::from_str(r#"{"snapshot_tag":"py","unknown":1}"#).expect("valid");
        assert_eq!((request.n, request.per_child_netns, request.memory_limit_mib), (1, false, None));
        assert!(serde_json::from_str::<SpawnRequest>(r#"{"snapshot_tag":"py","n":-1}"#).is_err());
        assert!(serde_json::from_str::<SpawnRequest>("{}").is_err());
    }

    #[test]
    fn a_snapshot_leaves_out_what_it_does_not_know() {
        let info = SnapshotInfo {
            tag: "py".parse().expect("legal tag"),
            dir: "/s/py".to_owned(),
            created_at_unix: 7,
            branched_from: None,
            pause_ms: None,
            diff_ms: None,
            diff_physical_bytes: None,
            diff_logical_bytes: None,
            stages: None,
            parent_tag: None,
            warning: None,
            status: SnapshotStatus::Ready,
            bootable: true,
            memory_bytes: None,
            stored_bytes: None,
        };
        assert_eq!(
            serde_json::to_string(&info).expect("plain data"),
            r#"{"tag":"py","dir":"/s/py","created_at_unix":7,"status":"ready","bootable":true}"#
        );
    }
}
