//! The daemon's API as tools for language models, by the Model Context Protocol.
//!
//! [`Server`] has the tools. What they ask of the daemon goes through the [`Daemon`] trait, which the program
//! that starts the server implements with its own client; so this crate knows neither where the daemon is nor how it
//! is reached. [`stdio`] and [`http`] are the two ways in which a model's client talks to the server.
//!
//! A tool that fails answers with the daemon's own words, marked as an error: the model is to read them.

mod arguments;
mod daemon;
pub mod http;
mod reply;
mod server;
pub mod stdio;
mod tools;

pub use daemon::{Body, CallError, Calling, Daemon, Request};
pub use server::Server;
