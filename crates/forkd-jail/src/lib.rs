//! What keeps a machine's processes in their place: what they may take of the host.
//!
//! | module | owns |
//! |---|---|
//! | [`cgroup`] | groups of processes and their limits |

pub mod cgroup;
