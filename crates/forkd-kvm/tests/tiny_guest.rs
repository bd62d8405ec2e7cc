//! A few bytes of guest code on the real `/dev/kvm`, emulated or not.
//!
//! Where there is no `/dev/kvm`, every test is counted as ignored and the reason is printed.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use forkd_kvm::vcpu::{RunOutcome, install_kick_handler};
use forkd_kvm::{GuestMemory, Kvm, Vcpu, VcpuExit, Vm, cpuid, kvm_regs};
use libtest_mimic::{Arguments, Failed, Trial};
use vm_memory::{Bytes, GuestAddress};

/// For ever: increment the byte at 0x3000 and write it to port 0xe9.
const COUNTER: [u8; 12] = [0xa0, 0x00, 0x30, 0xfe, 0xc0, 0xa2, 0x00, 0x30, 0xe6, 0xe9, 0xeb, 0xf4];
/// For ever: nothing.
const SPIN: [u8; 2] = [0xeb, 0xfe];

type Test = fn() -> Result<(), Failed>;

fn main() {
    let arguments = Arguments::from_args();
    let missing = Kvm::open().err();
    if let Some(reason) = &missing {
        let _ = writeln!(std::io::stderr(), "SKIPPED, every test of this file: {reason}");
    }
    let trials: [(&str, Test); 4] = [
        ("a_saved_vcpu_goes_on_in_a_second_machine", a_saved_vcpu_goes_on_in_a_second_machine),
        ("a_kick_gets_a_spinning_guest_out", a_kick_gets_a_spinning_guest_out),
        ("a_kick_before_entry_is_not_lost", a_kick_before_entry_is_not_lost),
        ("a_guest_is_not_offered_virtualisation_or_amx", a_guest_is_not_offered_virtualisation_or_amx),
    ];
    let trials = trials.map(|(name, run)| Trial::test(name, run).with_ignored_flag(missing.is_some()));
    libtest_mimic::run(&arguments, trials.into()).exit();
}

struct Guest {
    kvm: Kvm,
    vm: Vm,
    memory: GuestMemory,
}

fn guest(code: &[u8]) -> Result<Guest, Failed> {
    install_kick_handler()?;
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 2 << 20)])?;
    memory.write_slice(code, GuestAddress(0x1000))?;
    let kvm = Kvm::open()?;
    let (vm, _) = Vm::new(&kvm, &memory)?;
    Ok(Guest { kvm, vm, memory })
}

fn vcpu_at_code(guest: &Guest) -> Result<Vcpu, Failed> {
    let vcpu = Vcpu::new(&guest.kvm, &guest.vm, 0)?;
    vcpu.set_cpuid(&cpuid::for_vcpu(&guest.kvm, 0, 1))?;
    let mut sregs = vcpu.sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs { rip: 0x1000, rflags: 2, ..Default::default() })?;
    Ok(vcpu)
}

fn next_output(vcpu: &mut Vcpu) -> Result<u8, Failed> {
    match vcpu.run()? {
        RunOutcome::Exit(VcpuExit::IoOut(0xe9, data)) => Ok(data[0]),
        other => Err(format!("expected output, got {other:?}").into()),
    }
}

fn a_saved_vcpu_goes_on_in_a_second_machine() -> Result<(), Failed> {
    let first = guest(&COUNTER)?;
    let mut vcpu = vcpu_at_code(&first)?;
    assert_eq!((next_output(&mut vcpu)?, next_output(&mut vcpu)?), (1, 2));
    // The port write is completed by the kick; without that a real processor would repeat it.
    vcpu.kicker().kick();
    assert!(matches!(vcpu.run()?, RunOutcome::Kicked));
    let state = vcpu.save(&first.kvm, &cpuid::for_vcpu(&first.kvm, 0, 1))?;
    let chips = first.vm.save_chips()?;

    let second = guest(&COUNTER)?;
    second.memory.write_obj(2u8, GuestAddress(0x3000))?;
    second.vm.restore_chips(&chips)?;
    let mut copy = Vcpu::new(&second.kvm, &second.vm, 0)?;
    copy.restore(&state)?;
    assert_eq!(next_output(&mut copy)?, 3);
    let again = copy_regs_after_kick(&mut copy)?;
    assert_eq!(again.rip, vcpu.regs()?.rip, "both stand behind the same instruction");

    let mut light = state.clone();
    light.drop_default_msrs(&second.kvm, &guest(&SPIN)?.vm, 0)?;
    assert!(light.msrs.len() < state.msrs.len(), "{} registers, none at its default", state.msrs.len());
    let third = guest(&COUNTER)?;
    let mut lighter = Vcpu::new(&third.kvm, &third.vm, 0)?;
    lighter.restore(&light)?;
    assert_eq!(next_output(&mut lighter)?, 1);
    Ok(())
}

fn copy_regs_after_kick(vcpu: &mut Vcpu) -> Result<kvm_regs, Failed> {
    vcpu.kicker().kick();
    assert!(matches!(vcpu.run()?, RunOutcome::Kicked));
    Ok(vcpu.regs()?)
}

fn a_kick_gets_a_spinning_guest_out() -> Result<(), Failed> {
    let guest = guest(&SPIN)?;
    let mut vcpu = vcpu_at_code(&guest)?;
    let kicker = Arc::new(vcpu.kicker());
    let out = Arc::new(AtomicBool::new(false));
    let thread = std::thread::spawn({
        let (kicker, out) = (kicker.clone(), out.clone());
        move || {
            kicker.attach_current_thread();
            let kicked = matches!(vcpu.run(), Ok(RunOutcome::Kicked));
            out.store(true, Ordering::Release);
            kicked
        }
    });
    std::thread::sleep(Duration::from_millis(50));
    assert!(!out.load(Ordering::Acquire), "the guest left by itself");
    kicker.kick();
    assert!(thread.join().expect("the thread does not panic"));
    Ok(())
}

fn a_kick_before_entry_is_not_lost() -> Result<(), Failed> {
    let guest = guest(&SPIN)?;
    let mut vcpu = vcpu_at_code(&guest)?;
    let kicker = vcpu.kicker();
    kicker.kick();
    assert!(matches!(vcpu.run()?, RunOutcome::Kicked));
    Ok(())
}

fn a_guest_is_not_offered_virtualisation_or_amx() -> Result<(), Failed> {
    let kvm = Kvm::open()?;
    for index in 0..4u8 {
        for entry in cpuid::for_vcpu(&kvm, index, 4) {
            match entry.function {
                1 => {
                    assert_eq!(entry.ecx & 1 << 5, 0, "VMX");
                    assert_eq!(entry.ebx >> 24, u32::from(index), "APIC id");
                }
                7 if entry.index == 0 => assert_eq!(entry.edx & (1 << 22 | 1 << 24 | 1 << 25), 0, "AMX"),
                0x8000_0001 => assert_eq!(entry.ecx & 1 << 2, 0, "SVM"),
                0xb => assert_eq!(entry.edx, u32::from(index), "x2APIC id"),
                _ => {}
            }
        }
    }
    Ok(())
}
