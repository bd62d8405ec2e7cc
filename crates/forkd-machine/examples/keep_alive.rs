//! The program that a machine runs to keep its KVM alive, by itself, for tests of this crate.

fn main() -> std::process::ExitCode {
    let Err(error) = forkd_machine::keep_alive::run();
    // A program with one job and no logger: its one line belongs on standard error.
    #[allow(clippy::print_stderr)]
    {
        eprintln!("{error}");
    }
    std::process::ExitCode::FAILURE
}
