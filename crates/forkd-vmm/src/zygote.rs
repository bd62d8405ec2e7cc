//! A zygote: a monitor that holds a snapshot ready and never runs it.
//!
//! It has one thread, the memory mapped and the state parsed. To spawn a copy it forks; everything
//! that takes time happens in the child, so that a hundred children come up on as many processors
//! as there are.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use forkd_kvm::{Kvm, KvmError, Vm, cpuid};
use forkd_memory::{Backing, GuestRam, Layer, LayerError, MemoryLayout, MemorySizeError, RamError};
use forkd_proto::frame::FrameError;
use forkd_proto::monitor::{self, Command, Event, Role, ZygoteConfig};
use forkd_types::PageRun;

use crate::carried::{Carried, CarriedError};
use crate::copy::{Child, CopyRequest, FreezeRequest, SnapshotRequest};
use crate::disks::{self, AssemblyError};
use crate::fork::{self, Side};
use crate::seed::Seed;
use crate::state::{MachineState, PAYLOAD_LIMIT, StateError};
use crate::vcpu_thread::chain;

/// Why a snapshot cannot be held.
#[derive(Debug, thiserror::Error)]
pub enum ZygoteError {
    /// A descriptor is missing.
    #[error("the launch message is malformed")]
    Carried(#[from] CarriedError),
    /// `vmstate` cannot be read.
    #[error("cannot read vmstate")]
    ReadState(#[source] std::io::Error),
    /// `vmstate` is not usable.
    #[error("vmstate is not usable")]
    State(#[from] StateError),
    /// A layer of memory cannot be opened.
    #[error("cannot use a memory layer")]
    Layer(#[source] LayerError),
    /// The disks cannot be put together.
    #[error(transparent)]
    Disks(#[from] AssemblyError),
    /// The snapshot's memory size is not one a machine can have.
    #[error(transparent)]
    MemorySize(#[from] MemorySizeError),
    /// Memory cannot be mapped.
    #[error("cannot map the snapshot's memory")]
    Ram(#[from] RamError),
    /// A KVM call failed.
    #[error("cannot use KVM")]
    Kvm(#[from] KvmError),
    /// The snapshot was made on a processor with features that this one lacks.
    #[error("the snapshot's guest uses processor features that this host lacks: {}", .0.join(", "))]
    Features(Vec<String>),
}

/// Reads a snapshot into a seed. Also returns what was done otherwise than asked.
pub fn load(config: &ZygoteConfig, carried: &mut Carried) -> Result<(Seed, Vec<String>), ZygoteError> {
    let kvm = Arc::new(Kvm::from_fd(carried.require(Role::Kvm)?)?);
    let mut bytes = Vec::new();
    File::from(carried.require(Role::VmState)?)
        .take(PAYLOAD_LIMIT as u64 + 4096)
        .read_to_end(&mut bytes)
        .map_err(ZygoteError::ReadState)?;
    let state = MachineState::decode(&bytes)?;
    let missing = state.vcpus.first().map(|vcpu| cpuid::missing_features(&kvm, &vcpu.cpuid)).unwrap_or_default();
    if !missing.is_empty() {
        return Err(ZygoteError::Features(missing));
    }
    let layers = carried.all(Role::MemoryLayer).into_iter().map(Layer::open);
    let layers = layers.collect::<Result<_, _>>().map_err(ZygoteError::Layer)?;
    let layout = MemoryLayout::new(state.config.memory_bytes)?;
    let (ram, warnings) = map_memory(layout, layers, config)?;
    read_ahead(&ram, &config.prefetch);
    let disks = disks::assemble(&state.config.disks, carried)?;
    let mut seed = Seed { kvm, ram, state, disks };
    lighten(&mut seed)?;
    Ok((seed, warnings))
}

fn map_memory(
    layout: MemoryLayout,
    layers: Vec<Layer>,
    config: &ZygoteConfig,
) -> Result<(GuestRam, Vec<String>), ZygoteError> {
    let backing = match config.backing {
        monitor::Backing::File => Backing::File,
        monitor::Backing::TransparentHugePages => Backing::TransparentHugePages,
        monitor::Backing::ReservedHugePages => Backing::ReservedHugePages,
    };
    let layers: Arc<[Layer]> = layers.into();
    match GuestRam::from_layers(layout, layers.clone(), backing) {
        Ok(ram) => Ok((ram, Vec::new())),
        Err(error @ RamError::PoolTooSmall { .. }) => {
            let warning = format!("ordinary 4 KiB pages are used: {error}");
            Ok((GuestRam::from_layers(layout, layers, Backing::File)?, vec![warning]))
        }
        Err(error) => Err(error.into()),
    }
}

/// Has the working set read from the disk by a process of its own: the zygote is ready meanwhile, and its first
/// copies wait for the pages they touch, not for all. A hint; where it fails, pages are read when touched.
fn read_ahead(ram: &GuestRam, runs: &[PageRun]) {
    if !runs.is_empty() && matches!(fork::fork(), Ok(Side::Child)) {
        fork::close_all_but(&[]);
        let _ = rustix::thread::set_name(c"forkd-readahead");
        ram.prefetch(runs);
        fork::exit(0);
    }
}

/// Leaves out of the state what a fresh vCPU has anyway, once for all copies.
pub(crate) fn lighten(seed: &mut Seed) -> Result<(), ZygoteError> {
    let (vm, _) = Vm::new(&seed.kvm, seed.ram.memory())?;
    for (index, vcpu) in (0..).zip(&mut seed.state.vcpus) {
        vcpu.drop_default_msrs(&seed.kvm, &vm, index)?;
    }
    Ok(())
}

/// Why a node is served no longer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Left {
    /// It closed the connection, or said something that makes no sense.
    Gone,
    /// It wants the process to end.
    Done,
}

/// Serves the node until it closes the connection or asks the zygote to end.
pub fn serve(seed: &Seed, control: &OwnedFd) -> Left {
    loop {
        let (command, fds) = match monitor::receive::<Command>(control) {
            Ok(message) => message,
            Err(FrameError::Closed | FrameError::Io(_)) => return Left::Gone,
            Err(error) => {
                let _ = monitor::send(control, &Event::Failed { error: chain(&error) }, &[]);
                return Left::Gone;
            }
        };
        let event = match command {
            Command::Kill => return Left::Done,
            Command::Fork { fds: roles, name, disk_bytes } => {
                let overlays = disks::overlays_of(&seed.disks);
                fork_child(seed, &roles, fds, |carried| {
                    CopyRequest::take(carried, name, overlays)
                        .map(|request| Child::Copy(request.limited_to(disk_bytes)))
                })
            }
            Command::Freeze { fds: roles, name } => {
                fork_child(seed, &roles, fds, |carried| FreezeRequest::take(carried, name).map(Child::Frozen))
            }
            Command::Snapshot { fds: roles, contents } => {
                fork_child(seed, &roles, fds, |carried| SnapshotRequest::take(carried, contents).map(Child::Writer))
            }
            Command::Pages => match seed.ram.page_map() {
                Ok(map) => Event::pages(&map.present, &map.private),
                Err(error) => Event::Failed { error: chain(&error) },
            },
        };
        if monitor::send(control.as_fd(), &event, &[]).is_err() {
            return Left::Gone;
        }
    }
}

/// Forks the child that `take` finds among the carried descriptors.
fn fork_child(
    seed: &Seed,
    roles: &[Role],
    fds: Vec<OwnedFd>,
    take: impl FnOnce(&mut Carried) -> Result<Child, CarriedError>,
) -> Event {
    let started = Instant::now();
    let failed = |error: &dyn std::error::Error| Event::Failed { error: chain(error) };
    let taken = Carried::new(roles, fds).and_then(|mut carried| Ok((take(&mut carried)?, carried.take(Role::Cgroup))));
    let (child, group) = match taken {
        Ok(taken) => taken,
        Err(error) => return failed(&error),
    };
    match fork::fork_into(group.as_ref()) {
        Ok(Side::Child) => child.live(seed, started),
        Ok(Side::Parent(pid)) => {
            let mut stages = forkd_types::StageTimings::default();
            stages.record("fork", started.elapsed());
            Event::Forked { pid, pause_us: 0, stages }
        }
        Err(error) => failed(&error),
    }
}
