//! What can go wrong with networks.

use std::io;

use crate::plan::Cidr;

/// Why a network could not be made, leased or cleared.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A call of the operating system failed.
    #[error("cannot {what}: {source}")]
    System {
        /// What was attempted, on which object.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The firewall's program is not there.
    #[error("cannot run nft: {source}; install it: apt-get install nftables")]
    NoNft {
        /// Why not.
        source: io::Error,
    },
    /// The firewall's program refused.
    #[error("cannot {what}: nft says: {said}")]
    Nft {
        /// What was attempted, on which object.
        what: String,
        /// Its own words.
        said: String,
    },
    /// No range of addresses is free for the links between the host and its networks.
    #[error(
        "every range that links to networks could have overlaps a route of this host: {}; \
         name a free one with --network-range", list(.clashes)
    )]
    NoRange {
        /// What was tried, and with which route it clashes.
        clashes: Vec<(Cidr, Cidr)>,
    },
    /// All slots that the range has room for exist.
    #[error("all {slots} networks that {range} has addresses for are in use; name a larger range with --network-range")]
    Full {
        /// The range.
        range: Cidr,
        /// How many slots it has.
        slots: u32,
    },
    /// Networks are being put away.
    #[error("no network is made any more: the daemon stops")]
    Closed,
}

fn list(clashes: &[(Cidr, Cidr)]) -> String {
    let texts: Vec<_> = clashes.iter().map(|(range, route)| format!("{range} with {route}")).collect();
    texts.join(", ")
}

impl NetError {
    /// For `map_err` of a call that was to do `what`.
    pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::System { what, source }
    }
}
