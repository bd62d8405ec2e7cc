//! The daemon program: wiring of node and API.

mod args;
mod claim;
mod serve;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command, LogFormat};

fn main() -> ExitCode {
    let Command::Serve(args) = Cli::parse().command;
    start_logging(args.log_format);
    match serve::run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // A log line would be lost on whoever filters the log; this is the program's last word.
            tracing::error!("{error:#}");
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
