//! QEMU: its command line and its launch.
//!
//! What each choice is for:
//! - A translated processor needs SVM in its CPU model, else there is no `/dev/kvm` inside. `rdseed` and
//!   `sha-ni` are left out because QEMU's translator lacks them and says so.
//! - One host thread per vCPU (`thread=multi`): with a single thread for all, nested guests were seen to hang
//!   around power-off. The keep-alive vCPUs make the multi-threaded form reliable.
//! - The root disk is opened with a throw-away overlay, so every start begins from the same root and a
//!   crash damages nothing. Only the data disk keeps what is written.
//! - The kernel is an uncompressed ELF: decompressing in a translated machine costs half a second.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use forkd_types::ByteSize;

use crate::boot::{CONFIG_TAG, Export};
use crate::error::MachineError;
use crate::process::ProcessId;
use crate::qmp::Qmp;

/// The processor of a translated machine.
///
/// SVM gives it a `/dev/kvm` of its own. XSAVE and what builds on it are left out: the emulated SVM
/// does not intercept XSETBV, so KVM inside would not learn which vector registers its guests use and
/// would not save them. The others are known to be slow or missing under translation.
const TRANSLATED_CPU: &str = "EPYC,+svm,+npt,-rdseed,-sha-ni,-xsave,-xsavec,-xsaveopt,-xgetbv1,-avx,-avx2,-f16c,-fma";

/// The port of the machine's agent, as seen inside.
const AGENT_PORT: u32 = forkd_proto::agent::AGENT_PORT;

/// The port of the daemon's API, as seen inside.
const API_PORT: u16 = 8889;

/// The control socket's name in the machine's directory.
pub(crate) const QMP_SOCKET: &str = "qmp.sock";

/// How long QEMU may take to set itself up; it needs a fraction of a second.
const INITIALISE_LIMIT: Duration = Duration::from_secs(20);

/// Translated code that QEMU keeps. Its default of an eighth of the memory is more than is ever used.
const TRANSLATION_CACHE: ByteSize = ByteSize::mib(512);

/// Everything that the command line is made from.
pub(crate) struct Launch<'a> {
    pub(crate) program: &'a Path,
    pub(crate) name: &'a str,
    pub(crate) hardware: bool,
    pub(crate) vcpus: u8,
    pub(crate) memory: ByteSize,
    pub(crate) network: bool,
    pub(crate) kernel: &'a Path,
    pub(crate) initramfs: &'a Path,
    pub(crate) root: &'a Path,
    pub(crate) data: &'a Path,
    pub(crate) config: &'a Path,
    pub(crate) exports: &'a [Export<'a>],
    pub(crate) agent_port: u16,
    pub(crate) api_port: u16,
    /// The machine's directory: control socket, logs, overlay of the root disk.
    pub(crate) directory: &'a Path,
}

/// Why QEMU did not start.
pub(crate) enum LaunchFailure {
    /// A port was taken between choosing it and using it; others may work.
    PortTaken,
    /// Anything else.
    Other(MachineError),
}

impl Launch<'_> {
    /// Starts QEMU in the background; it has initialised, and runs the machine, when this returns.
    pub(crate) fn start(&self) -> Result<ProcessId, LaunchFailure> {
        let other = |reason: String| LaunchFailure::Other(MachineError::Launch { reason });
        let log = self.directory.join("qemu.log");
        let file =
            File::create(&log).map_err(|error| LaunchFailure::Other(MachineError::file("create", &log)(error)))?;
        let child = Command::new(self.program)
            .args(self.arguments())
            // The control socket is named relative to this, so that its path stays short; the overlay
            // of the root disk goes where TMPDIR says.
            .current_dir(self.directory)
            .env("TMPDIR", self.directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            // A group of its own: what ends this program by the terminal's keys leaves the machine alone.
            // QEMU's own -daemonize is of no use here, since the sandbox forbids what it does.
            .process_group(0)
            .spawn()
            .map_err(|error| other(error.to_string()))?;
        self.await_initialised(child).map_err(|status| {
            let said = without_noise(&fs::read_to_string(&log).unwrap_or_default());
            if said.contains("Could not set up host forwarding rule") {
                LaunchFailure::PortTaken
            } else {
                other(if said.is_empty() { format!("it ended with {status}") } else { said })
            }
        })
    }

    /// Its control socket greets once QEMU has made everything that was asked for; how it ended if it did
    /// not come so far.
    fn await_initialised(&self, mut child: Child) -> Result<ProcessId, String> {
        let started = Instant::now();
        while started.elapsed() < INITIALISE_LIMIT {
            if let Some(status) = child.try_wait().map_err(|error| error.to_string())? {
                return Err(status.to_string());
            }
            if Qmp::connect(self.directory, QMP_SOCKET).is_ok()
                && let Some(id) = ProcessId::of(child.id())
            {
                // Collects the exit status when it ends, should this program live that long.
                std::thread::spawn(move || child.wait());
                return Ok(id);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = child.kill().and_then(|()| child.wait());
        Err(format!("no sign of life within {} s", INITIALISE_LIMIT.as_secs()))
    }

    fn arguments(&self) -> Vec<OsString> {
        let mut arguments = Arguments::default();
        arguments.pair("-name", format!("forkd-machine-{}", self.name));
        arguments.pair("-machine", "q35,vmport=off,hpet=off");
        if self.hardware {
            arguments.pair("-accel", "kvm").pair("-cpu", "host");
        } else {
            arguments
                .pair("-accel", format!("tcg,thread=multi,tb-size={}", TRANSLATION_CACHE.as_mib()))
                .pair("-cpu", TRANSLATED_CPU);
        }
        arguments.pair("-smp", self.vcpus.to_string()).pair("-m", format!("{}M", self.memory.as_mib()));
        for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            arguments.flag(flag);
        }
        arguments.pair("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
        arguments.pair("-display", "none");
        arguments.path("-kernel", "", self.kernel).path("-initrd", "", self.initramfs);
        arguments.pair("-append", self.kernel_command_line());
        arguments.path("-drive", "if=none,id=root,format=raw,snapshot=on,file=", self.root);
        arguments.pair("-device", "virtio-blk-pci,drive=root");
        arguments.path("-drive", "if=none,id=data,format=raw,discard=unmap,detect-zeroes=unmap,file=", self.data);
        arguments.pair("-device", "virtio-blk-pci,drive=data");
        arguments.pair("-netdev", self.network_back_end()).pair("-device", "virtio-net-pci,netdev=net,romfile=");
        arguments.virtfs(CONFIG_TAG, self.config, false);
        for export in self.exports {
            arguments.virtfs(&export.tag, export.host, export.writable);
        }
        arguments.pair("-object", "rng-random,id=entropy,filename=/dev/urandom");
        arguments.pair("-device", "virtio-rng-pci,rng=entropy");
        // Memory that the machine has freed goes back to the host.
        arguments.pair("-device", "virtio-balloon-pci,free-page-reporting=on");
        arguments.pair("-device", "pvpanic-pci");
        arguments.path("-serial", "file:", &self.directory.join("console.log"));
        arguments.pair("-qmp", format!("unix:{QMP_SOCKET},server=on,wait=off"));
        arguments.0
    }

    fn network_back_end(&self) -> String {
        let restrict = if self.network { "off" } else { "on" };
        let (agent, api) = (self.agent_port, self.api_port);
        format!(
            "user,id=net,restrict={restrict},hostfwd=tcp:127.0.0.1:{agent}-:{AGENT_PORT},hostfwd=tcp:127.0.0.1:{api}-:{API_PORT}"
        )
    }

    fn kernel_command_line(&self) -> String {
        let mut words = vec![
            "console=ttyS0 quiet loglevel=4".to_owned(),
            // Die loudly and at once; the host restarts a dead machine, and cannot see a sick one.
            "panic=-1 oops=panic softlockup_panic=1".to_owned(),
            format!("forkd.root=/dev/vda forkd.rootfstype=ext4 forkd.machine=1 forkd.listen=0.0.0.0:{AGENT_PORT}"),
        ];
        if !self.hardware {
            // Polling for an interrupt steals the host processor that would raise it. Mitigations guard
            // against hardware that a translated machine does not have. KFENCE patches code ten times a second,
            // which is what multi-threaded translation takes badly.
            words.push(
                "mitigations=off tsc=reliable no_timer_check kfence.sample_interval=0 kvm.halt_poll_ns=0 kvm.nx_huge_pages=never"
                    .to_owned(),
            );
        }
        words.join(" ")
    }
}

#[derive(Default)]
struct Arguments(Vec<OsString>);

impl Arguments {
    fn flag(&mut self, flag: &str) -> &mut Self {
        self.0.push(flag.into());
        self
    }

    fn pair(&mut self, flag: &str, value: impl Into<OsString>) -> &mut Self {
        self.0.push(flag.into());
        self.0.push(value.into());
        self
    }

    /// An option that ends in a path. QEMU separates properties by commas and takes a doubled comma for one;
    /// the plain file options take the path as it is.
    fn path(&mut self, flag: &str, prefix: &str, path: &Path) -> &mut Self {
        let mut value = OsString::from(prefix);
        if prefix.contains('=') {
            value.push(double_commas(path))
        } else {
            value.push(path)
        }
        self.pair(flag, value)
    }

    fn virtfs(&mut self, tag: &str, host: &Path, writable: bool) -> &mut Self {
        let read_only = if writable { "off" } else { "on" };
        let prefix = format!("local,mount_tag={tag},security_model=none,multidevs=remap,readonly={read_only},path=");
        self.path("-virtfs", &prefix, host)
    }
}

fn double_commas(path: &Path) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let bytes = path.as_os_str().as_bytes();
    OsString::from_vec(
        bytes.iter().flat_map(|&byte| std::iter::repeat_n(byte, 1 + usize::from(byte == b','))).collect(),
    )
}

/// What QEMU printed, without its remarks on features of the CPU model that do not matter here.
fn without_noise(text: &str) -> String {
    let lines = text.lines().filter(|line| !line.contains("TCG doesn't support requested feature"));
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(hardware: bool, network: bool, check: impl FnOnce(Vec<String>)) {
        let path = Path::new("/m/a,b");
        let exports = [Export { tag: "out".into(), host: path, guest: "/mnt/out", writable: true }];
        let launch = Launch {
            program: Path::new("qemu"),
            name: "default",
            hardware,
            vcpus: 2,
            memory: ByteSize::gib(4),
            network,
            kernel: path,
            initramfs: path,
            root: path,
            data: path,
            config: path,
            exports: &exports,
            agent_port: 41024,
            api_port: 48889,
            directory: Path::new("/m"),
        };
        check(launch.arguments().into_iter().map(|word| word.into_string().expect("text")).collect());
    }

    #[test]
    fn a_translated_machine_has_svm_and_is_closed_to_the_network() {
        launch(false, false, |words| {
            let line = words.join(" ");
            assert!(line.contains("+svm,+npt") && line.contains("thread=multi"), "{line}");
            assert!(line.contains("restrict=on,hostfwd=tcp:127.0.0.1:41024-:1024,hostfwd=tcp:127.0.0.1:48889-:8889"));
            assert!(line.contains("forkd.machine=1") && line.contains("mitigations=off"));
        });
    }

    #[test]
    fn a_hardware_machine_keeps_its_mitigations() {
        launch(true, true, |words| {
            let line = words.join(" ");
            assert!(line.contains("-accel kvm -cpu host") && line.contains("restrict=off"), "{line}");
            assert!(!line.contains("mitigations=off"));
        });
    }

    #[test]
    fn commas_in_paths_are_doubled_only_among_properties() {
        launch(false, false, |words| {
            assert!(words.contains(&"if=none,id=root,format=raw,snapshot=on,file=/m/a,,b".to_owned()));
            assert_eq!(words[words.iter().position(|word| word == "-kernel").expect("given") + 1], "/m/a,b");
            let shared = words.iter().find(|word| word.contains("mount_tag=out")).expect("exported");
            assert!(shared.ends_with("readonly=off,path=/m/a,,b"), "{shared}");
        });
    }

    #[test]
    fn only_what_matters_is_reported() {
        let text = "qemu: warning: TCG doesn't support requested feature: CPUID.0DH\nqemu: no such file";
        assert_eq!(without_noise(text), "qemu: no such file");
    }
}
