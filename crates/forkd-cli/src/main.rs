//! The `forkd` program.

fn main() {}
