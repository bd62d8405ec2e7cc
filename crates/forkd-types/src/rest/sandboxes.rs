//! Sandboxes: spawning them, forking running ones, what one is and what it costs.

use serde::{Deserialize, Serialize};

use super::limits::{EndCode, SandboxLimits};
use crate::{SandboxId, StageTimings, Tag};

/// The guest agent's address as every sandbox reports it; it is the same inside each network
/// namespace.
pub const GUEST_ADDR: &str = "10.42.0.2:8888";

/// The most children that one spawn may ask for.
pub const SPAWN_LIMIT: u32 = 1000;

/// `POST /v1/sandboxes`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SpawnRequest {
    /// The snapshot to fork.
    pub snapshot_tag: String,
    /// How many children, 1 to [`SPAWN_LIMIT`].
    #[serde(default = "one")]
    #[cfg_attr(feature = "openapi", schema(minimum = 1, maximum = 1000))]
    pub n: u32,
    /// Give each child its own network namespace.
    #[serde(default)]
    pub per_child_netns: bool,
    /// The same as `limits.memory_mib`.
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
    /// End each child by itself after this long, 1 to [`LIFETIME_LIMIT_SECS`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 1, maximum = 31_536_000))]
    pub timeout_secs: Option<u64>,
    /// How a child ends after `timeout_secs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_timeout: Option<OnTimeout>,
    /// What each child may take of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<SandboxLimits>,
}

/// What an automatic checkpoint is taken before.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AutoCheckpoint {
    /// Every program and every evaluation that a client asks for.
    Exec,
}

/// The longest lifetime that a sandbox can be given, in seconds: a year. Without one it lives until it is ended.
pub const LIFETIME_LIMIT_SECS: u64 = 365 * 24 * 3600;

/// How a sandbox ends when its lifetime is over.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnTimeout {
    /// At once, and nothing is left of it.
    #[default]
    Kill,
    /// It is put on disk first: that of a workspace as the workspace's state, any other as the snapshot
    /// `suspended-<id>`. One that cannot be put on disk runs on.
    Suspend,
}

/// `POST /v1/sandboxes/:id/timeout`: answered with the sandbox.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct TimeoutRequest {
    /// The sandbox ends this long after now, whatever was said before; null lets it live until it is ended.
    #[serde(deserialize_with = "said")]
    #[cfg_attr(feature = "openapi", schema(minimum = 1, maximum = 31_536_000))]
    pub timeout_secs: Option<u64>,
    /// How it ends then; as said before when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_timeout: Option<OnTimeout>,
}

impl SpawnRequest {
    /// A request for `n` children of `tag`, with defaults for the rest.
    pub fn of(tag: &Tag, n: u32) -> Self {
        let (per_child_netns, prewarm, live_fork, hugepages) = (false, false, false, false);
        let (memory_limit_mib, auto_checkpoint) = (None, None);
        let (snapshot_tag, timeout_secs, on_timeout) = (tag.to_string(), None, None);
        Self {
            snapshot_tag,
            n,
            per_child_netns,
            memory_limit_mib,
            prewarm,
            live_fork,
            hugepages,
            auto_checkpoint,
            timeout_secs,
            on_timeout,
            limits: None,
        }
    }
}

/// `POST /v1/sandboxes/:id/fork`: copies of a running sandbox, all of one instant. Answered as a spawn is.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ForkRequest {
    /// How many copies, 1 to [`SPAWN_LIMIT`].
    #[serde(default = "one")]
    #[cfg_attr(feature = "openapi", schema(minimum = 1, maximum = 1000))]
    pub n: u32,
    /// The same as `limits.memory_mib`.
    #[serde(default)]
    pub memory_limit_mib: Option<u64>,
    /// End each copy by itself after this long; a copy does not inherit the lifetime of its source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 1, maximum = 31_536_000))]
    pub timeout_secs: Option<u64>,
    /// How a copy ends after `timeout_secs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_timeout: Option<OnTimeout>,
    /// What each copy may take of the host; limits that are not named are those of the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<SandboxLimits>,
}

impl ForkRequest {
    /// A request for `n` copies, with defaults for the rest.
    pub fn of(n: u32) -> Self {
        Self { n, memory_limit_mib: None, timeout_secs: None, on_timeout: None, limits: None }
    }
}

/// One sandbox. All keys but the optional last ones are always present, in this order.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
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
    /// When it ends by itself; left out when it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at_unix: Option<u64>,
    /// How it ended, for programs; left out while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped_code: Option<EndCode>,
    /// What it may take of the host; left out when nothing is limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<SandboxLimits>,
}

/// One child that did not come up, in a [`SpawnReport`].
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SpawnFailure {
    /// The id it would have had.
    pub id: SandboxId,
    /// What went wrong.
    pub error: String,
}

/// How long one child took to come up.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
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
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
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
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
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

fn one() -> u32 {
    1
}

/// A value that may be null and must not be missing.
fn said<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    Option::deserialize(deserializer)
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
            expires_at_unix: None,
            stopped_code: None,
            limits: None,
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
    fn a_lifetime_is_taken_away_by_null_and_not_by_forgetting_it() {
        let parse = |text| serde_json::from_str::<TimeoutRequest>(text);
        assert_eq!(parse(r#"{"timeout_secs":null}"#).expect("valid").timeout_secs, None);
        let both = parse(r#"{"timeout_secs":7,"on_timeout":"suspend"}"#).expect("valid");
        assert_eq!((both.timeout_secs, both.on_timeout), (Some(7), Some(OnTimeout::Suspend)));
        assert!(parse("{}").is_err());
    }
}
