//! Tests on real virtual machines, written as prose.
//!
//! A test drives the programs as a user does: it runs `forkd`, which finds or starts the daemon —
//! on this host where KVM can run Linux, in `forkd machine` where it cannot. So every test passes
//! through the command line, the API, the node, the monitor, a Linux kernel and the agent.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! let host = forkd_testkit::Host::shared()?;
//! let snapshot = host.numpy()?;
//! let sandbox = host.spawn_one(snapshot)?;
//! assert_eq!(sandbox.eval("numpy.zeros(2).tolist()")?, "[0.0, 0.0]");
//! # Ok(())
//! # }
//! ```

mod counting;
mod daemon;
pub mod faults;
mod host;
mod kernel;
mod output;
mod patience;
mod readme;
mod relay;
mod sandbox;

pub use counting::{CountingLoop, Received};
pub use daemon::{Answer, Body, Daemon};
pub use host::{Host, NUMPY_DISK, Snapshot};
pub use kernel::InstalledKernel;
pub use output::{Output, Said};
pub use patience::{finish, on_real_guests};
pub use readme::readme_commands;
pub use sandbox::Sandbox;
