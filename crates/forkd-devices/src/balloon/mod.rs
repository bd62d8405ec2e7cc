//! virtio-balloon: memory that the guest does not need leaves the monitor.
//!
//! Mostly by free page reporting, which needs no target: the guest's allocator reports free blocks
//! as they come up. The freed pages leave the process, so they cost nothing and enter no layer.

mod device;
mod parse;
mod state;
#[cfg(test)]
mod tests;

pub use device::{Balloon, BalloonTarget, PageRelease};
pub use parse::{PAGE_NUMBER_LEN, parse_page_numbers, whole_pages};
pub use state::BalloonState;
