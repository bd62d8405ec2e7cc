//! One checkpoint, and those of one sandbox.

use std::sync::Arc;

use forkd_types::SandboxId;
use forkd_types::rest::{CheckpointInfo, CheckpointPlace};

use crate::database::Base;
use crate::database::checkpoints::{CheckpointRecord, Place};
use crate::error::{NodeError, NodeResult};
use crate::frozen::Frozen;

/// The longest name of a checkpoint.
const NAME_LIMIT: usize = 64;

/// A machine of one instant, with a name.
#[derive(Clone)]
pub(super) struct Checkpoint {
    pub(super) name: String,
    pub(super) created_at_unix: u64,
    /// How long the sandbox stood still.
    pub(super) pause_us: u64,
    /// Disks of the machine.
    pub(super) disks: usize,
    /// Whether it was made without being asked for by name.
    pub(super) automatic: bool,
    /// The snapshot that its memory and disks are changes of.
    pub(super) base: Option<Base>,
    pub(super) held: Held,
}

/// Where the machine is.
#[derive(Clone)]
pub(super) enum Held {
    /// In memory.
    Frozen(Arc<Frozen>),
    /// In a snapshot, which it is all of.
    Snapshot(Base),
}

impl Checkpoint {
    /// What clients see of it.
    pub(super) fn info(&self) -> CheckpointInfo {
        CheckpointInfo {
            name: self.name.clone(),
            created_at_unix: self.created_at_unix,
            pause_us: self.pause_us,
            stages: match &self.held {
                // One that an earlier daemon took says nothing of it.
                Held::Frozen(frozen) => Some(frozen.stages.clone()).filter(|stages| !stages.0.is_empty()),
                Held::Snapshot(_) => None,
            },
            place: match self.held {
                Held::Frozen(_) => CheckpointPlace::Memory,
                Held::Snapshot(_) => CheckpointPlace::Disk,
            },
            automatic: self.automatic,
            private_bytes: None,
            stored_bytes: None,
        }
    }

    /// What is recorded of it.
    pub(super) fn record(&self, sandbox: &SandboxId) -> CheckpointRecord {
        CheckpointRecord {
            sandbox: sandbox.clone(),
            name: self.name.clone(),
            created_at_unix: self.created_at_unix,
            pause_us: self.pause_us,
            disks: self.disks,
            automatic: self.automatic,
            base: self.base.clone(),
            place: match &self.held {
                Held::Frozen(frozen) => Place::Memory(frozen.key(), frozen.name().to_owned()),
                Held::Snapshot(snapshot) => Place::Disk(snapshot.clone()),
            },
        }
    }

    /// What a machine that goes on from here changes.
    pub(super) fn base_of_copies(&self) -> Option<Base> {
        match &self.held {
            Held::Frozen(_) => self.base.clone(),
            Held::Snapshot(snapshot) => Some(snapshot.clone()),
        }
    }

    /// Lets go of what it holds in memory.
    pub(super) fn end(&self) {
        if let Held::Frozen(frozen) = &self.held {
            frozen.end();
        }
    }
}

/// The checkpoints of one sandbox.
#[derive(Default)]
pub(super) struct Line {
    /// Oldest first.
    pub(super) points: Vec<Checkpoint>,
    /// For names that are made up.
    serial: u64,
}

impl Line {
    /// A name that begins with `prefix` and that no checkpoint has.
    pub(super) fn free_name(&mut self, prefix: &str) -> String {
        loop {
            self.serial += 1;
            let name = format!("{prefix}-{}", self.serial);
            if self.points.iter().all(|point| point.name != name) {
                return name;
            }
        }
    }

    /// Checks a name that a client wants.
    pub(super) fn check_name(&self, id: &SandboxId, name: String) -> NodeResult<String> {
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if name.is_empty() || name.len() > NAME_LIMIT || !name.bytes().all(legal) {
            let rule = "use 1 to 64 letters, digits, dots, dashes and underscores";
            return Err(NodeError::BadField { field: "name", value: format!("{name:?}"), rule });
        }
        if self.points.iter().any(|point| point.name == name) {
            return Err(NodeError::CheckpointExists { id: id.clone(), name });
        }
        Ok(name)
    }

    /// Where the checkpoint `name` is.
    pub(super) fn position(&self, id: &SandboxId, name: &str) -> NodeResult<usize> {
        self.points.iter().position(|point| point.name == name).ok_or_else(|| self.not_found(id, name))
    }

    /// Where the checkpoint is that is `back` checkpoints back, 1 being the newest.
    pub(super) fn back(&self, id: &SandboxId, back: u32) -> NodeResult<usize> {
        let at = (back > 0).then(|| self.points.len().checked_sub(back as usize)).flatten();
        at.ok_or_else(|| self.not_found(id, &format!("{back} back")))
    }

    fn not_found(&self, id: &SandboxId, wanted: &str) -> NodeError {
        let have = self.points.iter().map(|point| point.name.clone()).collect();
        NodeError::CheckpointNotFound { id: id.clone(), wanted: wanted.to_owned(), have }
    }
}
