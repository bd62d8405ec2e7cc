//! How a machine is to be started: what the caller wishes, and what that means on this host.

use std::path::{Path, PathBuf};
use std::time::Duration;

use forkd_types::ByteSize;
use serde::{Deserialize, Serialize};

use crate::error::MachineError;
use crate::probe::{self, KvmVerdict};

/// Largest number of vCPUs by default: translated vCPUs are host threads that also burn time
/// waiting for each other.
const MAX_DEFAULT_VCPUS: usize = 4;

/// Largest memory by default.
const MAX_DEFAULT_MEMORY: ByteSize = ByteSize::gib(16);

/// Memory below this does not hold Debian, a daemon and one guest.
const LEAST_MEMORY: ByteSize = ByteSize::gib(1);

/// How the machine's processor is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// Nested hardware KVM if this host has it, else translation.
    #[default]
    Auto,
    /// QEMU translates the machine's code (TCG); works everywhere.
    Tcg,
    /// The host's KVM, with nested virtualisation.
    Kvm,
}

/// Debian's generic 6.12. The cloud flavour has neither 9p nor VMGENID.
const DEFAULT_KERNEL: &str = "apt:linux-image-6.12-amd64";

/// A directory of this host that the machine sees.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Share {
    /// Directory on the host.
    pub host: PathBuf,
    /// Where it appears in the machine; absolute, of letters, digits and `/._-`.
    pub guest: String,
    /// Whether the machine may write.
    pub writable: bool,
}

/// What the caller wishes. [`Default`] suits `forkd machine start` without flags.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StartOptions {
    /// Directory of forkd's programs, shared read-only at [`PROGRAMS`]; the directory of the running
    /// program when absent. `forkd-agent` must be in it.
    pub programs: Option<PathBuf>,
    /// QEMU; `qemu-system-x86_64` in `PATH` when absent.
    pub qemu: Option<PathBuf>,
    /// How the processor is made.
    pub accel: Accel,
    /// Number of vCPUs; the host's processors, at most 4, when absent.
    pub vcpus: Option<u8>,
    /// Memory; half of the host's, at most 16 GiB, when absent.
    pub memory: Option<ByteSize>,
    /// Size of the data disk when it is created; it takes space only as it fills.
    pub disk: ByteSize,
    /// Let the machine reach the network. Otherwise it reaches nothing but the forwarded ports.
    pub network: bool,
    /// The kernel that the machine itself runs, as [`forkd_image::KernelChoice`] reads it; guests inside
    /// choose theirs freely. Debian's generic 6.12 when absent.
    pub kernel: Option<String>,
    /// Further directories to share.
    pub shares: Vec<Share>,
    /// The command inside the machine that calls [`crate::keep_alive::run`]; without it translated
    /// machines are known to hang.
    pub keep_alive: Vec<String>,
    /// Run `forkd-controller` in the machine and forward its API.
    pub controller: bool,
    /// How long the machine may take to come up, preparation of its disks not counted.
    pub start_limit: Duration,
}

/// The machine's agent, also PID 1.
pub(crate) const AGENT: &str = "forkd-agent";

/// Where the machine sees the directory of forkd's programs.
pub const PROGRAMS: &str = "/forkd/bin";

impl Default for StartOptions {
    fn default() -> Self {
        Self {
            programs: None,
            qemu: None,
            accel: Accel::Auto,
            vcpus: None,
            memory: None,
            disk: ByteSize::gib(64),
            network: false,
            kernel: None,
            shares: Vec::new(),
            keep_alive: [format!("{PROGRAMS}/forkd"), "machine".into(), "keep-alive".into()].into(),
            controller: true,
            start_limit: Duration::from_secs(120),
        }
    }
}

/// [`StartOptions`] with every choice made. Kept in `machine.json` while the machine runs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Resolved {
    pub(crate) programs: PathBuf,
    pub(crate) qemu: PathBuf,
    pub(crate) hardware: bool,
    pub(crate) vcpus: u8,
    pub(crate) memory: ByteSize,
    pub(crate) disk: ByteSize,
    pub(crate) network: bool,
    pub(crate) kernel: String,
    pub(crate) shares: Vec<Share>,
    pub(crate) keep_alive: Vec<String>,
    pub(crate) controller: bool,
}

impl StartOptions {
    /// Makes every choice that the caller left open, and refuses what cannot work.
    pub(crate) fn resolve(&self) -> Result<Resolved, MachineError> {
        let programs = match &self.programs {
            Some(directory) => directory.clone(),
            None => directory_of_this_program()?,
        };
        let programs = programs.canonicalize().map_err(MachineError::file("find forkd's programs in", &programs))?;
        for share in &self.shares {
            share.check()?;
        }
        self.check_programs(&programs)?;
        Ok(Resolved {
            programs,
            qemu: find_qemu(self.qemu.as_deref())?,
            hardware: self.wants_hardware()?,
            vcpus: self.resolve_vcpus()?,
            memory: self.resolve_memory()?,
            disk: self.disk,
            network: self.network,
            kernel: self.kernel.clone().unwrap_or_else(|| DEFAULT_KERNEL.to_owned()),
            shares: self.shares.clone(),
            keep_alive: self.keep_alive.clone(),
            controller: self.controller,
        })
    }

    /// Whether what the machine will run from `programs` is there. The machine would find out only once
    /// it has booted.
    fn check_programs(&self, programs: &Path) -> Result<(), MachineError> {
        let keep_alive = self.keep_alive.first().and_then(|path| path.strip_prefix(PROGRAMS)?.strip_prefix('/'));
        let daemon: &[&str] = if self.controller { &["forkd-controller", "forkd-vmm"] } else { &[] };
        for program in [AGENT].into_iter().chain(keep_alive).chain(daemon.iter().copied()) {
            let path = programs.join(program);
            if !path.is_file() {
                return Err(MachineError::ProgramMissing { program: program.to_owned(), path });
            }
        }
        Ok(())
    }

    fn wants_hardware(&self) -> Result<bool, MachineError> {
        let obstacle = match self.accel {
            Accel::Tcg => return Ok(false),
            Accel::Auto | Accel::Kvm => obstacle_to_nesting(),
        };
        match obstacle {
            None => Ok(true),
            Some(_) if self.accel == Accel::Auto => Ok(false),
            Some(reason) => Err(MachineError::BadOption {
                option: "accel",
                value: "kvm".into(),
                reason: format!("{reason}; use --accel tcg"),
            }),
        }
    }

    fn resolve_vcpus(&self) -> Result<u8, MachineError> {
        match self.vcpus {
            Some(count @ 1..=64) => Ok(count),
            Some(count) => Err(MachineError::BadOption {
                option: "cpus",
                value: count.to_string(),
                reason: "a machine has 1 to 64".into(),
            }),
            None => {
                let host = std::thread::available_parallelism().map_or(1, usize::from);
                Ok(u8::try_from(host.min(MAX_DEFAULT_VCPUS)).expect("at most 4"))
            }
        }
    }

    fn resolve_memory(&self) -> Result<ByteSize, MachineError> {
        let host = host_memory();
        match self.memory {
            None => Ok(default_memory(host)),
            Some(size) if size < LEAST_MEMORY || size > host => Err(MachineError::BadOption {
                option: "memory",
                value: size.to_string(),
                reason: format!("a machine needs at least {LEAST_MEMORY}, and this host has {host}"),
            }),
            Some(size) => Ok(ByteSize::mib(size.as_mib())),
        }
    }
}

impl Resolved {
    /// How a running machine differs from what is now asked for, in words.
    pub(crate) fn differences(&self, wanted: &Self) -> Vec<String> {
        let mut differences = Vec::new();
        let mut compare = |what: &str, has: String, wants: String| {
            if has != wants {
                differences.push(format!("{what} is {has}, not {wants}"));
            }
        };
        compare("the program directory", self.programs.display().to_string(), wanted.programs.display().to_string());
        compare("the processor", self.processor(), wanted.processor());
        compare("memory", self.memory.to_string(), wanted.memory.to_string());
        let network = |open: bool| if open { "open" } else { "restricted" }.to_owned();
        compare("the network", network(self.network), network(wanted.network));
        compare("the kernel", self.kernel.clone(), wanted.kernel.clone());
        compare("the set of shares", format!("{:?}", self.shares), format!("{:?}", wanted.shares));
        differences
    }

    fn processor(&self) -> String {
        format!("{} vCPUs by {}", self.vcpus, if self.hardware { "KVM" } else { "translation" })
    }
}

impl Share {
    /// The guest path goes through a shell script and a mount table, so it is kept plain.
    fn check(&self) -> Result<(), MachineError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
        let refuse = |reason: &str| {
            Err(MachineError::BadOption { option: "share", value: self.guest.clone(), reason: reason.into() })
        };
        if !self.guest.starts_with('/') || self.guest.len() < 2 || !self.guest.chars().all(plain) {
            return refuse("the path in the machine must be absolute and of letters, digits and /._- only");
        }
        if self.guest.split('/').any(|part| part == "..") {
            return refuse("the path in the machine may not hold ..");
        }
        if !self.host.is_dir() {
            return refuse(&format!("{} is not a directory of this host", self.host.display()));
        }
        Ok(())
    }
}

fn directory_of_this_program() -> Result<PathBuf, MachineError> {
    let program =
        std::env::current_exe().map_err(MachineError::file("find the running program by", "/proc/self/exe"))?;
    Ok(program.parent().expect("a program lies in a directory").to_owned())
}

fn find_qemu(wished: Option<&Path>) -> Result<PathBuf, MachineError> {
    let name = wished.unwrap_or(Path::new("qemu-system-x86_64"));
    let missing = || MachineError::QemuMissing { program: name.display().to_string() };
    if name.components().count() > 1 {
        return name.canonicalize().map_err(|_| missing());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|path| path.is_file()).ok_or_else(missing)
}

/// Why the host's KVM cannot carry a machine that has KVM inside; `None` when it can.
fn obstacle_to_nesting() -> Option<String> {
    match probe::kvm() {
        KvmVerdict::Missing { reason } => return Some(reason),
        KvmVerdict::Emulated { ips } => {
            return Some(format!("this host's KVM interprets guest code ({:.1} M instructions/s)", ips / 1e6));
        }
        KvmVerdict::Hardware { .. } => {}
    }
    let nested = ["kvm_amd", "kvm_intel"].into_iter().any(|module| {
        std::fs::read_to_string(format!("/sys/module/{module}/parameters/nested"))
            .is_ok_and(|value| matches!(value.trim(), "1" | "Y" | "y"))
    });
    (!nested).then(|| "nested virtualisation is off (kvm_amd.nested or kvm_intel.nested is not 1)".to_owned())
}

fn host_memory() -> ByteSize {
    let info = rustix::system::sysinfo();
    ByteSize(info.totalram as u64 * u64::from(info.mem_unit))
}

fn default_memory(host: ByteSize) -> ByteSize {
    let half = ByteSize::mib(host.as_mib() / 2);
    half.clamp(LEAST_MEMORY, MAX_DEFAULT_MEMORY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_half_of_the_host_within_limits() {
        assert_eq!(default_memory(ByteSize::gib(24)), ByteSize::gib(12));
        assert_eq!(default_memory(ByteSize::gib(512)), ByteSize::gib(16));
        assert_eq!(default_memory(ByteSize::gib(1)), ByteSize::gib(1));
    }

    #[test]
    fn a_missing_qemu_names_the_package() {
        for name in ["no-such-qemu", "/no/such/qemu"] {
            let error = find_qemu(Some(Path::new(name))).expect_err("does not exist");
            assert!(error.to_string().contains("apt-get install qemu-system-x86"), "{error}");
        }
    }

    #[test]
    fn a_program_that_the_machine_will_miss_is_missed_before_it_boots() {
        let programs = tempfile::tempdir().expect("temporary directory");
        let options = StartOptions { programs: Some(programs.path().to_owned()), ..StartOptions::default() };
        let missing = |options: &StartOptions| {
            options.check_programs(programs.path()).err().map(|error| error.to_string()).unwrap_or_default()
        };
        for program in ["forkd-agent", "forkd", "forkd-controller", "forkd-vmm"] {
            assert!(missing(&options).contains(&format!("/{program} does not exist")), "{}", missing(&options));
            std::fs::write(programs.path().join(program), "").expect("written");
        }
        assert_eq!(missing(&options), "");
        let elsewhere = StartOptions { keep_alive: vec!["/bin/true".into()], ..options };
        assert_eq!(missing(&elsewhere), "", "what is not shared cannot be checked");
    }

    #[test]
    fn shares_that_a_mount_table_could_misread_are_refused() {
        let share = |guest: &str| Share { host: "/".into(), guest: guest.into(), writable: false };
        share("/mnt/target-1.2_x").check().expect("plain");
        for bad in ["mnt", "/", "/a b", "/a,b", "/a/../b", "/a\n", ""] {
            assert!(share(bad).check().is_err(), "{bad:?}");
        }
        let absent = Share { host: "/no/such/dir".into(), guest: "/x".into(), writable: false };
        assert!(absent.check().expect_err("absent").to_string().contains("/no/such/dir"));
    }

    #[test]
    fn sizes_that_cannot_work_are_refused_with_what_would() {
        let error = StartOptions { memory: Some(ByteSize::mib(64)), ..StartOptions::default() }.resolve_memory();
        assert!(error.expect_err("too small").to_string().contains("at least 1 GiB"));
        let error = StartOptions { vcpus: Some(0), ..StartOptions::default() }.resolve_vcpus();
        assert!(error.expect_err("none").to_string().contains("1 to 64"));
    }
}
