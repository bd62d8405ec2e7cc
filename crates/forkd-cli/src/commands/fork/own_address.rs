//! The guest's address as an address of this host, for as long as it is needed.
//!
//! Existing clients dial a guest at 10.42.0.2 from the host. The address goes to the loopback interface, so that it
//! is this host's and nobody else's. Netlink (rtnetlink(7)): one message asks, one answers.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with};

const LOOPBACK: &str = "lo";

const HEADER_LEN: usize = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const AF_INET: u8 = 2;
const RT_SCOPE_HOST: u8 = 254;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;

/// An address that was put on the loopback interface; it is taken away again when this is dropped.
#[derive(Debug)]
pub(super) struct OwnAddress(Ipv4Addr);

impl OwnAddress {
    /// Adds the address. None when it is there already, and then stays.
    pub(super) fn add(address: Ipv4Addr) -> io::Result<Option<Self>> {
        match ask(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, address) {
            Ok(()) => Ok(Some(Self(address))),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Drop for OwnAddress {
    fn drop(&mut self) {
        // If somebody else has removed it, so much the better.
        let _ = ask(RTM_DELADDR, 0, self.0);
    }
}

fn ask(kind: u16, flags: u16, address: Ipv4Addr) -> io::Result<()> {
    // Of netlink's protocols, number 0 is that of addresses and routes.
    let socket: OwnedFd = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    let interface = rustix::net::netdevice::name_to_index(&socket, LOOPBACK)?;
    let request = message(kind, flags, address, interface);
    sendto(&socket, &request, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    let mut answer = [0; 1024];
    let (got, _) = recv(&socket, &mut answer[..], RecvFlags::empty())?;
    outcome(&answer[..got])
}

fn message(kind: u16, flags: u16, address: Ipv4Addr, interface: u32) -> Vec<u8> {
    let mut message = Vec::with_capacity(40);
    message.extend(0u32.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend((NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
    // Sequence number and sender; there is one message, and the kernel knows who asks.
    message.extend([0; 8]);
    let prefix_len = 32;
    message.extend([AF_INET, prefix_len, 0, RT_SCOPE_HOST]);
    message.extend(interface.to_ne_bytes());
    for attribute in [IFA_LOCAL, IFA_ADDRESS] {
        message.extend(8u16.to_ne_bytes());
        message.extend(attribute.to_ne_bytes());
        message.extend(address.octets());
    }
    let len = message.len() as u32;
    message[..4].copy_from_slice(&len.to_ne_bytes());
    message
}

/// What an acknowledgement says: zero, or a negative error number.
fn outcome(answer: &[u8]) -> io::Result<()> {
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
    let code = answer.get(HEADER_LEN..HEADER_LEN + 4).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    match (kind, code) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(io::Error::from_raw_os_error(-code)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer is no acknowledgement")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_is_what_rtnetlink_documents() {
        let message = message(RTM_NEWADDR, NLM_F_CREATE, Ipv4Addr::new(10, 42, 0, 2), 1);
        assert_eq!(message.len(), 40);
        assert_eq!(u32::from_ne_bytes(message[..4].try_into().expect("four")), 40);
        assert_eq!(message[HEADER_LEN..HEADER_LEN + 4], [2, 32, 0, 254]);
        assert_eq!(message[28..32], [10, 42, 0, 2]);
        assert_eq!(message[36..], [10, 42, 0, 2]);
    }

    #[test]
    fn acknowledgements_are_errors_or_not() {
        let answer = |code: i32| {
            let mut answer = vec![0; HEADER_LEN];
            answer[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
            answer.extend(code.to_ne_bytes());
            answer
        };
        outcome(&answer(0)).expect("no error");
        assert_eq!(outcome(&answer(-17)).expect_err("EEXIST").kind(), io::ErrorKind::AlreadyExists);
        assert!(outcome(&[]).is_err());
    }

    /// Without the right to change addresses the kernel says so; with it the address comes and goes.
    #[test]
    fn an_address_is_there_while_it_is_needed_or_refused() {
        let address = Ipv4Addr::new(198, 51, 100, 77);
        match OwnAddress::add(address) {
            Ok(own) => {
                let own = own.expect("nobody else has an address for documentation");
                std::net::TcpListener::bind((address, 0)).expect("it is this host's");
                assert!(OwnAddress::add(address).expect("asked again").is_none());
                drop(own);
                assert!(std::net::TcpListener::bind((address, 0)).is_err(), "it is gone");
            }
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}"),
        }
    }
}
