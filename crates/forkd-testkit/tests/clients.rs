//! Published clients of the API, written elsewhere and installed from the package index as they are, drive the daemon.
//!
//! Their programs lie in `clients/`. What they expect is what their own code says; nothing of it is edited here.

#[allow(dead_code)]
mod client_programs;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use forkd_testkit::{Host, on_real_guests};
use serde::Deserialize;

use client_programs::{GuestAddress, environment, environment_of_forkd, expect, python, run};

/// The client library.
const LIBRARY: &str = "forkd==0.5.3";
/// The server for language models.
const MCP_SERVER: &str = "forkd-mcp==0.2.1";

fn program(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/clients").join(name)
}

/// Where the kernel is put on the daemon's host.
const KERNEL_DIRECTORY: &str = "/var/tmp/forkd-clients";

/// The part of a snapshot's description that says which disk it was booted from.
#[derive(Deserialize)]
struct Description {
    disks: Vec<Disk>,
}

#[derive(Deserialize)]
struct Disk {
    base: String,
}

/// The root disk of the snapshot `tag`, on the daemon's host.
fn disk_of(host: &Host, tag: &str) -> Result<String> {
    let info = host.snapshots()?.into_iter().find(|info| info.tag.as_str() == tag).context("the snapshot is there")?;
    let said = host.on_daemon_host(&["cat", &format!("{}/snapshot.json", info.dir)])?.success()?;
    // Lines after the description seal it.
    let description = serde_json::Deserializer::from_str(&said).into_iter::<Description>().next();
    let Description { disks } = description.context("the file is not empty")??;
    let base = &disks.first().context("it has a disk")?.base;
    Ok(format!("{}/../../blobs/{}", info.dir, base.trim_start_matches("blake3:")))
}

/// A kernel with its modules, as a distribution installs them, on the daemon's host.
fn kernel_there(host: &Host) -> Result<String> {
    let kernel = host.installed_kernel()?;
    let (image, modules) = (format!("boot/vmlinuz-{}", kernel.release), format!("lib/modules/{}", kernel.release));
    let there = format!("{KERNEL_DIRECTORY}/{image}");
    if host.on_daemon_host(&["test", "-e", &there])?.code == 0 {
        return Ok(there);
    }
    let root = kernel.image.parent().and_then(Path::parent).context("it lies in boot")?;
    let packed = tempfile::NamedTempFile::new()?;
    run(Command::new("tar").arg("-C").arg(root).arg("-cf").arg(packed.path()).args([&image, &modules]))?;
    let archive = format!("{KERNEL_DIRECTORY}.tar");
    host.copy_to_daemon_host(packed.path(), &archive)?;
    let unpack = "mkdir -p \"$1.new\" && tar -C \"$1.new\" -xf \"$0\" && rm -rf \"$0\" \"$1\" && mv \"$1.new\" \"$1\"";
    host.on_daemon_host(&["sh", "-c", unpack, &archive, KERNEL_DIRECTORY])?.success()?;
    Ok(there)
}

#[test]
fn every_method_of_the_published_controller_works() -> Result<()> {
    let python = python("published", &[LIBRARY, MCP_SERVER])?;
    on_real_guests(|host| {
        let tag = &host.numpy()?.tag;
        let said = run(Command::new(&python).arg(program("controller.py")).arg(tag).envs(environment(host)?))?;
        expect(&said, "every method of Controller worked")
    })
}

#[test]
fn the_published_sandbox_spawns_runs_and_ends() -> Result<()> {
    let python = python("published", &[LIBRARY, MCP_SERVER])?;
    on_real_guests(|host| {
        let tag = &host.numpy()?.tag;
        let _address = GuestAddress::add()?;
        let said = run(Command::new(&python).arg(program("sandbox.py")).arg(tag).envs(environment_of_forkd(host)?))?;
        expect(&said, "Sandbox worked")
    })
}

#[test]
fn a_session_with_the_published_mcp_server_uses_all_its_tools() -> Result<()> {
    let python = python("published", &[LIBRARY, MCP_SERVER])?;
    on_real_guests(|host| {
        let server = python.with_file_name("forkd-mcp");
        let (kernel, disk) = (kernel_there(host)?, disk_of(host, &host.numpy()?.tag)?);
        mcp_session(host, &python, [&kernel, &disk], &[server.to_str().context("the path is text")?])
    })
}

#[test]
fn the_same_session_with_our_own_mcp_server() -> Result<()> {
    let python = python("published", &[LIBRARY, MCP_SERVER])?;
    on_real_guests(|host| {
        // Booting a second machine would show nothing about the server.
        mcp_session(host, &python, ["-", "-"], &["forkd", "mcp"])?;
        let tag = &host.numpy()?.tag;
        let mut command = Command::new(&python);
        command.arg(program("more_tools.py")).arg(tag).args(["forkd", "mcp"]).envs(environment(host)?);
        expect(&run(&mut command)?, "the other tools worked")
    })
}

fn mcp_session(host: &Host, python: &Path, boot: [&str; 2], server: &[&str]) -> Result<()> {
    static TURN: Mutex<()> = Mutex::new(());
    // Both leave snapshots of the same names, and remove them.
    let _one_at_a_time = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let tag = &host.numpy()?.tag;
    let leftovers = ["rmi", "mcp-branch", "mcp-created"];
    host.forkd(&leftovers)?;
    let mut command = Command::new(python);
    command.arg(program("mcp_session.py")).arg(tag).args(boot).args(server).envs(environment(host)?);
    // A kernel boots by translation for longer than a client waits unless it is told to.
    command.env("FORKD_HTTP_TIMEOUT", "240");
    let said = run(&mut command);
    host.forkd(&leftovers)?;
    expect(&said?, "the session worked")
}
