//! PID 1 and agent inside a guest; see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        forkd_agent::be_init();
    }
    forkd_agent::be_program(std::env::args().skip(1))
}
