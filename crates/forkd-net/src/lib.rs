//! Networks of sandboxes: slots made ahead, each a namespace with a tap, NAT and a firewall.
//!
//! A slot is a network namespace with a tap for one guest and a link to the host. Every guest has the same address,
//! 10.42.0.2, each in a namespace of its own; copies keep their address, their gateway and even the gateway's
//! Ethernet address, whichever slot they are plugged into.
//!
//! | module | owns |
//! |---|---|
//! | [`plan`] | names and addresses of slots |
//! | `slot` | making, cleaning and removing one |
//! | [`pool`] | slots ahead, leases, what an earlier daemon left |
//! | `claims` | whose a slot is, among all daemons of a host |
//! | [`firewall`] | the rules of namespaces and host |
//! | [`inspection`] | what a host lacks |
//! | `netlink`, `namespace`, `tap`, `conntrack` | calls of the kernel |

mod claims;
mod conntrack;
mod error;
pub mod firewall;
pub mod inspection;
mod namespace;
mod netlink;
pub mod plan;
pub mod pool;
mod slot;
mod tap;

pub use claims::Tenant;
pub use error::NetError;
pub use plan::{Cidr, CidrError, GUEST_MAC};
pub use pool::{Lease, Networks, NetworksConfig, SlotCounts};
