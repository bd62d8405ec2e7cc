//! PID 1 and agent inside a guest; see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        forkd_agent::be_init();
    }
    let mut arguments = std::env::args().skip(1).peekable();
    match arguments.next_if(|first| first == forkd_proto::meter::VERB) {
        Some(_) => forkd_agent::meter::run(arguments),
        None => forkd_agent::be_program(arguments),
    }
}
