//! Interfaces, addresses and routes, by netlink (rtnetlink(7)).
//!
//! A socket works in the namespace of the thread that opened it. All of this runs on threads that wait, one
//! request after the other, so there is nothing for an asynchronous connection to do.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use crate::plan::Cidr;

/// A route: where it leads to, and the number of the interface it leads through.
pub(crate) struct Route {
    pub(crate) to: Cidr,
    pub(crate) through: Option<u32>,
}

/// A connection to the kernel about the namespace in which it was opened.
pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Connects for the calling thread's namespace.
    pub(crate) fn open() -> io::Result<Self> {
        let socket = Socket::new(NETLINK_ROUTE)?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Makes a pair of interfaces: `here` in this namespace, `there` in the one given.
    pub(crate) fn add_link_to(&mut self, here: &str, there: &str, namespace: BorrowedFd<'_>) -> io::Result<()> {
        let mut peer = LinkMessage::default();
        peer.attributes = vec![LinkAttribute::IfName(there.to_owned()), LinkAttribute::NetNsFd(namespace.as_raw_fd())];
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(here.to_owned()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
            ]),
        ];
        self.ask(RouteNetlinkMessage::NewLink(link), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Gives an interface an Ethernet address.
    pub(crate) fn set_mac(&mut self, interface: u32, mac: [u8; 6]) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = interface;
        link.attributes = vec![LinkAttribute::Address(mac.to_vec())];
        self.ask(RouteNetlinkMessage::SetLink(link), 0)
    }

    /// Brings an interface up or down.
    pub(crate) fn set_up(&mut self, interface: u32, up: bool) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = interface;
        link.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
        link.header.change_mask = LinkFlags::Up;
        self.ask(RouteNetlinkMessage::SetLink(link), 0)
    }

    /// Removes an interface, and with it the other end of a pair.
    pub(crate) fn remove_link(&mut self, interface: u32) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = interface;
        self.ask(RouteNetlinkMessage::DelLink(link), 0)
    }

    /// Gives an interface an address.
    pub(crate) fn add_address(&mut self, interface: u32, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.prefix_len = prefix;
        message.header.index = interface;
        let address = IpAddr::V4(address);
        message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
        self.ask(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Sends everything else by way of `gateway`.
    pub(crate) fn add_default_route(&mut self, gateway: Ipv4Addr) -> io::Result<()> {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Static;
        message.header.scope = RouteScope::Universe;
        message.header.kind = RouteType::Unicast;
        message.attributes = vec![RouteAttribute::Gateway(RouteAddress::Inet(gateway))];
        self.ask(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// All IPv4 routes but those to everywhere, of all tables, the host's own addresses among them.
    pub(crate) fn routes(&mut self) -> io::Result<Vec<Route>> {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        let mut routes = Vec::new();
        self.exchange(RouteNetlinkMessage::GetRoute(message), NLM_F_DUMP, |answer| {
            let RouteNetlinkMessage::NewRoute(route) = answer else { return };
            let (mut to, mut through) = (None, None);
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Destination(RouteAddress::Inet(address)) => to = Some(*address),
                    RouteAttribute::Oif(index) => through = Some(*index),
                    _ => {}
                }
            }
            let prefix = route.header.destination_prefix_length;
            let bounded = matches!(route.header.kind, RouteType::Unicast | RouteType::Local | RouteType::BlackHole);
            if let Some(to) = to.filter(|_| prefix > 0 && bounded) {
                routes.push(Route { to: Cidr::around(to, prefix), through });
            }
        })?;
        Ok(routes)
    }

    /// The number of the interface called `name`, if there is one.
    pub(crate) fn index_of(&mut self, name: &str) -> io::Result<Option<u32>> {
        match rustix::net::netdevice::name_to_index(rustix_fd(&self.socket), name) {
            Ok(index) => Ok(Some(index)),
            Err(rustix::io::Errno::NODEV) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// [`index_of`](Self::index_of) an interface that must be there.
    pub(crate) fn expect_index_of(&mut self, name: &str) -> io::Result<u32> {
        let index = self.index_of(name)?;
        index.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("there is no interface {name}")))
    }

    fn ask(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.exchange(message, NLM_F_ACK | flags, |_| {})
    }

    /// Sends one request and reads until its last answer.
    fn exchange(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
        mut each: impl FnMut(RouteNetlinkMessage),
    ) -> io::Result<()> {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        loop {
            let (answer, _) = self.socket.recv_from_full()?;
            let mut rest = &answer[..];
            while !rest.is_empty() {
                let malformed = |error| io::Error::new(io::ErrorKind::InvalidData, format!("{error}"));
                let one = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(malformed)?;
                let length = (one.header.length as usize).next_multiple_of(4).min(rest.len());
                if length == 0 {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "a netlink message without a length"));
                }
                rest = &rest[length..];
                if one.header.sequence_number != self.sequence {
                    continue;
                }
                match one.payload {
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(()),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::InnerMessage(message) => each(message),
                    _ => {}
                }
            }
        }
    }
}

#[allow(unsafe_code)]
fn rustix_fd(socket: &Socket) -> BorrowedFd<'_> {
    // SAFETY: the socket keeps its descriptor open for as long as it is borrowed here.
    unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) }
}
