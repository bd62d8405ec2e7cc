//! Copies of a tiny built-in guest: what the monitor itself costs.
//!
//! The guest is a few bytes of 16-bit code, so it runs at full host-side speed even where KVM is
//! emulated. Everything around it is the real thing: all devices, driven to the state in which a
//! Linux driver leaves them; a zygote in a process of its own; requests with descriptors over its
//! control socket.
//!
//! A zygote's guest stands still until it is copied; the guest of a [`source`] runs, that is, waits for
//! an interrupt or watches its clock ([`ticking_guest`]), and is copied while it does.

pub mod bench;
pub mod branch_bench;
mod chain;
pub mod chain_bench;
mod drivers;
pub mod gap_bench;
mod guest;
pub mod source;
mod subcommand;
pub mod ticking_guest;
mod waiting_guest;
pub mod zygote;

pub use guest::Failure;
pub use source::{Branched, Guest, Pages, Source, Writing};
pub use ticking_guest::{Watch, Window};
pub use zygote::{Copies, RawZygote, Size};
