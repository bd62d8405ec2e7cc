//! PID 1 and agent inside a guest.
//!
//! One static program for any image. As PID 1 it brings the guest up ([`boot`]), reaps its orphans
//! ([`reaper`]) and serves requests over vsock ([`listen`], [`requests`]): programs ([`exec`]), warm
//! interpreters ([`runtimes`]), identities of copies ([`identity`]), [`files`], [`tunnel`]s. The
//! JSON-line protocol of TCP port 8888 is [`legacy`]. As an ordinary program it serves the same over
//! TCP to clients that show a token. As a [`meter`] it measures for a benchmark how long its guest stands still.
//!
//! One thread per connection; nothing here is asynchronous, because a guest has few clients and every
//! thread that sleeps costs nothing.

pub mod agent;
pub mod boot;
pub mod connection;
pub mod console;
pub mod environment;
pub mod exec;
pub mod failure;
pub mod files;
pub mod identity;
pub mod legacy;
pub mod listen;
pub mod meter;
pub mod options;
mod poison;
pub mod poweroff;
pub mod reaper;
pub mod requests;
pub mod runtimes;
pub mod spawn;
pub mod token;
pub mod tunnel;
pub mod users;
pub mod warmup;

use std::io;
use std::panic;
use std::process::ExitCode;
use std::time::Duration;

use agent::{Agent, Role};
use options::{OptionError, ProgramOptions};
use token::{Token, TokenError};

/// Why an ordinary program cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// Its arguments.
    #[error(transparent)]
    Options(#[from] OptionError),
    /// Its token.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// Its surroundings.
    #[error("cannot {attempted}")]
    Io {
        /// What was attempted.
        attempted: String,
        /// Why it failed.
        source: io::Error,
    },
}

/// Is PID 1: brings the guest up and serves for ever. A guest that cannot come up says why and powers
/// off, so that its host need not wait for a time limit.
pub fn be_init() -> ! {
    panic::set_hook(Box::new(|panic| console::error(&format!("internal error: {panic}"))));
    let failure = match panic::catch_unwind(boot::boot) {
        Ok(Ok(_agent)) => None,
        Ok(Err(error)) => Some(failure::with_causes(&error)),
        Err(_) => Some("internal error while starting, see above".to_owned()),
    };
    if let Some(failure) = failure {
        console::announce(&format!("forkd-agent: this guest cannot come up: {failure}"));
        std::thread::sleep(Duration::from_secs(1));
        poweroff::power_off();
    }
    // Threads do the work. PID 1 must not end: the kernel panics if it does.
    loop {
        std::thread::park();
    }
}

/// Is an ordinary program: serves until it is killed or asked to shut down.
pub fn be_program(arguments: impl IntoIterator<Item = String>) -> ExitCode {
    match serve(arguments) {
        Ok(()) => loop {
            std::thread::park();
        },
        Err(error) => {
            console::error(&failure::with_causes(&error));
            ExitCode::from(if matches!(error, ProgramError::Options(_)) { 2 } else { 1 })
        }
    }
}

fn serve(arguments: impl IntoIterator<Item = String>) -> Result<(), ProgramError> {
    let options = ProgramOptions::parse(arguments)?;
    let failed = |attempted: String| move |source: io::Error| ProgramError::Io { attempted, source };
    // Orphans of programs come here, as they come to PID 1.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(|error| failed("become the reaper of orphans".into())(error.into()))?;
    let agent = Agent::start(Role::Program).map_err(failed("start the agent".into()))?;
    if let (Some(address), Some(file)) = (options.tcp, &options.token_file) {
        let token = Token::read(file)?;
        let bound = listen::on_tcp(&agent, address, token).map_err(failed(format!("listen on {address}")))?;
        console::announce(&format!("forkd-agent tcp {bound}"));
    }
    if let Some(address) = options.legacy {
        let bound = listen::on_legacy_tcp(&agent, address).map_err(failed(format!("listen on {address}")))?;
        console::announce(&format!("forkd-agent legacy {bound}"));
    }
    console::announce("forkd-agent ready");
    Ok(())
}
