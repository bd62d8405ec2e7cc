//! The monitor of one virtual machine.
//!
//! Started by the node with a connected control socket as standard input; see
//! `forkd_proto::monitor` for what is said on it. `forkd-vmm bench-raw`, `bench-branch`,
//! `bench-gap` and `bench-chain` measure copies of a tiny built-in guest instead.

use std::os::fd::AsFd;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        None => match std::io::stdin().as_fd().try_clone_to_owned() {
            Ok(control) => ExitCode::from(forkd_vmm::launch::run(control) as u8),
            Err(error) => fail(&format!("cannot use standard input as the control socket: {error}")),
        },
        Some("bench-raw") => match forkd_vmm::raw::bench::main(arguments) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        },
        Some("bench-branch") => match forkd_vmm::raw::branch_bench::main(arguments) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        },
        Some("bench-gap") => match forkd_vmm::raw::gap_bench::main(arguments) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        },
        Some("bench-chain") => match forkd_vmm::raw::chain_bench::main(arguments) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        },
        Some("--version" | "-V") => {
            write_line(&mut std::io::stdout(), concat!("forkd-vmm ", env!("CARGO_PKG_VERSION")));
            ExitCode::SUCCESS
        }
        Some(other) => fail(&format!(
            "unknown argument {other:?}; this program is started by forkd-controller. To measure: forkd bench raw"
        )),
    }
}

fn fail(message: &str) -> ExitCode {
    write_line(&mut std::io::stderr(), &format!("forkd-vmm: {message}"));
    ExitCode::FAILURE
}

fn write_line(to: &mut dyn std::io::Write, text: &str) {
    let _ = writeln!(to, "{text}");
}
