//! A kernel, an initramfs and a root disk made here, booted under QEMU without KVM.
//!
//! This program plays both parts: on the host it builds and watches, and as `/init` of the guest it
//! does what the agent does first. It has no test harness because a harness is no `/init`.

#![allow(clippy::print_stdout)]

mod support;

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use forkd_image::kernel::KernelChoice;
use forkd_image::{BuildOptions, RootDiskSource, build, build_initramfs};
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, finit_module, reboot};

const SECRET: &str = "written by the host, read by the guest";
const DEADLINE: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    if std::process::id() == 1 {
        guest();
    }
    // The questions that test runners ask of a harness.
    if std::env::args().any(|argument| argument == "--list") {
        return ExitCode::SUCCESS;
    }
    if !support::has("qemu-system-x86_64") || !support::has("mke2fs") {
        support::skip("qemu-system-x86_64 or mke2fs is not installed");
        return ExitCode::SUCCESS;
    }
    for choice in [KernelChoice::DebianCloud612, KernelChoice::Debian61Generic] {
        let Some(kernel) = support::kernel(&choice) else { return ExitCode::SUCCESS };
        println!("booting {}", kernel.release);
        let dir = tempfile::tempdir().expect("tempdir");
        let disk = root_disk(dir.path());
        let initramfs = dir.path().join("initramfs");
        let this = std::env::current_exe().expect("own path");
        build_initramfs(&this, &kernel, &["virtio_pci"], &initramfs).expect("initramfs");
        let said = boot(&kernel.vmlinux, &initramfs, &disk);
        for expected in [format!("release {}", kernel.release), "not loaded: []".to_owned(), SECRET.to_owned()] {
            assert!(said.contains(&expected), "the guest did not say {expected:?}, but:\n{said}");
        }
        println!("booting {} ... ok", kernel.release);
    }
    ExitCode::SUCCESS
}

fn root_disk(dir: &Path) -> std::path::PathBuf {
    let root = dir.join("root");
    fs::create_dir_all(root.join("etc")).expect("mkdir");
    fs::write(root.join("etc/secret"), SECRET).expect("write");
    let options = BuildOptions::new(dir.join("cache"), dir.join("scratch"));
    build(&RootDiskSource::Directory(root), &options, &mut support::show).expect("disk").path
}

/// Runs a guest until it powers off and returns what it wrote to its console.
fn boot(vmlinux: &Path, initramfs: &Path, disk: &Path) -> String {
    let drive = format!("id=root,file={},format=raw,if=none,snapshot=on", disk.display());
    let mut qemu = Command::new("qemu-system-x86_64")
        .args([
            "-M",
            "q35",
            "-accel",
            "tcg",
            "-cpu",
            "EPYC,-rdseed,-sha-ni",
            "-m",
            "512",
            "-nodefaults",
            "-no-user-config",
        ])
        .args(["-display", "none", "-no-reboot", "-serial", "stdio", "-drive", &drive])
        .args(["-device", "virtio-blk-pci,drive=root", "-append", "console=ttyS0 panic=-1 loglevel=4"])
        .arg("-kernel")
        .arg(vmlinux)
        .arg("-initrd")
        .arg(initramfs)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("qemu starts");
    let output = qemu.stdout.take().expect("piped");
    let reader = std::thread::spawn(move || {
        BufReader::new(output).lines().map_while(Result::ok).inspect(|line| println!("| {line}")).collect::<Vec<_>>()
    });
    let started = std::time::Instant::now();
    while qemu.try_wait().expect("wait").is_none() {
        if started.elapsed() > DEADLINE {
            qemu.kill().expect("kill");
            qemu.wait().expect("wait");
            panic!("the guest did not power off within {DEADLINE:?}:\n{}", reader.join().expect("reader").join("\n"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    reader.join().expect("reader").join("\n")
}

/// Loads the modules, mounts the root disk, reads from it and powers off.
fn guest() -> ! {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    println!("release {release}");
    let list = fs::read_to_string("/lib/forkd/modules.list").expect("modules.list");
    let mut failed = Vec::new();
    for name in list.lines() {
        let file = File::open(format!("/lib/forkd/modules/{name}.ko")).expect("module");
        if let Err(error) = finit_module(&file, c"", 0) {
            failed.push((name, error));
        }
    }
    println!("not loaded: {failed:?}");
    fs::create_dir_all("/proc").and_then(|()| fs::create_dir_all("/newroot")).expect("mkdir");
    mount("devtmpfs", "/dev", "devtmpfs", MountFlags::empty(), None).expect("mount /dev");
    for _ in 0..100 {
        if Path::new("/dev/vda").exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    mount("/dev/vda", "/newroot", "ext4", MountFlags::empty(), None).expect("mount the root disk");
    println!("{}", fs::read_to_string("/newroot/etc/secret").expect("secret"));
    fs::write("/newroot/etc/answer", vec![7; 1 << 20]).expect("the root disk can be written");
    rustix::fs::sync();
    reboot(RebootCommand::PowerOff).expect("power off");
    unreachable!("powered off")
}
