//! A real machine, from nothing to removal: QEMU, Debian, the agent, nested KVM.
//!
//! The parts run in order on one machine. Its images are kept under the target directory, so only the
//! first run builds them. Without QEMU or the tools that build images every part is reported as ignored.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use forkd_machine::{
    Machine, MachineError, Progress, Running, Share, StartOptions, StartOutcome, Status, StopOutcome, Streams,
};
use forkd_proto::agent::{Exec, Exited};
use forkd_types::ByteSize;
use libtest_mimic::{Arguments, Failed, Trial};

type Outcome = Result<(), Failed>;
/// Parts are plain functions, so that they can be listed.
type Part = fn() -> Outcome;

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let missing = missing_tools();
    let parts: [(&str, Part); 10] = [
        ("comes_up_with_hardware_like_kvm_inside", comes_up_with_hardware_like_kvm_inside),
        ("carries_streams_codes_and_refusals", carries_streams_codes_and_refusals),
        ("a_megabyte_a_frame_at_a_time_comes_through_whole", a_megabyte_a_frame_at_a_time_comes_through_whole),
        ("reaches_nothing_outside", reaches_nothing_outside),
        ("is_left_alone_by_a_second_start", is_left_alone_by_a_second_start),
        ("keeps_its_disk_over_stop_and_start", keeps_its_disk_over_stop_and_start),
        ("a_killed_qemu_is_noticed_and_healed", a_killed_qemu_is_noticed_and_healed),
        ("a_qemu_that_stands_still_is_noticed_and_healed", a_qemu_that_stands_still_is_noticed_and_healed),
        ("a_panic_is_told_in_the_kernels_words", a_panic_is_told_in_the_kernels_words),
        ("is_gone_after_removal", is_gone_after_removal),
    ];
    let trials =
        parts.into_iter().map(|(name, part)| Trial::test(name, part).with_ignored_flag(missing.is_some())).collect();
    if let Some(missing) = &missing {
        #[allow(clippy::print_stderr)]
        {
            eprintln!("SKIPPED: no machine can be made here, because {missing}");
        }
    }
    libtest_mimic::run(&arguments, trials).exit();
}

fn missing_tools() -> Option<String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = |tool: &str| std::env::split_paths(&path).any(|directory| directory.join(tool).is_file());
    let tools = ["qemu-system-x86_64", "mmdebstrap", "mke2fs", "debugfs", "dpkg-deb"];
    let missing: Vec<_> = tools.into_iter().filter(|tool| !found(tool)).collect();
    (!missing.is_empty()).then(|| format!("{} cannot be found", missing.join(", ")))
}

fn machine() -> &'static Machine {
    static MACHINE: OnceLock<Machine> = OnceLock::new();
    MACHINE.get_or_init(|| Machine::open(&data(), "life").expect("a plain name"))
}

/// The test kit's, whose cache all tests share, so that each image is made once.
fn data() -> PathBuf {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/testkit/forkd");
    std::fs::create_dir_all(&data).expect("created");
    data.canonicalize().expect("it was made just now")
}

/// A directory of this host that the machine sees.
fn share() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("share")
}

/// The directory that cargo puts programs in: that of this test's own, without `deps`.
fn programs() -> PathBuf {
    let own = std::env::current_exe().expect("/proc is mounted");
    own.ancestors().nth(2).expect("deps lies below the programs").to_owned()
}

fn options() -> &'static StartOptions {
    static OPTIONS: OnceLock<StartOptions> = OnceLock::new();
    OPTIONS.get_or_init(|| {
        let mut build = Command::new(env!("CARGO"));
        build.args([
            "build",
            "--quiet",
            "--package",
            "forkd-agent",
            "--package",
            "forkd-machine",
            "--bins",
            "--examples",
        ]);
        assert!(build.status().expect("cargo runs").success(), "the agent builds");
        std::fs::create_dir_all(share()).expect("created");
        StartOptions {
            programs: Some(programs()),
            memory: Some(ByteSize::gib(2)),
            disk: ByteSize::gib(4),
            shares: vec![Share { host: share(), guest: "/mnt/share".into(), writable: true }],
            keep_alive: vec!["/forkd/bin/examples/keep_alive".into()],
            controller: false,
            ..StartOptions::default()
        }
    })
}

fn start() -> Result<Running, MachineError> {
    machine().ensure_running(options(), &mut |_: Progress| {})
}

/// Runs a shell command, with input if there is any.
fn shell(command: &str, stdin: Option<&'static [u8]>) -> Result<(Exited, String, String), MachineError> {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let streams = Streams {
        stdin: stdin.map(|bytes| Box::new(bytes) as Box<dyn std::io::Read + Send>),
        stdout: &mut stdout,
        stderr: &mut stderr,
        control: None,
    };
    let args = ["sh", "-c", command].map(str::to_owned).into();
    let exited = machine().exec(Exec { args, ..Exec::default() }, streams)?;
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    Ok((exited, text(stdout), text(stderr)))
}

fn check(holds: bool, otherwise: impl std::fmt::Debug) -> Outcome {
    if holds { Ok(()) } else { Err(format!("{otherwise:?}").into()) }
}

fn comes_up_with_hardware_like_kvm_inside() -> Outcome {
    machine().remove(&mut |_| {})?;
    check(machine().status()? == Status::Absent, "there is none yet")?;
    let running = start()?;
    check(running.outcome == StartOutcome::Started, &running)?;
    let (exited, said, complaint) = shell("/forkd/bin/examples/probe", None)?;
    check(exited.code == 0 && said.starts_with("Hardware"), (said, complaint))?;
    match machine().status()? {
        Status::Running { vcpus, network: false, .. } => check(vcpus > 0, vcpus),
        other => check(false, other),
    }
}

fn carries_streams_codes_and_refusals() -> Outcome {
    start()?;
    let outcome = shell("cat; echo complaint >&2; exit 7", Some(b"what went in"))?;
    let expected = Exited { code: 7, timed_out: false };
    check(outcome == (expected, "what went in".into(), "complaint\n".into()), &outcome)?;
    let request = Exec { args: vec!["no-such-program".into()], ..Exec::default() };
    let streams = Streams { stdin: None, stdout: &mut std::io::sink(), stderr: &mut std::io::sink(), control: None };
    match machine().exec(request, streams) {
        Err(MachineError::Agent(failure)) => check(failure.message.contains("no-such-program"), failure),
        other => check(false, other),
    }
}

fn a_megabyte_a_frame_at_a_time_comes_through_whole() -> Outcome {
    start()?;
    let (exited, said, _) = shell("dd if=/dev/zero bs=1M count=64 status=none | tr '\\0' x", None)?;
    check(exited.code == 0 && said.len() == 64 << 20 && said.bytes().all(|byte| byte == b'x'), said.len())?;
    let note = format!("from inside {}", std::process::id());
    let (exited, _, complaint) = shell(&format!("echo {note} > /mnt/share/note && ! touch /forkd/bin/x"), None)?;
    check(exited.code == 0, complaint)?;
    let seen = std::fs::read_to_string(share().join("note"))?;
    check(seen.trim() == note, seen)
}

fn reaches_nothing_outside() -> Outcome {
    start()?;
    // The host listens; a restricted machine must not get there by the gateway's address.
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let (exited, ..) = shell(&format!("timeout 5 bash -c 'exec 3<>/dev/tcp/10.0.2.2/{port}'"), None)?;
    check(exited.code != 0, exited)
}

fn is_left_alone_by_a_second_start() -> Outcome {
    let first = start()?;
    let starts: Vec<_> = (0..3).map(|_| std::thread::spawn(start)).collect();
    for other in starts {
        let other = other.join().map_err(|_| "a start panicked")??;
        check(other.qemu_pid == first.qemu_pid, &other)?;
        check(other.outcome == StartOutcome::AlreadyRunning { differences: Vec::new() }, &other)?;
    }
    Ok(())
}

fn keeps_its_disk_over_stop_and_start() -> Outcome {
    start()?;
    shell("echo kept > /var/lib/forkd/note; echo gone > /note", None)?;
    let stopped = machine().stop(&mut |_| {})?;
    check(stopped == StopOutcome::Clean, stopped)?;
    check(machine().status()? == Status::Stopped, "stopped")?;
    check(matches!(shell("true", None), Err(MachineError::NotRunning { .. })), "exec needs a running machine")?;
    check(machine().stop(&mut |_| {})? == StopOutcome::NotRunning, "stopped already")?;
    start()?;
    let (_, said, _) = shell("cat /var/lib/forkd/note; test -e /note || echo fresh root", None)?;
    check(said == "kept\nfresh root\n", said)
}

fn a_killed_qemu_is_noticed_and_healed() -> Outcome {
    let running = start()?;
    let killer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(1));
        Command::new("kill").args(["-9", &running.qemu_pid.to_string()]).status()
    });
    let began = Instant::now();
    let outcome = shell("sleep 600", None);
    killer.join().map_err(|_| "the killer panicked")??;
    check(matches!(outcome, Err(MachineError::MachineDied { .. })), &outcome)?;
    check(began.elapsed() < Duration::from_secs(20), began.elapsed())?;
    check(matches!(machine().status()?, Status::Dead { .. }), "dead until the next start")?;
    let healed = start()?;
    check(matches!(healed.outcome, StartOutcome::Healed { .. }), &healed)?;
    shell("true", None).map(drop).map_err(Failed::from)
}

fn a_qemu_that_stands_still_is_noticed_and_healed() -> Outcome {
    let running = start()?;
    let signal = |name: &str| Command::new("kill").args([name, &running.qemu_pid.to_string()]).status();
    signal("-STOP")?;
    let outcome = machine().status()?;
    check(matches!(outcome, Status::NotAnswering { .. }), &outcome)?;
    let began = Instant::now();
    let outcome = shell("true", None);
    check(matches!(&outcome, Err(error) if error.is_machine_death()), &outcome)?;
    check(began.elapsed() < Duration::from_secs(60), began.elapsed())?;
    let healed = start()?;
    check(matches!(&healed.outcome, StartOutcome::Healed { cause } if cause.contains("hung")), &healed)?;
    check(healed.qemu_pid != running.qemu_pid, &healed)?;
    shell("true", None).map(drop).map_err(Failed::from)
}

fn a_panic_is_told_in_the_kernels_words() -> Outcome {
    start()?;
    match shell("echo c > /proc/sysrq-trigger; sleep 600", None) {
        Err(MachineError::MachineDied { cause, console_tail }) => {
            check(cause.contains("panicked") && console_tail.contains("Kernel panic"), (cause, console_tail))
        }
        other => check(false, other),
    }
}

fn is_gone_after_removal() -> Outcome {
    start()?;
    machine().remove(&mut |_| {})?;
    check(machine().status()? == Status::Absent, "removed")?;
    machine().remove(&mut |_| {})?;
    check(!data().join("machine/life").exists(), "nothing is left")
}
