//! The first message of a fresh monitor, and what becomes of it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use forkd_kvm::{Kvm, KvmError};
use forkd_proto::monitor::{self, BootConfig, Event, Launch, LaunchAction, Role};

use crate::boot::BootSource;
use crate::carried::{Carried, CarriedError};
use crate::disks::{self, AssemblyError};
use crate::event_loop::{Ending, EventLoop};
use crate::machine::{Machine, MachineError, Resources};
use crate::state::MachineConfig;
use crate::stopwatch::Stopwatch;
use crate::vcpu_thread::chain;
use crate::{fork, zygote};

/// Why a machine cannot be booted.
#[derive(Debug, thiserror::Error)]
enum BootFailure {
    #[error("the launch message is malformed")]
    Carried(#[from] CarriedError),
    #[error("cannot use KVM")]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Disks(#[from] AssemblyError),
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// Receives the launch message on `control` and does what it says; returns the exit code.
pub fn run(control: OwnedFd) -> i32 {
    fork::reap_children_automatically();
    let (launch, fds): (Launch, _) = match monitor::receive(&control) {
        Ok(message) => message,
        Err(error) => return fail(&control, &error),
    };
    let mut carried = match Carried::new(&launch.fds, fds) {
        Ok(carried) => carried,
        Err(error) => return fail(&control, &error),
    };
    match launch.action {
        LaunchAction::Zygote(config) => match zygote::load(&config, &mut carried) {
            Ok((seed, warnings)) => {
                drop(carried);
                let config = &seed.state.config;
                let (vcpus, memory_bytes, network) = (config.vcpus, config.memory_bytes, config.mac.is_some());
                let ready = Event::Ready { vcpus, memory_bytes, warnings, network };
                if monitor::send(&control, &ready, &[]).is_ok() {
                    zygote::serve(&seed, &control);
                }
                0
            }
            Err(error) => fail(&control, &error),
        },
        LaunchAction::Boot(config) => match boot(&config, &mut carried) {
            Ok((machine, stopwatch)) => {
                let listener = carried.take(Role::ControlListener);
                drop(carried);
                let _ = monitor::send(&control, &Event::Running { stages: stopwatch.finish() }, &[]);
                i32::from(EventLoop::new(machine, control, listener).run() != Ending::Stopped)
            }
            Err(error) => fail(&control, &error),
        },
    }
}

fn fail(control: &OwnedFd, error: &dyn std::error::Error) -> i32 {
    let _ = monitor::send(control, &Event::Failed { error: chain(error) }, &[]);
    1
}

fn boot(config: &BootConfig, carried: &mut Carried) -> Result<(Machine, Stopwatch), BootFailure> {
    let mut stopwatch = Stopwatch::since(Instant::now());
    let kvm = Arc::new(Kvm::from_fd(carried.require(Role::Kvm)?)?);
    let source = BootSource {
        kernel: carried.require(Role::Kernel)?.into(),
        initramfs: carried.take(Role::Initramfs).map(File::from),
        kernel_args: config.kernel_args.clone(),
    };
    let images = disks::assemble(&config.disks, carried)?;
    let overlays = carried.files(Role::DiskOverlay, disks::overlays_of(&images))?;
    let resources = Resources {
        disks: disks::over(images, overlays),
        vsock: carried.require(Role::VsockListener)?,
        console: carried.require(Role::Console)?.into(),
        tap: carried.take(Role::Tap),
    };
    let machine_config = MachineConfig {
        vcpus: config.vcpus,
        memory_bytes: config.memory_bytes,
        disks: config.disks.clone(),
        mac: config.mac,
        guest_cid: config.guest_cid,
    };
    stopwatch.lap("open");
    let mut machine = Machine::boot(kvm, machine_config, resources, source)?;
    stopwatch.lap("load");
    machine.start()?;
    stopwatch.lap("start");
    Ok((machine, stopwatch))
}
