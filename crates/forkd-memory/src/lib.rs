//! Guest RAM, and the layers it is stored in.
//!
//! - [`layout`]: where RAM lies in the guest's physical address space.
//! - [`ram`]: the private mapping that is a guest's memory. It is made once and lives as long as
//!   the process; `fork(2)` copies it.
//! - `chain`: the layers that it was made from, and which of them holds each page.
//! - `areas`: from which file each part of it is mapped.
//! - [`contents`]: writing it as a base, or as a layer of what changed.
//! - [`page_map`]: which pages of it are present or private, read from the kernel's page tables.
//! - [`layer`]: the file format that holds page runs, for memory and for disks.
//!
//! Guest memory is always `MAP_PRIVATE`: a page that nobody wrote stays in the page cache, shared
//! by every copy and absent from the forked page tables; a page that somebody wrote is anonymous
//! and thereby known to differ from the file.

mod areas;
mod chain;
pub mod contents;
pub mod layer;
pub mod layout;
pub mod page_map;
pub mod ram;

pub use layer::{Layer, LayerError, LayerSummary, LayerWriter};
pub use layout::{MemoryLayout, MemorySizeError, Region};
pub use ram::{Backing, GuestRam, RamError};

/// How the rest of the monitor reads and writes guest memory; cheap to clone.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
