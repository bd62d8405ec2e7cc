//! One virtual machine of this process: built by booting or by restoring, then run.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use forkd_devices::InterruptLine;
use forkd_devices::block::{BlockDisk, SharedDisk};
use forkd_devices::vmgenid::VmGenId;
use forkd_kvm::{Kvm, KvmError, Vcpu, Vm, cpuid, vcpu};
use forkd_memory::{GuestRam, MemoryLayout, MemorySizeError, RamError};
use rustix::rand::GetRandomFlags;

use crate::address_map::{DEVICE_SLOTS, EVENT_GSI, GENERATION_ID};
use crate::boot::{self, BootError, BootSource};
use crate::bus::Bus;
use crate::device_set;
use crate::gate::{Gate, PauseError, Paused};
use crate::state::{MachineConfig, MachineState};
use crate::stopwatch::Stopwatch;
use crate::vcpu_thread::{self, VcpuContext};
use crate::wake::Wake;

/// The most vCPUs of a machine.
pub const VCPU_LIMIT: u8 = 8;

/// How long vCPUs may take to leave the guest. A kick takes microseconds; a host that is badly
/// overcommitted takes longer, and its guests are better left running than stopped for seconds.
pub const PAUSE_DEADLINE: Duration = Duration::from_secs(2);

/// Why a machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Number of vCPUs out of range.
    #[error("{0} vCPUs; a machine has 1 to {VCPU_LIMIT}")]
    Vcpus(u8),
    /// Too many disks.
    #[error("{0} disks; a machine has at most {limit}", limit = device_set::DISK_LIMIT)]
    Disks(usize),
    /// Memory size out of range.
    #[error(transparent)]
    MemorySize(#[from] MemorySizeError),
    /// Guest memory cannot be had.
    #[error("cannot set up guest memory")]
    Ram(#[from] RamError),
    /// A KVM call failed.
    #[error("cannot set up the virtual machine")]
    Kvm(#[from] KvmError),
    /// The kernel cannot be booted.
    #[error("cannot load what is to be booted")]
    Boot(#[from] BootError),
    /// A device cannot be made or restored.
    #[error("cannot set up the {device} device: {reason}")]
    Device {
        /// Which.
        device: &'static str,
        /// Why.
        reason: String,
    },
    /// A call of the operating system failed.
    #[error("cannot {attempt}")]
    System {
        /// What was attempted.
        attempt: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// What a machine has that no other machine may share.
#[derive(Debug)]
pub struct Resources {
    /// Disks in order.
    pub disks: Vec<BlockDisk>,
    /// Listening unix socket of the vsock device.
    pub vsock: OwnedFd,
    /// Where the serial console goes.
    pub console: File,
    /// Tap of the network interface.
    pub tap: Option<OwnedFd>,
}

/// A machine that runs, or is about to.
pub struct Machine {
    /// What it was built as.
    pub config: MachineConfig,
    /// Its memory.
    pub ram: GuestRam,
    /// `/dev/kvm`.
    pub kvm: Arc<Kvm>,
    /// Its devices.
    pub bus: Arc<Bus>,
    /// How its vCPUs and devices get the event loop's attention.
    pub wake: Arc<Wake>,
    /// Its disks, shared with the block devices.
    pub disks: Vec<SharedDisk>,
    vm: Vm,
    gate: Arc<Gate>,
    vcpus: Vec<Vcpu>,
    cpuids: Arc<Vec<Vec<kvm_bindings::kvm_cpuid_entry2>>>,
}

/// An interrupt line of the machine's chips.
struct Line {
    vm: Vm,
    gsi: u32,
}

impl InterruptLine for Line {
    fn trigger(&self) {
        // It fails only for a line that does not exist, which the address map rules out.
        let _ = self.vm.pulse_interrupt(self.gsi);
    }
}

/// Makes the interrupt line `gsi` of `vm`.
fn line(vm: &Vm, gsi: u32) -> Arc<dyn InterruptLine> {
    Arc::new(Line { vm: vm.clone(), gsi })
}

impl Machine {
    /// Builds a machine that will boot `source`.
    pub fn boot(
        kvm: Arc<Kvm>,
        config: MachineConfig,
        resources: Resources,
        source: BootSource,
    ) -> Result<Self, MachineError> {
        let ram = GuestRam::anonymous(MemoryLayout::new(config.memory_bytes)?)?;
        let has_disk = !resources.disks.is_empty();
        let machine = Self::build(kvm, config, resources, ram)?;
        let occupied: Vec<usize> = (0..DEVICE_SLOTS).filter(|slot| machine.bus.slots[*slot].is_some()).collect();
        boot::load(source, &machine.ram, &occupied, machine.config.vcpus, has_disk, &machine.vcpus[0])?;
        Ok(machine)
    }

    /// Builds a machine whose vCPUs are as after reset, over `ram`.
    pub fn build(
        kvm: Arc<Kvm>,
        config: MachineConfig,
        resources: Resources,
        ram: GuestRam,
    ) -> Result<Self, MachineError> {
        if !(1..=VCPU_LIMIT).contains(&config.vcpus) {
            return Err(MachineError::Vcpus(config.vcpus));
        }
        let (vm, _) = Vm::new(&kvm, ram.memory())?;
        let cpuids: Vec<_> = (0..config.vcpus).map(|index| cpuid::for_vcpu(&kvm, index, config.vcpus)).collect();
        let mut vcpus = Vec::new();
        for (index, entries) in (0..).zip(&cpuids) {
            let vcpu = Vcpu::new(&kvm, &vm, index)?;
            vcpu.set_cpuid(entries)?;
            vcpus.push(vcpu);
        }
        let devices = device_set::create(&config, resources, &ram, &|gsi| line(&vm, gsi))?;
        Self::assemble(kvm, config, ram, vm, vcpus, cpuids, devices)
    }

    /// The first vCPU of a machine that was not started yet.
    pub fn first_vcpu(&self) -> Option<&Vcpu> {
        self.vcpus.first()
    }

    /// Builds a machine that goes on from `state` over memory that holds what it held then.
    pub fn restore(
        kvm: Arc<Kvm>,
        state: &MachineState,
        ram: GuestRam,
        resources: Resources,
        stopwatch: &mut Stopwatch,
    ) -> Result<Self, MachineError> {
        let (vm, times) = Vm::new(&kvm, ram.memory())?;
        stopwatch.lap_parts(&[("create_vm", times.create), ("memory_slot", times.memory), ("irqchip", times.irqchip)]);
        vm.restore_chips(&state.chips)?;
        stopwatch.lap("chips");
        let mut vcpus = Vec::new();
        for (index, saved) in (0..).zip(&state.vcpus) {
            let vcpu = Vcpu::new(&kvm, &vm, index)?;
            vcpu.restore(saved)?;
            vcpu.notify_clock_stopped();
            vcpus.push(vcpu);
        }
        stopwatch.lap("vcpus");
        let devices = device_set::restore(state, resources, &ram, &|gsi| line(&vm, gsi))?;
        let cpuids = state.vcpus.iter().map(|vcpu| vcpu.cpuid.clone()).collect();
        let machine = Self::assemble(kvm, state.config.clone(), ram, vm, vcpus, cpuids, devices)?;
        stopwatch.lap("devices");
        Ok(machine)
    }

    fn assemble(
        kvm: Arc<Kvm>,
        config: MachineConfig,
        ram: GuestRam,
        vm: Vm,
        mut vcpus: Vec<Vcpu>,
        cpuids: Vec<Vec<kvm_bindings::kvm_cpuid_entry2>>,
        devices: device_set::DeviceSet,
    ) -> Result<Self, MachineError> {
        let wake =
            Wake::new().map_err(|source| MachineError::System { attempt: "make an event descriptor", source })?;
        let wake = Arc::new(wake);
        let gate = Arc::new(Gate::new(vcpus.iter_mut().map(Vcpu::kicker).collect()));
        let bus = Arc::new(Bus::new(devices.slots, devices.serial, wake.clone()));
        Ok(Self { config, ram, kvm, bus, wake, disks: devices.disks, vm, gate, vcpus, cpuids: Arc::new(cpuids) })
    }

    /// Gives the copy a generation of its own and tells the guest, before its first instruction.
    ///
    /// The guest's kernel reseeds its random generator when it hears of it.
    pub fn renew_generation(&self) -> Result<(), MachineError> {
        let mut id = [0; 16];
        let system = |source| MachineError::System { attempt: "draw a generation id", source };
        rustix::rand::getrandom(&mut id, GetRandomFlags::empty()).map_err(|error| system(error.into()))?;
        VmGenId { address: GENERATION_ID }
            .set(self.ram.memory(), id)
            .map_err(|error| MachineError::Device { device: "generation id", reason: error.to_string() })?;
        Ok(self.vm.pulse_interrupt(EVENT_GSI)?)
    }

    /// Lets devices say what they have to say to a guest that was just restored.
    pub fn announce_restore(&self) {
        self.bus.slots.iter().flatten().for_each(|transport| transport.after_restore());
    }

    /// Starts the vCPU threads.
    pub fn start(&mut self) -> Result<(), MachineError> {
        let system = |attempt| move |source| MachineError::System { attempt, source };
        vcpu::install_kick_handler().map_err(system("install the signal handler"))?;
        let context = VcpuContext {
            kvm: self.kvm.clone(),
            bus: self.bus.clone(),
            gate: self.gate.clone(),
            wake: self.wake.clone(),
            cpuids: self.cpuids.clone(),
        };
        for vcpu in self.vcpus.drain(..) {
            vcpu_thread::start(vcpu, context.clone()).map_err(system("start a vCPU thread"))?;
        }
        Ok(())
    }

    /// Stops all vCPUs, lets the devices finish what the guest has asked of them, and reads the
    /// machine's state. The machine goes on when the guard is dropped.
    pub fn pause(&self) -> Result<(Paused<'_>, MachineState), PauseError> {
        let (paused, vcpus) = self.gate.pause(PAUSE_DEADLINE)?;
        for (slot, queue) in self.wake.take_queues() {
            self.process_queue(slot, queue);
        }
        let chips = self.vm.save_chips().map_err(|source| PauseError::Save { index: 0, source })?;
        let devices = self.bus.slots.iter().map(|slot| slot.as_ref().map(|transport| transport.save())).collect();
        let serial = self.bus.serial.save();
        Ok((paused, MachineState { config: self.config.clone(), vcpus, chips, devices, serial }))
    }

    /// How many of its disks it can write to.
    pub fn writable_disks(&self) -> usize {
        self.disks.iter().filter(|disk| !disk.lock().is_read_only()).count()
    }

    /// Serves a queue that the guest notified.
    pub fn process_queue(&self, slot: usize, queue: u16) {
        if let Some(transport) = &self.bus.slots[slot] {
            transport.process_queue(queue);
        }
    }

    /// Writes out what the console still holds back.
    pub fn flush_console(&self) {
        self.bus.serial.flush();
    }
}
