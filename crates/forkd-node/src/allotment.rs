//! What the host sets aside for a machine, and takes back.
//!
//! Each machine has a control group of its own, made before it is forked; the fork puts it there, so that no
//! instant of it is outside. Zygotes have groups of their own too, and what serves one request shares one.

use std::os::fd::OwnedFd;

use forkd_jail::cgroup::{Group, Tree};
use forkd_types::ByteSize;
use forkd_types::rest::{EndCode, SandboxLimits};

use crate::admission::Promise;
use crate::config::{LimitsMode, NodeConfig};
use crate::error::{NodeError, NodeResult, with_causes};
use crate::lifecycle::End;
use crate::limits;

/// Where machines' groups are.
#[derive(Debug)]
pub(crate) enum Groups {
    /// Each machine has one.
    In(Tree),
    /// Nobody wants any.
    Off,
    /// The host cannot, for this reason.
    Unavailable(String),
}

impl Groups {
    /// As the settings say; a host that cannot is told how to mend it, in the log.
    pub(crate) fn open(config: &NodeConfig) -> Self {
        if config.limits == LimitsMode::Off {
            tracing::warn!("limits are off: no sandbox is kept from taking the host's memory and processors");
            return Self::Off;
        }
        match Tree::prepare(&config.cgroup_root, &config.state_dir) {
            Ok(tree) => Self::In(tree),
            Err(error) => {
                let reason = with_causes(&error);
                tracing::warn!("sandboxes run without limits, and requests for limits are refused: {reason}");
                Self::Unavailable(reason)
            }
        }
    }

    /// Whether a machine can be given `limits`; what is done otherwise than asked is returned as a warning.
    ///
    /// # Errors
    /// [`NodeError::LimitsUnavailable`] with the mend.
    pub(crate) fn check(&self, limits: &SandboxLimits) -> NodeResult<Option<String>> {
        let asked = limits::of_group(limits);
        if asked == Default::default() {
            return Ok(None);
        }
        match self {
            Self::In(tree) => match tree.check(&asked) {
                Ok(()) => Ok(None),
                Err(error) => Err(NodeError::LimitsUnavailable { reason: with_causes(&error) }),
            },
            Self::Off => Ok(Some("the limits are not enforced: the daemon was started with --limits off".to_owned())),
            Self::Unavailable(reason) => Err(NodeError::LimitsUnavailable { reason: reason.clone() }),
        }
    }

    /// A group for the machine called `name`.
    pub(crate) fn machine(&self, name: &str, limits: &SandboxLimits) -> NodeResult<Option<Group>> {
        let Self::In(tree) = self else { return Ok(None) };
        let group = tree.sandbox(name, &limits::of_monitor(limits));
        group.map(Some).map_err(|error| NodeError::LimitsUnavailable { reason: with_causes(&error) })
    }

    /// Puts the zygote `pid` of `tag` in a group of its own, if there are any.
    pub(crate) fn place_zygote(&self, tag: &str, pid: i32) -> Option<Group> {
        let Self::In(tree) = self else { return None };
        // With its number, so that one that is ending does not take the place of the next.
        let placed = tree.zygote(&format!("{tag}-{pid}")).and_then(|group| group.take_in(pid).map(|()| group));
        placed.inspect_err(|error| tracing::warn!(tag, error = with_causes(error), "a zygote has no group")).ok()
    }

    /// Puts a process that serves one request where such are.
    pub(crate) fn place_helper(&self, pid: i32) {
        if let Self::In(tree) = self
            && let Err(error) = tree.take_in_helper(pid)
        {
            tracing::warn!(pid, error = with_causes(&error), "a helper is in the daemon's own group");
        }
    }

    /// What a process that serves one request is born into.
    pub(crate) fn helpers(&self) -> Option<OwnedFd> {
        let Self::In(tree) = self else { return None };
        tree.helpers().try_clone_to_owned().ok()
    }

    /// Removes groups without processes; those with some stay.
    pub(crate) fn sweep(&self) {
        if let Self::In(tree) = self {
            tree.sweep();
        }
    }

    /// How a machine called `name`, which is gone, ended, if that was for want of memory.
    pub(crate) fn out_of_memory(&self, name: &str, limits: &SandboxLimits) -> Option<End> {
        let Self::In(tree) = self else { return None };
        Allotment { group: tree.remaining(name), limits: *limits, _promise: None }.out_of_memory()
    }

    /// What an earlier daemon set aside for the machine that is process `pid`.
    pub(crate) fn adopted(&self, pid: i32, limits: SandboxLimits, promise: Option<Promise>) -> Allotment {
        let group = match self {
            Self::In(tree) => tree.group_of(pid),
            Self::Off | Self::Unavailable(_) => None,
        };
        Allotment { group, limits, _promise: promise }
    }
}

/// What the host set aside for one machine; what nobody uses any more is taken back when this is dropped.
#[derive(Debug)]
pub(crate) struct Allotment {
    group: Option<Group>,
    limits: SandboxLimits,
    _promise: Option<Promise>,
}

impl Allotment {
    /// Sets aside what the machine called `name` needs.
    pub(crate) fn make(
        groups: &Groups,
        name: &str,
        limits: &SandboxLimits,
        promise: Option<Promise>,
    ) -> NodeResult<Self> {
        Ok(Self { group: groups.machine(name, limits)?, limits: *limits, _promise: promise })
    }

    /// What the machine is born into.
    pub(crate) fn descriptor(&self) -> NodeResult<Option<OwnedFd>> {
        let opened = self.group.as_ref().map(Group::descriptor).transpose();
        opened.map_err(NodeError::io("duplicate the descriptor of a control group"))
    }

    /// How much the machine may write to its disks.
    pub(crate) fn disk(&self) -> Option<ByteSize> {
        limits::disk(&self.limits)
    }

    /// How the machine ended, if that was for want of memory.
    pub(crate) fn out_of_memory(&self) -> Option<End> {
        let events = self.group.as_ref()?.memory_events();
        if events.oom_kill == 0 {
            return None;
        }
        let reason = match limits::memory(&self.limits).filter(|_| events.oom > 0) {
            Some(limit) => format!("ran out of memory: it needed more than its limit of {limit}"),
            None => "was ended by the kernel because the host ran out of memory".to_owned(),
        };
        Some(End { code: EndCode::Oom, reason })
    }

    /// Ends whatever the machine, which has ended, left in its group, and removes that; blocks.
    pub(crate) fn dissolve(&self) {
        dissolve(self.group.as_ref());
    }
}

/// Ends what is left in `group` and removes it; blocks.
pub(crate) fn dissolve(group: Option<&Group>) {
    if let Some(Err(error)) = group.map(Group::dissolve) {
        tracing::warn!(error = with_causes(&error), "a control group is left");
    }
}
