//! The daemon program: wiring of node and API.

fn main() {}
