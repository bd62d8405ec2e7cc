//! The tools' arguments. Their comments are what a model reads about them.

use rmcp::schemars::{self, JsonSchema};
use serde::{Deserialize, Serialize};

/// The memory limit of a child that was asked for without one. Clients of the tools have always got this one.
const DEFAULT_MEMORY_MIB: u64 = 256;

#[derive(Deserialize, JsonSchema)]
#[schemars(crate = "schemars")]
pub(crate) struct OfSandbox {
    /// Id of the sandbox, `sb-…`, from spawn_sandboxes or list_sandboxes.
    pub(crate) sandbox_id: String,
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[schemars(crate = "schemars")]
pub(crate) struct CreateSnapshot {
    /// Name of the new snapshot: letters, digits, dashes, underscores; at most 64.
    pub(crate) tag: String,
    /// Path of an uncompressed or compressed Linux kernel on the daemon's host.
    pub(crate) kernel: String,
    /// Path of a root file system image on the daemon's host.
    pub(crate) rootfs: String,
    /// Mount the root file system read-write.
    #[serde(default)]
    pub(crate) rw: bool,
    /// Host network device for the guest, if it needs a certain one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tap: Option<String>,
    /// Seconds that the guest gets to settle before it is snapshotted, 60 at most.
    #[serde(default = "ten")]
    pub(crate) boot_wait_secs: u64,
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[schemars(crate = "schemars")]
pub(crate) struct SpawnSandboxes {
    /// The snapshot to copy, from list_snapshots.
    pub(crate) snapshot_tag: String,
    /// How many copies, 1 to 1000.
    #[serde(default = "one")]
    pub(crate) n: u32,
    /// Give each copy a network namespace of its own.
    #[serde(default)]
    pub(crate) per_child_netns: bool,
    /// Host memory that each copy may take for itself, in MiB. What it shares with the snapshot does not count.
    #[serde(default = "default_memory")]
    pub(crate) memory_limit_mib: Option<u64>,
    /// Accepted for existing callers; copies need no warming.
    #[serde(default)]
    pub(crate) prewarm: bool,
    /// Accepted for existing callers; every sandbox can be branched while it runs.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) live_fork: bool,
    /// Back the snapshot's memory with huge pages, if the host has some.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) hugepages: bool,
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[schemars(crate = "schemars")]
pub(crate) struct BranchSandbox {
    /// Id of the sandbox to take a snapshot of.
    #[serde(skip_serializing)]
    pub(crate) sandbox_id: String,
    /// Name of the new snapshot; made up when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tag: Option<String>,
    /// The older way to say mode "diff"; not together with mode.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) diff: bool,
    /// Also report what changed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) measure_diff: bool,
    /// "full", "diff" or "live". The sandbox stands still for a few milliseconds in all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mode: Option<String>,
    /// False, with mode "live", answers as soon as the sandbox runs again; list_snapshots tells when it is ready.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub(crate) wait: bool,
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[schemars(crate = "schemars")]
pub(crate) struct ForkSandbox {
    /// Id of the running sandbox to copy.
    #[serde(skip_serializing)]
    pub(crate) sandbox_id: String,
    /// How many copies, 1 to 1000, all of the same instant.
    #[serde(default = "one")]
    pub(crate) n: u32,
    /// Host memory that each copy may take for itself, in MiB; none when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) memory_limit_mib: Option<u64>,
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[schemars(crate = "schemars")]
pub(crate) struct CheckpointSandbox {
    /// Id of the sandbox.
    #[serde(skip_serializing)]
    pub(crate) sandbox_id: String,
    /// Name of the checkpoint; made up when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    /// Put it on disk, where it outlives a restart of the host.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) disk: bool,
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[schemars(crate = "schemars")]
pub(crate) struct RewindSandbox {
    /// Id of the sandbox.
    #[serde(skip_serializing)]
    pub(crate) sandbox_id: String,
    /// Name of the checkpoint, from checkpoint_sandbox or list_checkpoints.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    /// Instead of a name: how many checkpoints back, 1 being the newest. Without either: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) back: Option<u32>,
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[schemars(crate = "schemars")]
pub(crate) struct ExecCommand {
    /// Id of the sandbox.
    #[serde(skip_serializing)]
    pub(crate) sandbox_id: String,
    /// The program and its arguments, for example ["python3", "-c", "print(2 + 2)"]. No shell is involved; for one,
    /// say ["sh", "-c", "…"].
    pub(crate) args: Vec<String>,
    /// Seconds after which it is killed.
    #[serde(default = "thirty")]
    pub(crate) timeout_secs: u64,
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[schemars(crate = "schemars")]
pub(crate) struct EvalCode {
    /// Id of the sandbox.
    #[serde(skip_serializing)]
    pub(crate) sandbox_id: String,
    /// Source text. What it defines stays for later calls in the same sandbox.
    pub(crate) code: String,
}

#[derive(Deserialize, JsonSchema)]
#[schemars(crate = "schemars")]
pub(crate) struct WaitForText {
    /// Id of the sandbox.
    pub(crate) sandbox_id: String,
    /// Absolute path of the file to watch, for example a program's log.
    pub(crate) path: String,
    /// The text to wait for. It is looked for in the file's last 4096 bytes.
    pub(crate) marker: String,
    /// Seconds to wait at most.
    #[serde(default = "sixty")]
    pub(crate) timeout_secs: f64,
    /// Milliseconds between two looks.
    #[serde(default = "two_hundred")]
    pub(crate) poll_interval_ms: u64,
}

#[derive(Deserialize, JsonSchema)]
#[schemars(crate = "schemars")]
pub(crate) struct OfFile {
    /// Id of the sandbox.
    pub(crate) sandbox_id: String,
    /// Absolute path in the sandbox.
    pub(crate) path: String,
}

#[derive(Deserialize, JsonSchema)]
#[schemars(crate = "schemars")]
pub(crate) struct WriteFile {
    /// Id of the sandbox.
    pub(crate) sandbox_id: String,
    /// Absolute path in the sandbox. Directories that are missing are made.
    pub(crate) path: String,
    /// The file's whole new content.
    pub(crate) content: String,
}

fn one() -> u32 {
    1
}

fn ten() -> u64 {
    10
}

fn thirty() -> u64 {
    30
}

fn sixty() -> f64 {
    60.0
}

fn two_hundred() -> u64 {
    200
}

fn yes() -> bool {
    true
}

fn is_true(value: &bool) -> bool {
    *value
}

fn default_memory() -> Option<u64> {
    Some(DEFAULT_MEMORY_MIB)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json, to_value};

    fn sent<T: Serialize + for<'de> Deserialize<'de>>(arguments: Value) -> Value {
        to_value(serde_json::from_value::<T>(arguments).expect("valid")).expect("plain data")
    }

    #[test]
    fn defaults_are_the_ones_that_callers_have_always_got() {
        assert_eq!(
            sent::<SpawnSandboxes>(json!({"snapshot_tag": "py"})),
            json!({"snapshot_tag": "py", "n": 1, "per_child_netns": false, "memory_limit_mib": 256, "prewarm": false})
        );
        assert_eq!(sent::<BranchSandbox>(json!({"sandbox_id": "sb-1"})), json!({}));
        assert_eq!(
            sent::<BranchSandbox>(json!({"sandbox_id": "sb-1", "mode": "live", "wait": false})),
            json!({"mode": "live", "wait": false})
        );
        assert_eq!(
            sent::<ExecCommand>(json!({"sandbox_id": "sb-1", "args": ["true"]})),
            json!({"args": ["true"], "timeout_secs": 30})
        );
        assert_eq!(
            sent::<CreateSnapshot>(json!({"tag": "t", "kernel": "/k", "rootfs": "/r"})),
            json!({"tag": "t", "kernel": "/k", "rootfs": "/r", "rw": false, "boot_wait_secs": 10})
        );
        let wait: WaitForText =
            serde_json::from_value(json!({"sandbox_id": "s", "path": "/p", "marker": "m"})).expect("valid");
        assert_eq!((wait.timeout_secs, wait.poll_interval_ms), (60.0, 200));
    }
}
