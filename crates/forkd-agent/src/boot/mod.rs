//! From the kernel's first program to a system that serves requests.
//!
//! ```text
//! initramfs: mounts ─► modules ─► root disk (or stay) ─► in the root: mounts, names, network ─► agent
//! ```
//!
//! The process that the kernel started goes on being PID 1: it changes its root directory and starts
//! nothing, so an image needs neither a shell nor a C library.

mod kernel_log;
mod modules;
mod mounts;
mod names;
mod network;
mod root_disk;

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forkd_proto::agent::AGENT_PORT;
use rustix::process::{Resource, Rlimit};

use crate::agent::{Agent, Role};
use crate::identity::hooks;
use crate::options::{BootOptions, MACHINE_TOKEN, OptionError};
use crate::token::{Token, TokenError};
use crate::{console, failure, legacy, listen, warmup};

/// Programs that a machine runs before it listens.
const BOOT_SCRIPTS: &str = "/etc/forkd/boot.d";

/// Why a guest cannot come up.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel does not give what every step needs.
    #[error("cannot mount {what} on {}", target.display())]
    Mount {
        /// File system or device.
        what: String,
        /// Where it was to be mounted.
        target: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The root disk never came.
    #[error(
        "the root disk {} did not appear within {seconds} s; block devices there are: {present}. \
         Is its driver in the initramfs, and is forkd.root= right?",
        device.display()
    )]
    NoRootDisk {
        /// What was waited for.
        device: PathBuf,
        /// For how long.
        seconds: u64,
        /// What there is instead.
        present: String,
    },
    /// The root disk is mounted, but the process cannot make it its root.
    #[error("cannot make the root disk the root directory: {step}")]
    SwitchRoot {
        /// Which step failed.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// No thread or descriptor.
    #[error("cannot start the agent")]
    Agent(#[source] io::Error),
    /// A machine without a token would obey anyone, or no one.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// Not reachable at all.
    #[error("cannot listen on {what}")]
    Listen {
        /// Which address.
        what: String,
        /// Why not.
        source: io::Error,
    },
}

/// Sets the system up and starts to serve.
pub fn boot() -> Result<Arc<Agent>, BootError> {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    mounts::first()?;
    console::use_kernel_log();
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let (options, errors) = BootOptions::parse(&command_line);
    report(&errors);
    modules::load_all(&command_line);
    if let Some(device) = &options.root {
        root_disk::switch_to(device, &options.root_type)?;
    }
    mounts::rest(&options.volumes);
    raise_limits();
    names::prepare(&options.hostname);
    network::bring_up(options.network.as_ref());

    let agent = Agent::start(Role::Init).map_err(BootError::Agent)?;
    if options.machine {
        for script in hooks::executables(Path::new(BOOT_SCRIPTS)) {
            if let Err(problem) = hooks::run(&agent.reaper, &script, agent.environment.with(&[]), None) {
                console::error(&problem);
            }
        }
    }
    match warmup::run(&agent) {
        Ok(Some(ready)) => drop(agent.warmup.set(ready)),
        Ok(None) => {}
        Err(error) => console::error(&failure::with_causes(&error)),
    }
    serve(&agent, &options)?;
    console::announce("forkd-agent ready");
    kernel_log::keep_notices_off_the_console(&command_line);
    Ok(agent)
}

fn report(errors: &[OptionError]) {
    for error in errors {
        console::warn(&format!("kernel command line: {error}; the default is taken"));
    }
}

/// Opens what this guest listens on; it must be reachable in one way at least.
fn serve(agent: &Arc<Agent>, options: &BootOptions) -> Result<(), BootError> {
    let on_vsock = listen::on_vsock(agent, AGENT_PORT);
    if options.machine {
        let token = Token::read(Path::new(MACHINE_TOKEN))?;
        listen::on_tcp(agent, options.listen, token)
            .map_err(|source| BootError::Listen { what: format!("tcp {}", options.listen), source })?;
        return Ok(());
    }
    let legacy = SocketAddr::from(([0, 0, 0, 0], legacy::PORT));
    if let Err(error) = listen::on_legacy_tcp(agent, legacy) {
        console::warn(&format!("cannot listen on tcp {legacy}: {error}"));
    }
    on_vsock.map_err(|source| BootError::Listen {
        what: format!("vsock port {AGENT_PORT} (are the vsock modules in the initramfs?)"),
        source,
    })
}

/// Room for many connections and for programs that open much.
fn raise_limits() {
    let limit = Rlimit { current: Some(65_536), maximum: Some(1 << 20) };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, limit) {
        console::warn(&format!("cannot raise the limit of open files to 65536: {error}"));
    }
}
