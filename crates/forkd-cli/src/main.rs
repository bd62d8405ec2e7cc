//! The `forkd` program.

mod args;
mod bake;
mod bench;
mod blob;
mod children;
mod client;
mod commands;
mod daemon;
mod data_dir;
mod direct_agent;
mod doctor;
mod endpoint;
mod environment;
mod failure;
mod ingredients;
mod interrupt;
mod limits;
mod machine;
mod measurement;
mod output;
mod pack_file;
mod programs;
mod progress;
mod registry;
mod statistics;
mod terminal;
mod units;
mod volume;

use std::io::Write;

use clap::Parser;

fn main() {
    let cli = args::Cli::parse();
    let code = match run(cli) {
        Ok(code) => code,
        Err(error) if failure::is_closed_pipe(&error) => 0,
        Err(error) => {
            let _ = write!(std::io::stderr().lock(), "{}", failure::render(&error));
            failure::exit_code(&error)
        }
    };
    // Not a return: a thread may still sit in a read of standard input.
    std::process::exit(code.into());
}

fn run(cli: args::Cli) -> anyhow::Result<u8> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let outcome = runtime.block_on(cli.run());
    runtime.shutdown_background();
    outcome
}
