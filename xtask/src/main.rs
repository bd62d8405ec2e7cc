//! Project chores. `cargo xtask layers` checks that no crate imports one that is not below it; `cargo xtask test`
//! runs test programs side by side.

mod layers;
mod tests;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let outcome = match arguments.split_first() {
        Some((chore, [])) if chore == "layers" => layers::check(),
        Some((chore, selection)) if chore == "test" => tests::run(selection),
        _ => Err(anyhow::anyhow!("usage: cargo xtask layers | test [SELECTION OF cargo test…]")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("xtask: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Writes a line to standard error.
fn say(text: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{text}");
}
