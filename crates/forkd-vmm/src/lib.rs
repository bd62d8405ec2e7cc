//! One virtual machine a process: boot, vCPU threads, quiesce, save, restore, fork.
//!
//! The one idea: *to copy a machine, fork its monitor.* Guest memory is a private mapping, so the
//! kernel copies it on write; CPU and device state are plain structs that the child inherits; the
//! child opens a new KVM machine over the memory it already has.
//!
//! | module | owns |
//! |---|---|
//! | [`launch`], [`disks`] | the first message, what it carries, and what becomes of it |
//! | [`machine`], [`device_set`], [`bus`] | a machine and its parts |
//! | [`boot`] | kernel, ACPI tables, first registers |
//! | [`vcpu_thread`], [`gate`] | running vCPUs, and stopping all of them |
//! | [`event_loop`], [`wake`] | devices and commands |
//! | [`seed`], [`fork`], [`copy`], [`zygote`] | making copies |
//! | [`state`], [`writer`] | machine state in memory and on disk |

pub mod address_map;
pub mod boot;
pub mod bus;
pub mod carried;
pub mod copy;
pub mod device_set;
pub mod disks;
pub mod event_loop;
pub mod fork;
pub mod gate;
pub mod launch;
pub mod machine;
pub mod raw;
pub mod seed;
pub mod state;
pub mod stopwatch;
pub mod vcpu_thread;
pub mod wake;
pub mod writer;
pub mod zygote;
