//! Copies of a tiny built-in guest: what the monitor itself costs.
//!
//! The guest is a few bytes of 16-bit code, so it runs at full host-side speed even where KVM is
//! emulated. Everything around it is the real thing: all devices, driven to the state in which a
//! Linux driver leaves them; a zygote in a process of its own; requests with descriptors over its
//! control socket.

pub mod bench;
mod drivers;
mod guest;
pub mod zygote;

pub use guest::Failure;
pub use zygote::{Copies, RawZygote, Size};
