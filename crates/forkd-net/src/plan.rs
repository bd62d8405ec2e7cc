//! Which addresses and names a slot has.
//!
//! A slot is a number from 1 on. All of its names and addresses follow from that number, so that nothing has to
//! be remembered to clear it away:
//!
//! | what | for slot 7, with the range 100.127.0.0/16 |
//! |---|---|
//! | namespace | `forkd-child-7` |
//! | the host's end of the link to it | `forkd-v-7h`, 100.127.0.14/31 |
//! | its end of that link | `veth0`, 100.127.0.15/31 |
//! | tap in the namespace | `forkd-tap0`, 10.42.0.1/24 |
//! | the guest behind the tap | 10.42.0.2 |

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// The address of every guest, in its own namespace.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 42, 0, 2);
/// The address of every tap, which is a guest's way out.
pub const GATEWAY_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 42, 0, 1);
/// The network of a guest and its gateway.
pub const GUEST_NETWORK: Cidr = Cidr { base: Ipv4Addr::new(10, 42, 0, 0), prefix: 24 };
/// The Ethernet address of every guest.
pub const GUEST_MAC: [u8; 6] = [0xaa, 0xfc, 0, 0, 0, 1];
/// The Ethernet address of every tap: one for all, because a copy remembers that of its source's.
pub const GATEWAY_MAC: [u8; 6] = [0xaa, 0xfc, 0, 0, 0, 2];
/// The tap, in each namespace.
pub const TAP: &str = "forkd-tap0";
/// The namespace's end of the link to the host.
pub const UPLINK: &str = "veth0";
/// What the names of the host's ends of links begin with, and nothing else's.
pub const HOST_LINK_PREFIX: &str = "forkd-v-";
/// What the names of namespaces begin with.
pub const NAMESPACE_PREFIX: &str = "forkd-child-";

/// The ranges that are tried for links when none is asked for: shared address space (RFC 6598), addresses for
/// measurements (RFC 2544), and a seldom used private one.
pub const USUAL_RANGES: [Cidr; 4] = [
    Cidr { base: Ipv4Addr::new(100, 127, 0, 0), prefix: 16 },
    Cidr { base: Ipv4Addr::new(100, 64, 0, 0), prefix: 16 },
    Cidr { base: Ipv4Addr::new(198, 19, 0, 0), prefix: 16 },
    Cidr { base: Ipv4Addr::new(10, 213, 0, 0), prefix: 16 },
];

/// A range of IPv4 addresses.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Cidr {
    base: Ipv4Addr,
    prefix: u8,
}

/// Why a text is no range.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CidrError {
    /// Not address, slash and number of bits.
    #[error("{0:?} is not a range of addresses such as 100.127.0.0/16")]
    Malformed(String),
    /// Bits behind the prefix are set.
    #[error("{text} does not begin where a range of its size does; {right} would be right")]
    Unaligned {
        /// As given.
        text: String,
        /// The range that the address lies in.
        right: Cidr,
    },
}

impl Cidr {
    /// The range of `prefix` bits, at most 32, that `address` lies in.
    pub fn around(address: Ipv4Addr, prefix: u8) -> Self {
        let prefix = prefix.min(32);
        let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
        Self { base: Ipv4Addr::from_bits(address.to_bits() & mask), prefix }
    }

    /// Its first address.
    pub fn base(self) -> Ipv4Addr {
        self.base
    }

    /// How many bits all of its addresses share.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// Whether `address` is in it.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        Self::around(address, self.prefix) == self
    }

    /// Whether some address is in both.
    pub fn overlaps(self, other: Self) -> bool {
        if self.prefix <= other.prefix { self.contains(other.base) } else { other.contains(self.base) }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let parse = || {
            let (address, prefix) = text.split_once('/')?;
            let prefix: u8 = prefix.parse().ok().filter(|prefix| *prefix <= 32)?;
            Some((address.parse::<Ipv4Addr>().ok()?, prefix))
        };
        let (address, prefix) = parse().ok_or_else(|| CidrError::Malformed(text.to_owned()))?;
        let range = Self::around(address, prefix);
        if range.base == address {
            Ok(range)
        } else {
            Err(CidrError::Unaligned { text: text.to_owned(), right: range })
        }
    }
}

/// The two ends of the link between the host and a slot; each the other's only neighbour (RFC 3021).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LinkAddresses {
    /// The host's end.
    pub host: Ipv4Addr,
    /// The namespace's end.
    pub slot: Ipv4Addr,
}

/// How many bits the two addresses of a link share.
pub(crate) const LINK_PREFIX: u8 = 31;

/// Gives slots their addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AddressPlan {
    range: Cidr,
}

impl AddressPlan {
    /// Links out of `range`.
    pub fn new(range: Cidr) -> Self {
        Self { range }
    }

    /// Links out of the first of `candidates` that overlaps none of `taken`.
    ///
    /// # Errors
    /// Each candidate with what it overlaps, when all do.
    pub fn choose(candidates: &[Cidr], taken: &[Cidr]) -> Result<Self, Vec<(Cidr, Cidr)>> {
        let mut clashes = Vec::new();
        for &range in candidates {
            match taken.iter().find(|other| range.overlaps(**other)) {
                Some(&other) => clashes.push((range, other)),
                None => return Ok(Self { range }),
            }
        }
        Err(clashes)
    }

    /// The range.
    pub fn range(self) -> Cidr {
        self.range
    }

    /// How many slots there can be, at most what fits the names of interfaces.
    pub fn slots(self) -> u32 {
        const NAMED: u32 = 99_999;
        // The first pair of addresses is that of no slot, since slots count from 1.
        let pairs = 1_u64 << (32 - self.range.prefix).saturating_sub(1);
        u32::try_from(pairs - 1).map_or(NAMED, |slots| slots.min(NAMED))
    }

    /// The addresses of slot `index`, if there is one of that number.
    pub fn link(self, index: u32) -> Option<LinkAddresses> {
        if index == 0 || index > self.slots() {
            return None;
        }
        let host = self.range.base.to_bits() + 2 * index;
        Some(LinkAddresses { host: host.into(), slot: (host + 1).into() })
    }
}

/// The namespace of slot `index`.
pub fn namespace_name(index: u32) -> String {
    format!("{NAMESPACE_PREFIX}{index}")
}

/// The host's end of the link to slot `index`.
pub fn host_link_name(index: u32) -> String {
    format!("{HOST_LINK_PREFIX}{index}h")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_are_read_and_written() {
        for text in ["0.0.0.0/0", "100.127.0.0/16", "10.42.0.2/32"] {
            assert_eq!(text.parse::<Cidr>().expect(text).to_string(), text);
        }
        for bad in ["", "10.0.0.0", "10.0.0.0/33", "10.0.0/8", "10.0.0.0/-1", "::/0"] {
            assert!(matches!(bad.parse::<Cidr>(), Err(CidrError::Malformed(_))), "{bad}");
        }
        let error = "100.64.1.0/16".parse::<Cidr>().expect_err("unaligned").to_string();
        assert!(error.contains("100.64.0.0/16 would be right"), "{error}");
    }

    #[test]
    fn the_first_free_range_is_taken_and_clashes_are_named() {
        let cidr = |text: &str| text.parse::<Cidr>().expect("legal");
        let candidates = [cidr("100.127.0.0/16"), cidr("100.64.0.0/16")];
        let plan = |taken: &[Cidr]| AddressPlan::choose(&candidates, taken).map(AddressPlan::range);
        assert_eq!(plan(&[]), Ok(candidates[0]));
        assert_eq!(plan(&[cidr("100.127.3.0/24"), cidr("10.0.0.0/8")]), Ok(candidates[1]));
        let all = cidr("100.64.0.0/10");
        assert_eq!(plan(&[all]), Err(vec![(candidates[0], all), (candidates[1], all)]));
    }

    #[test]
    fn names_fit_interfaces_up_to_the_last_slot() {
        let plan = AddressPlan::new("10.0.0.0/8".parse().expect("legal"));
        assert_eq!(plan.slots(), 99_999);
        // IFNAMSIZ is 16, with the zero byte.
        assert!(host_link_name(plan.slots()).len() < 16);
        assert_eq!(AddressPlan::new("100.127.0.0/16".parse().expect("legal")).slots(), 32_767);
    }

    proptest! {
        #[test]
        fn links_lie_in_the_range_and_apart(
            base: u32, prefix in 0_u8..=32, first in 0_u32..200_000, second in 0_u32..200_000,
        ) {
            let range = Cidr::around(base.into(), prefix);
            let plan = AddressPlan::new(range);
            for index in [first, second] {
                prop_assert_eq!(plan.link(index).is_some(), (1..=plan.slots()).contains(&index));
            }
            if let Some(link) = plan.link(first) {
                let pair = Cidr::around(link.host, LINK_PREFIX);
                prop_assert!(range.contains(link.host) && range.contains(link.slot));
                prop_assert!(pair.contains(link.slot) && pair.base() == link.host && link.slot != link.host);
                if let Some(other) = plan.link(second).filter(|_| first != second) {
                    prop_assert!(!pair.overlaps(Cidr::around(other.host, LINK_PREFIX)));
                }
            }
        }

        #[test]
        fn overlapping_is_having_an_address_in_common(a: u32, b: u32, p in 0_u8..=32, q in 0_u8..=32) {
            let (one, other) = (Cidr::around(a.into(), p), Cidr::around((a ^ (b >> p.min(31))).into(), q));
            let last = |range: Cidr| u64::from(range.base().to_bits()) + (1_u64 << (32 - range.prefix())) - 1;
            let first = |range: Cidr| u64::from(range.base().to_bits());
            let common = first(one) <= last(other) && first(other) <= last(one);
            prop_assert_eq!(one.overlaps(other), common);
            prop_assert_eq!(other.overlaps(one), common);
        }
    }
}
