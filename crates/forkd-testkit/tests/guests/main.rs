//! Everything that takes a Linux guest, in one program: tests of all files fill the machine's processors together.
//!
//! They share a host and its daemon. What a test counts or removes must therefore be its own: its sandboxes,
//! snapshots of its own names, or a whole daemon (`forkd_testkit::Daemon`).

mod attack;
mod boot;
mod branching;
mod checkpoints;
mod client_programs;
mod clients;
mod durability;
mod exec;
mod fork_contract;
mod lifecycle;
mod packs;
mod requests;
mod restart;
mod runtimes;
mod sdk;
mod streams;
mod trouble;
mod workspaces;
