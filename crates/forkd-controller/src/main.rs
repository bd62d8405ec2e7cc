//! The daemon program: wiring of node and API.

mod access;
mod args;
mod claim;
mod serve;
mod token;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command, LogFormat};

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Serve(args) => {
            start_logging(args.log_format);
            exit_code(serve::run(*args), |error| tracing::error!("{error:#}"))
        }
        Command::Token(args) => exit_code(token::run(args), |error| {
            // Nothing is left to be done about a standard error that is closed.
            let _ = writeln!(std::io::stderr(), "Error: {error:#}");
        }),
    }
}

fn exit_code(result: anyhow::Result<()>, tell: impl FnOnce(anyhow::Error)) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tell(error);
            ExitCode::FAILURE
        }
    }
}

fn start_logging(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => {
            use std::io::IsTerminal;
            builder.with_ansi(std::io::stderr().is_terminal()).init();
        }
        LogFormat::Json => builder.json().init(),
    }
}
