//! One warm monitor per snapshot and kind of memory, ready to fork.
//!
//! ```text
//! (none) ──lease──► launching ──Ready──► warm ──lease──► warm
//!    ▲                 │ failed            │ idle too long, snapshot gone, died
//!    └─────────────────┴───────────────────┘
//! ```
//!
//! A lease is a shared hold: a zygote that is let go while children are being forked from it ends
//! after the last of them. Its children live on without it.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use forkd_jail::cgroup::Group;
use forkd_proto::monitor::{Backing, Launch, LaunchAction, Role, ZygoteConfig};
use forkd_store::{Snapshot, StoreError};
use forkd_types::{Digest, Tag};
use rustix::fs::{Mode, OFlags};

use crate::control::{Control, expect_event};
use crate::error::{NodeError, NodeResult};
use crate::gauges::WarmZygote;
use crate::host::{Host, Traces, blocking};
use crate::launch::{self, Launched, Owned};
use crate::process::{Process, ProcessKey};
use crate::working_set::WorkingSet;
use crate::{allotment, cpu, memory};

/// What distinguishes zygotes.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct ZygoteKey {
    /// The snapshot.
    pub(crate) tag: Tag,
    /// Whether memory is in reserved huge pages.
    pub(crate) huge_pages: bool,
}

/// A monitor that holds a snapshot and never runs it.
pub(crate) struct Zygote {
    host: Arc<Host>,
    key: ProcessKey,
    _process: Owned,
    _traces: Traces,
    /// Where to send forks.
    pub(crate) control: Arc<Control>,
    /// How many disks a child needs overlays for.
    pub(crate) disks: usize,
    /// Digest of the description of its snapshot.
    pub(crate) snapshot_digest: Digest,
    /// What its first copies need.
    pub(crate) working_set: WorkingSet,
    /// What it does otherwise than asked, for everyone who forks it.
    pub(crate) warnings: Vec<String>,
    memory_bytes: u64,
    /// Whether its machine has a network interface.
    pub(crate) network: bool,
}

impl Zygote {
    /// Whether it had to do without reserved huge pages that would be there now.
    fn is_outgrown(&self, key: &ZygoteKey) -> bool {
        key.huge_pages && !self.warnings.is_empty() && memory::free_huge_page_bytes() >= self.memory_bytes
    }
}

impl Drop for Zygote {
    fn drop(&mut self) {
        self.host.database.forget_helper(self.key);
    }
}

struct Slot {
    zygote: tokio::sync::Mutex<Option<Arc<Zygote>>>,
    used: Mutex<Instant>,
}

/// All zygotes of the node.
pub(crate) struct Zygotes {
    host: Arc<Host>,
    slots: Mutex<HashMap<ZygoteKey, Arc<Slot>>>,
}

impl Zygotes {
    /// None yet.
    pub(crate) fn new(host: Arc<Host>) -> Self {
        Self { host, slots: Mutex::default() }
    }

    /// The zygote for `key`, launched now if there is none alive. Concurrent callers share one launch.
    pub(crate) async fn lease(&self, key: &ZygoteKey) -> NodeResult<Arc<Zygote>> {
        let slot = {
            let mut slots = self.slots();
            let fresh = || Arc::new(Slot { zygote: tokio::sync::Mutex::default(), used: Mutex::new(Instant::now()) });
            Arc::clone(slots.entry(key.clone()).or_insert_with(fresh))
        };
        let mut held = slot.zygote.lock().await;
        *slot.used.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        let usable = |zygote: &&Arc<Zygote>| zygote.control.ending().is_none() && !zygote.is_outgrown(key);
        if let Some(zygote) = held.as_ref().filter(usable) {
            return Ok(Arc::clone(zygote));
        }
        *held = None;
        let zygote = Arc::new(self.launch(key).await?);
        *held = Some(Arc::clone(&zygote));
        *slot.used.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        Ok(zygote)
    }

    /// Lets go of every zygote of `tag`: its snapshot is another one now, or gone.
    pub(crate) fn discard(&self, tag: &Tag) {
        self.host.database.forget_working_set(tag.clone());
        self.slots().retain(|key, _| key.tag != *tag);
    }

    /// Lets go of zygotes that died or were not used for long.
    pub(crate) fn retire_idle(&self) {
        let limit = self.host.config.zygote_idle;
        self.slots().retain(|key, slot| {
            // A slot that is locked is being used.
            let Ok(held) = slot.zygote.try_lock() else { return true };
            let idle = slot.used.lock().unwrap_or_else(PoisonError::into_inner).elapsed();
            let keep = match held.as_ref() {
                None => false,
                Some(zygote) => zygote.control.ending().is_none() && (idle < limit || Arc::strong_count(zygote) > 1),
            };
            if !keep && held.is_some() {
                tracing::info!(tag = %key.tag, "stopping an idle zygote");
            }
            keep
        });
    }

    /// Those that are warm and not just being launched or replaced.
    pub(crate) fn warm(&self) -> Vec<WarmZygote> {
        let warm = |(key, slot): (&ZygoteKey, &Arc<Slot>)| {
            let held = slot.zygote.try_lock().ok()?;
            let zygote = held.as_ref().filter(|zygote| zygote.control.ending().is_none())?;
            Some(WarmZygote { tag: key.tag.clone(), huge_pages: key.huge_pages, pid: zygote.key.pid })
        };
        self.slots().iter().filter_map(warm).collect()
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<ZygoteKey, Arc<Slot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn launch(&self, key: &ZygoteKey) -> NodeResult<Zygote> {
        let host = Arc::clone(&self.host);
        let tag = key.tag.clone();
        let chain = blocking("reading a snapshot", move || host.store.chain(&tag)).await?.map_err(not_ready)?;
        let snapshot = chain.last().expect("a chain ends in its snapshot");
        let missing = cpu::missing(&snapshot.meta.boot.cpu, &self.host.cpu);
        if !missing.is_empty() {
            return Err(NodeError::ProcessorLacks { tag: key.tag.clone(), missing: missing.join(" ") });
        }
        let (roles, fds) = self.open_parts(&chain)?;
        let backing = if key.huge_pages { Backing::ReservedHugePages } else { snapshot.meta.memory_backing };
        let name = format!("zygote-{}{}", key.tag, if key.huge_pages { "-huge" } else { "" });
        let traces = Traces::of(&self.host, name.clone());
        let working_set = match backing {
            Backing::File => WorkingSet::recorded(&self.host, snapshot.digest, key.tag.clone()).await,
            // All of it is read when it is copied.
            Backing::TransparentHugePages | Backing::ReservedHugePages => {
                WorkingSet::unused(snapshot.digest, key.tag.clone())
            }
        };
        let action = LaunchAction::Zygote(ZygoteConfig { backing, prefetch: working_set.runs.clone() });
        let message = Launch { fds: roles, name: name.clone(), action };
        let log = self.host.files.log(&name);
        let mut group = None;
        let place = |pid| group = self.host.groups.place_zygote(key.tag.as_str(), pid);
        let Launched { control, process, answer } = launch::launch(&self.host.config.vmm, &log, &message, fds, place)?;
        let process_key = process.0.key();
        remove_with(group, process_key.pid);
        self.host.database.note_helper(process_key, name.clone());
        let mut zygote = Zygote {
            host: Arc::clone(&self.host),
            key: process_key,
            _process: process,
            _traces: traces,
            control,
            disks: snapshot.meta.disks.iter().filter(|disk| disk.is_writable()).count(),
            snapshot_digest: snapshot.digest,
            working_set,
            warnings: Vec::new(),
            memory_bytes: 0,
            network: false,
        };
        let failed = |reason: String| {
            let log = launch::log_tail(&log, 10);
            let reason = if log.is_empty() { reason } else { format!("{reason}; its log ends:\n{log}") };
            NodeError::Zygote { tag: key.tag.clone(), reason }
        };
        let limit = self.host.config.zygote_deadline;
        let ready = match tokio::time::timeout(limit, answer.wait()).await {
            Ok(Ok(event)) => expect_event!(name, event, Ready { vcpus, memory_bytes, warnings, network }),
            Ok(Err(error)) => Err(error),
            Err(_) => return Err(failed(format!("not ready after {} s", limit.as_secs()))),
        };
        let (vcpus, memory_bytes, warnings, network) = ready.map_err(|error| failed(error.to_string()))?;
        for warning in &warnings {
            tracing::warn!(zygote = name, warning);
        }
        (zygote.warnings, zygote.memory_bytes, zygote.network) = (warnings, memory_bytes, network);
        tracing::info!(zygote = name, pid = process_key.pid, vcpus, memory_bytes, "zygote ready");
        Ok(zygote)
    }

    /// Opens everything a zygote of the newest of `chain` needs, in the protocol's order.
    fn open_parts(&self, chain: &[Snapshot]) -> NodeResult<(Vec<Role>, Vec<OwnedFd>)> {
        let snapshot = chain.last().expect("a chain ends in its snapshot");
        let mut roles = vec![Role::Kvm, Role::VmState];
        let mut fds = vec![self.host.open_kvm()?, open(&snapshot.vmstate())?];
        for path in chain.iter().flat_map(Snapshot::memory_layers) {
            roles.push(Role::MemoryLayer);
            fds.push(open(&path)?);
        }
        for (index, disk) in snapshot.meta.disks.iter().enumerate() {
            let blob = self.host.store.blob(&disk.base)?.ok_or_else(|| {
                let what = disk.volume.as_ref().map_or("its root disk".to_owned(), |volume| {
                    format!("the image of its volume on {},", volume.path)
                });
                let reason = format!("{what} {} is not in the store", disk.base);
                NodeError::SnapshotNotReady { tag: snapshot.meta.tag.clone(), reason }
            })?;
            roles.push(if disk.is_writable() { Role::DiskBase } else { Role::DiskShared });
            fds.push(blob.file.into());
            for path in chain.iter().flat_map(|snapshot| snapshot.disk_layers(index)) {
                roles.push(Role::DiskLayer);
                fds.push(open(&path)?);
            }
        }
        Ok((roles, fds))
    }
}

/// Removes the group of a zygote once that has ended.
fn remove_with(group: Option<Group>, pid: i32) {
    let (Some(group), Ok(process)) = (group, Process::child(pid)) else { return };
    tokio::spawn(async move {
        process.exited().await;
        let _ = blocking("removing a control group", move || allotment::dissolve(Some(&group))).await;
    });
}

fn open(path: &Path) -> NodeResult<OwnedFd> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|source| NodeError::io(format!("open {}", path.display()))(source.into()))
}

/// A snapshot that is there but cannot be forked is a conflict, not a fault of the store.
fn not_ready(error: StoreError) -> NodeError {
    match error {
        StoreError::Damaged { tag, reason, .. } => NodeError::SnapshotNotReady { tag, reason },
        other => other.into(),
    }
}
