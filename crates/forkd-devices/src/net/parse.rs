//! How long a packet between guest and tap can be.
//!
//! Nothing else of a packet is looked at: the fields of its header (checksum and segmentation
//! offsets) are checked by the tap, in the kernel, against the packet, and a bad one makes the write
//! fail.

/// Length of `virtio_net_hdr_v1`, which comes before every packet.
pub const NET_HEADER_LEN: usize = 12;

/// Ethernet header, without and with a VLAN tag.
const ETHERNET_HEADER_LEN: usize = 14;
const TAGGED_ETHERNET_HEADER_LEN: usize = 18;

/// The longest packet, header included: one that is still to be segmented.
pub const LARGEST_PACKET: usize = NET_HEADER_LEN + TAGGED_ETHERNET_HEADER_LEN + 65535;

/// Whether `len` bytes, header included, can be a packet.
pub fn is_plausible_length(len: usize) -> bool {
    (NET_HEADER_LEN + ETHERNET_HEADER_LEN..=LARGEST_PACKET).contains(&len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_has_an_ethernet_header_and_an_end() {
        assert!(!is_plausible_length(0));
        assert!(!is_plausible_length(25));
        assert!(is_plausible_length(26));
        assert!(is_plausible_length(LARGEST_PACKET));
        assert!(!is_plausible_length(LARGEST_PACKET + 1));
    }
}
