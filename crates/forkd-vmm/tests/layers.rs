//! Snapshots over snapshots on the real `/dev/kvm`, emulated or not: what a layer holds, and what a chain
//! of them gives back.
//!
//! Each generation is a process of its own, which loads the chain as a zygote does, runs a tiny guest
//! from it, changes memory and disk further as devices do, and writes a layer over the chain. Beside it
//! the process leaves copies of all memory and of the disk, as it found them and as it left them.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use forkd_devices::block::{BlockDisk, DiskImage};
use forkd_kvm::{Kvm, kvm_regs};
use forkd_memory::{GuestRam, Layer, LayerWriter, MemoryLayout};
use forkd_proto::monitor::{self, Contents, Role, SnapshotFacts, ZygoteConfig};
use forkd_types::{PAGE_SIZE, PageCount, PageRun};
use forkd_vmm::carried::Carried;
use forkd_vmm::fork::{self, Side};
use forkd_vmm::machine::{Machine, Resources};
use forkd_vmm::seed::Seed;
use forkd_vmm::state::MachineConfig;
use forkd_vmm::stopwatch::Stopwatch;
use forkd_vmm::writer;
use forkd_vmm::zygote::{self, ZygoteError};
use libtest_mimic::{Arguments, Failed, Trial};
use vm_memory::{Bytes, GuestAddress};

const MEMORY: u64 = 128 << 20;
/// Not a whole number of blocks.
const DISK: u64 = (8 << 20) - 1024;
const PAGE: usize = PAGE_SIZE as usize;
const DEPTH: u64 = 8;

/// Where the guest's code is.
const CODE: u64 = 0x1000;
/// Prints and halts when it boots. In each copy it goes on: increments the generation, the byte at 0x3000,
/// writes it to 16 KiB from 0x10000 + generation × 8 KiB on, so that half of what one generation wrote is
/// overwritten by the next, prints and halts.
const PROGRAM: [u8; 42] = [
    0xb0, 0x0a, //             mov  al, '\n'
    0xba, 0xf8, 0x03, //       mov  dx, 0x3f8
    0xee, //                   out  dx, al
    0xf4, //                   hlt
    0xa0, 0x00, 0x30, //       mov  al, [0x3000]
    0xfe, 0xc0, //             inc  al
    0xa2, 0x00, 0x30, //       mov  [0x3000], al
    0xb4, 0x00, //             mov  ah, 0
    0x89, 0xc3, //             mov  bx, ax
    0xc1, 0xe3, 0x09, //       shl  bx, 9
    0x81, 0xc3, 0x00, 0x10, // add  bx, 0x1000
    0x8e, 0xc3, //             mov  es, bx
    0x31, 0xff, //             xor  di, di
    0xb9, 0x00, 0x40, //       mov  cx, 0x4000
    0xfc, //                   cld
    0xf3, 0xaa, //             rep  stosb
    0xb0, 0x0a, //             mov  al, '\n'
    0xee, //                   out  dx, al
    0xf4, //                   hlt
    0xeb, 0xdd, //             jmp  behind the first halt
];
/// Offsets of the instructions behind the two halts.
const HALTED: [u64; 2] = [CODE + 7, CODE + 40];

/// Any failure, in words.
type Failure = Box<dyn std::error::Error + Send + Sync>;
type Test = fn() -> Result<(), Failed>;

fn main() {
    let arguments = Arguments::from_args();
    let missing = File::options().read(true).write(true).open("/dev/kvm").err();
    if let Some(reason) = &missing {
        let _ = writeln!(io::stderr(), "SKIPPED, every test of this file: cannot open /dev/kvm: {reason}");
    }
    let trials: [(&str, Test); 2] = [
        ("a_layer_holds_what_changed_and_the_chain_gives_all_of_it_back", chain_of_layers),
        ("a_layer_over_a_base_of_another_size_is_refused", layers_of_another_size),
    ];
    let trials = trials.map(|(name, run)| Trial::test(name, run).with_ignored_flag(missing.is_some()));
    libtest_mimic::run(&arguments, trials.into()).exit();
}

/// A directory of one generation: `vmstate`, `memory.layer`, `disk-0.layer`, and beside them `facts`,
/// `{memory,disk}.{found,left}`.
struct Generation(PathBuf);

impl Generation {
    fn file(&self, name: &str) -> io::Result<File> {
        File::open(self.0.join(name))
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        std::fs::read(self.0.join(name))
    }

    fn layer(&self, name: &str) -> Result<Layer, Failure> {
        let layer = Layer::open(self.file(name)?)?;
        layer.verify(|_| ())?;
        Ok(layer)
    }
}

fn chain_of_layers() -> Result<(), Failed> {
    let scratch = tempfile::tempdir()?;
    let base_image = scratch.path().join("base.img");
    std::fs::write(&base_image, noise(1, 1 << 20))?;
    let mut chain = Vec::new();
    for depth in 0..=DEPTH {
        let generation = Generation(scratch.path().join(depth.to_string()));
        std::fs::create_dir(&generation.0)?;
        in_a_process_of_its_own(&generation, || match depth {
            0 => boot(&generation, &base_image),
            _ => grow(&chain, &generation, &base_image, depth),
        })?;
        let facts: SnapshotFacts = serde_json::from_slice(&generation.read("facts")?)?;
        if let Some(parent) = chain.last() {
            check(parent, &generation, &facts, depth)?;
        }
        chain.push(generation);
    }
    Ok(())
}

/// Compares a layer with what its writer had, page by page and block by block.
fn check(parent: &Generation, child: &Generation, facts: &SnapshotFacts, depth: u64) -> Result<(), Failed> {
    let mut changed_bytes = 0;
    for (kind, file) in [("memory", writer::MEMORY_FILE.to_owned()), ("disk", writer::disk_file(0))] {
        let before = parent.read(&format!("{kind}.left"))?;
        let found = child.read(&format!("{kind}.found"))?;
        assert!(found == before, "depth {depth}: the chain's {kind} is not what its writer had");
        let after = child.read(&format!("{kind}.left"))?;
        let layer = child.layer(&file)?;
        let (mut stored, mut zeroed) = (Vec::new(), Vec::new());
        for (number, (old, new)) in (0..).zip(before.chunks(PAGE).zip(after.chunks(PAGE))) {
            match new.iter().all(|byte| *byte == 0) {
                _ if new == old => {}
                true => PageRun::push(&mut zeroed, number),
                false => PageRun::push(&mut stored, number),
            }
        }
        assert_eq!(layer.data(), stored, "depth {depth}: {kind} stored");
        assert_eq!(layer.zero(), zeroed, "depth {depth}: {kind} marked zero");
        assert!(!stored.is_empty() && !zeroed.is_empty(), "depth {depth}: the test changes too little {kind}");
        changed_bytes += PageRun::total(&stored).bytes();
        let on_disk = child.file(&file)?.metadata()?.blocks() * 512;
        let limit = PageRun::total(&stored).bytes() * 11 / 10;
        assert!(on_disk <= limit, "depth {depth}: {file} takes {on_disk} bytes, more than {limit}");
        let told = match kind {
            "memory" => (facts.memory_digest, facts.memory_pages, facts.memory_zero_pages),
            _ => (facts.disks[0].0, facts.disks[0].1, facts.disk_zero_blocks[0]),
        };
        assert_eq!(told, (layer.digest(), PageRun::total(&stored).0, PageRun::total(&zeroed).0), "{kind}");
    }
    let state = child.file(writer::STATE_FILE)?.metadata()?.len();
    let taken = facts.stored_bytes;
    assert!((changed_bytes..changed_bytes * 11 / 10 + state + PAGE_SIZE).contains(&taken), "{taken} bytes stored");
    Ok(())
}

/// Runs `work` in a forked child, because a machine lives as long as its process.
fn in_a_process_of_its_own(generation: &Generation, work: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failed> {
    let failure = generation.0.join("failure");
    let pid = match fork::fork()? {
        Side::Parent(pid) => rustix::process::Pid::from_raw(pid).expect("a child's number is positive"),
        Side::Child => {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            let text = match outcome {
                Ok(Ok(())) => fork::exit(0),
                Ok(Err(error)) => with_causes(&*error),
                Err(_) => "it panicked".to_owned(),
            };
            let _ = std::fs::write(failure, text);
            fork::exit(1);
        }
    };
    let (_, status) =
        rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty())?.expect("it waits for the end");
    if status.exit_status() == Some(0) {
        return Ok(());
    }
    let text = std::fs::read_to_string(failure).unwrap_or_else(|_| format!("it ended with {status:?}"));
    Err(format!("{}: {text}", generation.0.display()).into())
}

/// An error and what caused it.
fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Boots the guest and writes a base.
fn boot(generation: &Generation, base_image: &Path) -> Result<(), Failure> {
    let ram = GuestRam::anonymous(MemoryLayout::new(MEMORY)?)?;
    ram.memory().write_slice(&PROGRAM, GuestAddress(CODE))?;
    ram.memory().write_slice(&noise(2, 4 << 20), GuestAddress(4 << 20))?;
    let (resources, console) = resources(vec![BlockDisk::new(File::open(base_image)?, DISK, Vec::new(), scratch()?)?])?;
    let config = MachineConfig { vcpus: 1, memory_bytes: MEMORY, disks: vec![DISK], mac: None, guest_cid: 3 };
    let kvm = Arc::new(Kvm::open()?);
    let machine = Machine::build(kvm, config, resources, ram)?;
    let vcpu = machine.first_vcpu().expect("it was not started yet");
    let mut sregs = vcpu.sregs()?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..Default::default() })?;
    run_and_write(machine, console, generation, Contents::Whole, |_| Ok(()))
}

/// Goes on from `chain` and writes a layer over it.
fn grow(chain: &[Generation], generation: &Generation, base_image: &Path, depth: u64) -> Result<(), Failure> {
    let backing = if depth.is_multiple_of(3) { monitor::Backing::TransparentHugePages } else { monitor::Backing::File };
    let config = ZygoteConfig { backing, prefetch: Vec::new() };
    let (seed, warnings) = zygote::load(&config, &mut carry(chain, base_image)?)?;
    assert_eq!(warnings, [""; 0]);
    leave(&generation.0, "found", &seed.ram, &seed.disks[0])?;
    let disks = seed.disks.iter().map(|image| Ok(image.clone().with_overlay(scratch()?))).collect::<io::Result<_>>()?;
    let (resources, console) = resources(disks)?;
    let mut stopwatch = Stopwatch::since(Instant::now());
    let machine = Machine::restore(seed.kvm, &seed.state, seed.ram, resources, &mut stopwatch)?;
    machine.announce_restore();
    machine.renew_generation()?;
    run_and_write(machine, console, generation, Contents::Changes, |machine| change(machine, depth))
}

/// Runs the guest to its next halt, lets `change` do more, and writes the snapshot.
fn run_and_write(
    mut machine: Machine,
    mut console: io::PipeReader,
    generation: &Generation,
    contents: Contents,
    change: impl FnOnce(&Machine) -> Result<(), Failure>,
) -> Result<(), Failure> {
    machine.start()?;
    console.read_exact(&mut [0])?;
    let (paused, mut state) = loop {
        let (paused, state) = machine.pause()?;
        if HALTED.contains(&state.vcpus[0].regs.rip) {
            break (paused, state);
        }
        drop(paused);
        std::thread::sleep(Duration::from_millis(1));
    };
    // No interrupt wakes the guest from its halt.
    state.vcpus[0].mp_state.mp_state = kvm_bindings::KVM_MP_STATE_RUNNABLE;
    change(&machine)?;
    let mut disks = Vec::new();
    for disk in &machine.disks {
        disk.lock().seal(scratch()?);
        disks.push(disk.lock().image()?);
    }
    let seed = Seed { kvm: machine.kvm.clone(), ram: machine.ram.clone(), state, disks };
    let directory: OwnedFd = File::open(&generation.0)?.into();
    let facts = writer::write(&seed, &directory, contents, &mut Stopwatch::since(Instant::now()))?;
    std::fs::write(generation.0.join("facts"), serde_json::to_vec(&facts)?)?;
    leave(&generation.0, "left", &seed.ram, &seed.disks[0])?;
    std::mem::forget(paused);
    Ok(())
}

/// Changes memory and disk in every way there is.
fn change(machine: &Machine, depth: u64) -> Result<(), Failure> {
    let memory = machine.ram.memory();
    let page_at = |page: u64| GuestAddress(page * PAGE_SIZE);
    let mut disk = machine.disks[0].lock();
    // Single pages and blocks here and there, and one long run that later generations map.
    for index in 0..60 {
        let random = u64::from_le_bytes(noise(depth * 1000 + index, 8).try_into().expect("eight bytes"));
        memory.write_slice(&noise(random, PAGE), page_at(0x200 + random % (MEMORY / PAGE_SIZE - 0x200)))?;
        let at = random % (DISK - 5000);
        disk.write_at(at, &noise(random, 1 + (random >> 40) as usize % 5000))?;
    }
    memory.write_slice(&noise(depth, 100 * PAGE), page_at(0x2000 + depth * 50))?;
    // Part of the base, and of the long run of the generation before, becomes zero.
    memory.write_slice(&[0; 2 * PAGE], page_at(0x400 + 5 * depth))?;
    memory.write_slice(&vec![0; 70 * PAGE], page_at(0x500 + 80 * depth))?;
    memory.write_slice(&[0; 3 * PAGE], page_at(0x2000 + depth * 50 - 3))?;
    disk.discard(depth * 10 * PAGE_SIZE, 3 * PAGE_SIZE)?;
    disk.write_zeroes((depth * 10 + 5) * PAGE_SIZE, PAGE_SIZE)?;
    // Changed, and changed back.
    let mut old = vec![0; 20 * PAGE];
    memory.read_slice(&mut old, page_at(0x480))?;
    memory.write_slice(&noise(7, old.len()), page_at(0x480))?;
    memory.write_slice(&old, page_at(0x480))?;
    disk.read_at(1000, &mut old)?;
    disk.write_at(1000, &noise(7, old.len()))?;
    disk.write_at(1000, &old)?;
    disk.seal(scratch()?);
    disk.write_at(DISK - 700, &noise(depth, 700))?;
    // Given back by the guest: a part of the base, and pages that an upper layer holds.
    machine.ram.release(0x7f0 * PAGE_SIZE, 8 * PAGE_SIZE);
    machine.ram.release((0x2000 + depth * 50 - 40) * PAGE_SIZE, 20 * PAGE_SIZE);
    machine.ram.release(0x10000, 4 * PAGE_SIZE);
    Ok(())
}

/// Writes memory and disk as they are, for comparison.
fn leave(directory: &Path, when: &str, ram: &GuestRam, disk: &DiskImage) -> Result<(), Failure> {
    let mut bytes = vec![0; MEMORY as usize];
    ram.memory().read_slice(&mut bytes, GuestAddress(0))?;
    write_sparse(&directory.join(format!("memory.{when}")), &bytes)?;
    let blocks = &mut bytes[..PageCount::covering(DISK).bytes() as usize];
    disk.read_blocks(0, blocks)?;
    write_sparse(&directory.join(format!("disk.{when}")), blocks)?;
    Ok(())
}

fn write_sparse(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let file = File::create_new(path)?;
    file.set_len(bytes.len() as u64)?;
    for (number, piece) in (0..).zip(bytes.chunks(1 << 16)) {
        if piece.iter().any(|byte| *byte != 0) {
            file.write_all_at(piece, number << 16)?;
        }
    }
    Ok(())
}

/// What a zygote of `chain` is sent.
fn carry(chain: &[Generation], base_image: &Path) -> Result<Carried, Failure> {
    let newest = chain.last().ok_or("a chain has at least a base")?;
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    let mut carried: Vec<(Role, OwnedFd)> = vec![
        (Role::Kvm, kvm.into()),
        (Role::VmState, newest.file(writer::STATE_FILE)?.into()),
        (Role::DiskBase, File::open(base_image)?.into()),
    ];
    for generation in chain {
        carried.push((Role::MemoryLayer, generation.file(writer::MEMORY_FILE)?.into()));
        carried.push((Role::DiskLayer, generation.file(&writer::disk_file(0))?.into()));
    }
    let (roles, fds): (Vec<_>, Vec<_>) = carried.into_iter().unzip();
    Ok(Carried::new(&roles, fds)?)
}

fn resources(disks: Vec<BlockDisk>) -> Result<(Resources, io::PipeReader), Failure> {
    use std::os::linux::net::SocketAddrExt;
    let address = SocketAddr::from_abstract_name(format!("forkd-layers-{}", std::process::id()))?;
    let (console, console_end) = io::pipe()?;
    let console_end = OwnedFd::from(console_end).into();
    let vsock = UnixListener::bind_addr(&address)?.into();
    Ok((Resources { disks, vsock, console: console_end, tap: None }, console))
}

fn scratch() -> io::Result<File> {
    tempfile::tempfile()
}

/// Bytes that look random, the same for the same seed.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

fn layers_of_another_size() -> Result<(), Failed> {
    let scratch = tempfile::tempdir()?;
    let base_image = scratch.path().join("base.img");
    std::fs::write(&base_image, noise(1, 1 << 20))?;
    let base = Generation(scratch.path().join("base"));
    std::fs::create_dir(&base.0)?;
    in_a_process_of_its_own(&base, || boot(&base, &base_image))?;
    let other = Generation(scratch.path().join("other"));
    for (file, pages) in [(writer::MEMORY_FILE.to_owned(), MEMORY + (2 << 20)), (writer::disk_file(0), DISK * 2)]
        .map(|(file, bytes)| (file, PageCount::covering(bytes)))
    {
        let _ = std::fs::remove_dir_all(&other.0);
        std::fs::create_dir(&other.0)?;
        for name in [writer::STATE_FILE, writer::MEMORY_FILE, &writer::disk_file(0)] {
            std::fs::copy(base.0.join(name), other.0.join(name))?;
        }
        std::fs::remove_file(other.0.join(&file))?;
        LayerWriter::new(File::create_new(other.0.join(&file))?, pages)?.finish()?;
        let config = ZygoteConfig { backing: monitor::Backing::File, prefetch: Vec::new() };
        let chain = [Generation(base.0.clone()), Generation(other.0.clone())];
        let error: ZygoteError = zygote::load(&config, &mut carry(&chain, &base_image)?).expect_err("another size");
        let text = with_causes(&error);
        let expected = base.layer(&file)?.pages().0;
        let says = format!("describes {} pages where {expected} were expected", pages.0);
        assert!(text.contains(&says), "{file}: {text}");
    }
    // The same layers without the one of another size are accepted.
    let config = ZygoteConfig { backing: monitor::Backing::File, prefetch: Vec::new() };
    zygote::load(&config, &mut carry(&[base], &base_image)?)?;
    Ok(())
}
