//! Packets through a real tap, looked at with a packet socket on its other side.
//!
//! Making a tap takes CAP_NET_ADMIN; without it these tests say so and end.
#![allow(clippy::unwrap_used, clippy::print_stderr, unsafe_code)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::{NET_HEADER_LEN, Net, NetState};
use crate::DeviceState;
use crate::test_driver::{ALL_FEATURES, Driver};

const MAC: [u8; 6] = [0xaa, 0xfc, 0, 0, 0, 1];
/// An EtherType for local experiments (IEEE 802), which no protocol of the host answers.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
const RECEIVE_AT: u64 = 0x20_0000;
const TRANSMIT_AT: u64 = 0x40_0000;

/// A tap that is up, and a packet socket that sees what the tap's interface sees.
struct Wire {
    tap: Option<OwnedFd>,
    socket: OwnedFd,
    index: i32,
}

fn wire() -> Option<Wire> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("fkt{}n{}", std::process::id() % 1_000_000, NEXT.fetch_add(1, Ordering::Relaxed));
    let result = make_wire(&name);
    if let Err(error) = &result {
        eprintln!("SKIPPED: no tap can be made here ({error})");
    }
    result.ok()
}

fn make_wire(name: &str) -> std::io::Result<Wire> {
    let check = |result: i32| if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(result) };
    let tap: OwnedFd = std::fs::File::options().read(true).write(true).open("/dev/net/tun")?.into();
    // SAFETY: all-zero is a valid ifreq; each ioctl below reads or writes one ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
    // SAFETY: as above.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) })?;
    let protocol = u16::from_be_bytes(ETHERTYPE).to_be();
    // SAFETY: plain system calls; the new descriptor is owned at once.
    let socket = unsafe {
        let fd = check(libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(protocol)))?;
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: as above.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFINDEX as _, &raw mut request) })?;
    // Without this the host sends packets of its own.
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
    // SAFETY: the call before filled this field.
    let index = unsafe { request.ifr_ifru.ifru_ifindex };
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    // SAFETY: as above.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw mut request) })?;
    // SAFETY: the address is a whole sockaddr_ll.
    unsafe {
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = index;
        let len = size_of_val(&address) as libc::socklen_t;
        check(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len))?;
    }
    Ok(Wire { tap: Some(tap), socket, index })
}

impl Wire {
    /// Sends a frame out of the interface, to the guest.
    fn send(&self, frame: &[u8]) {
        rustix::io::write(&self.socket, frame).unwrap();
    }

    /// The next frame of the test's own kind that came from the guest.
    fn receive(&self) -> Option<Vec<u8>> {
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            let mut bytes = vec![0; 70_000];
            let got = rustix::net::recv(&self.socket, &mut bytes[..], rustix::net::RecvFlags::DONTWAIT);
            match got {
                Ok((len, _)) if bytes[6..12] == MAC => {
                    bytes.truncate(len);
                    return Some(bytes);
                }
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        None
    }
}

fn frame(to: [u8; 6], from: [u8; 6], len: usize, fill: u8) -> Vec<u8> {
    let mut bytes = [to, from].concat();
    bytes.extend(ETHERTYPE);
    bytes.extend((0..len - 14).map(|index| index as u8 ^ fill));
    bytes
}

/// The device's driver with `count` receive buffers of `size` bytes.
fn start(wire: &mut Wire, features: u64, count: u64, size: u32) -> Driver {
    let mut driver = Driver::start(Box::new(Net::new(MAC, wire.tap.take().unwrap()).unwrap()), features);
    post(&mut driver, count, size);
    driver
}

fn post(driver: &mut Driver, count: u64, size: u32) {
    for index in 0..count {
        driver.add(0, &[(RECEIVE_AT + index * u64::from(size), size, true)]);
    }
    driver.kick(0);
}

/// Waits until something is in the receive queue.
fn received(driver: &mut Driver, size: u32) -> Vec<Vec<u8>> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        driver.poll();
        let used = driver.take_used(0);
        if !used.is_empty() || Instant::now() > deadline {
            // Buffers were posted in order of their heads, and are used in that order.
            return used
                .iter()
                .map(|&(head, len)| {
                    let mut bytes = vec![0; len as usize];
                    let at = RECEIVE_AT + u64::from(head) * u64::from(size);
                    driver.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
                    bytes
                })
                .collect();
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Frames of the host's own (router solicitations and the like) are passed over.
fn own(packets: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    packets.into_iter().filter(|packet| packet.len() < 26 || packet[24..26] == ETHERTYPE).collect()
}

fn transmit(driver: &mut Driver, frame: &[u8]) {
    driver.memory.write_slice(&[0; NET_HEADER_LEN], GuestAddress(TRANSMIT_AT)).unwrap();
    driver.memory.write_slice(frame, GuestAddress(TRANSMIT_AT + 0x100)).unwrap();
    driver.add(1, &[(TRANSMIT_AT, NET_HEADER_LEN as u32, false), (TRANSMIT_AT + 0x100, frame.len() as u32, false)]);
    driver.kick(1);
    assert_eq!(driver.take_used(1).len(), 1);
}

#[test]
fn frames_cross_in_both_directions() {
    let Some(mut wire) = wire() else { return };
    let mut driver = start(&mut wire, ALL_FEATURES, 64, 2048);
    assert_eq!(driver.read(0x100).to_le_bytes(), MAC[..4]);
    let out = frame([0xff; 6], MAC, 600, 1);
    transmit(&mut driver, &out);
    assert_eq!(wire.receive().unwrap(), out);
    let inward = frame(MAC, [2, 0, 0, 0, 0, 9], 900, 2);
    wire.send(&inward);
    let mut packets = Vec::new();
    while packets.is_empty() {
        packets = own(received(&mut driver, 2048));
    }
    assert_eq!(packets[0][10..12], [1, 0], "the packet is in one buffer");
    assert_eq!(packets[0][NET_HEADER_LEN..], inward);
}

#[test]
fn a_guest_without_buffers_leaves_packets_in_the_tap() {
    let Some(mut wire) = wire() else { return };
    let mut driver = start(&mut wire, ALL_FEATURES, 0, 2048);
    for fill in 0..20 {
        wire.send(&frame(MAC, [2, 0, 0, 0, 0, 9], 100, fill));
    }
    // Edges are taken once and do not come again.
    let mut polls = 0;
    while driver.poll() {
        polls += 1;
        assert!(polls < 100, "the event loop spins");
    }
    post(&mut driver, 64, 2048);
    let mut fills = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(5);
    while fills.len() < 20 && Instant::now() < deadline {
        fills.extend(own(received(&mut driver, 2048)).iter().map(|packet| packet[NET_HEADER_LEN + 14]));
    }
    assert_eq!(fills, (0..20).collect::<Vec<u8>>());
}

#[test]
fn a_packet_goes_over_several_buffers_or_is_dropped_without_merging() {
    let Some(mut wire) = wire() else { return };
    let mut driver = start(&mut wire, ALL_FEATURES, 64, 128);
    let inward = frame(MAC, [2, 0, 0, 0, 0, 9], 1000, 3);
    wire.send(&inward);
    let packets = loop {
        let packets = received(&mut driver, 128);
        assert!(!packets.is_empty());
        if let Some(start) = packets.iter().position(|packet| packet.len() == 128 && packet[24..26] == ETHERTYPE) {
            break packets[start..].to_vec();
        }
    };
    let count = usize::from(u16::from_le_bytes([packets[0][10], packets[0][11]]));
    assert_eq!(count, (1000 + NET_HEADER_LEN).div_ceil(128));
    let joined = packets[..count].concat();
    assert_eq!(joined[NET_HEADER_LEN..], inward);

    let Some(mut wire) = self::wire() else { return };
    let device = Net::new(MAC, wire.tap.take().unwrap()).unwrap();
    let counters = device.counters();
    let mut driver = Driver::start(Box::new(device), !(1 << 15));
    post(&mut driver, 4, 128);
    wire.send(&inward);
    let deadline = Instant::now() + Duration::from_secs(5);
    while counters.receive_dropped.load(Ordering::Relaxed) == 0 && Instant::now() < deadline {
        driver.poll();
    }
    assert!(counters.receive_dropped.load(Ordering::Relaxed) >= 1);
    let small = frame(MAC, [2, 0, 0, 0, 0, 9], 60, 4);
    wire.send(&small);
    let mut packets = Vec::new();
    while packets.is_empty() && Instant::now() < deadline {
        packets = own(received(&mut driver, 128));
    }
    assert_eq!(packets[0][NET_HEADER_LEN..], small, "the buffer of the dropped packet is used again");
}

#[test]
fn a_packet_waits_until_there_are_enough_buffers_for_it() {
    let Some(mut wire) = wire() else { return };
    let mut driver = start(&mut wire, ALL_FEATURES, 3, 128);
    let inward = frame(MAC, [2, 0, 0, 0, 0, 9], 1000, 7);
    wire.send(&inward);
    let until = Instant::now() + Duration::from_millis(200);
    let mut polls = 0;
    while Instant::now() < until {
        polls += usize::from(driver.poll());
    }
    assert!(polls < 100, "the event loop spins");
    // Exactly as many as the packet needs: none of the first three may be lost.
    for index in 3..8 {
        driver.add(0, &[(RECEIVE_AT + index * 128, 128, true)]);
    }
    assert!(driver.kick(0), "the device asks to hear about buffers");
    let packets = received(&mut driver, 128);
    assert_eq!(packets.concat()[NET_HEADER_LEN..], inward);
}

#[test]
fn nonsense_from_the_guest_is_dropped_and_counted() {
    let Some(mut wire) = wire() else { return };
    let device = Net::new(MAC, wire.tap.take().unwrap()).unwrap();
    let counters = device.counters();
    let mut driver = Driver::start(Box::new(device), ALL_FEATURES);
    driver.add(1, &[(TRANSMIT_AT, 5, false)]);
    driver.add(1, &[(TRANSMIT_AT, 0x2_0000, false)]);
    // A checksum that starts past the packet's end.
    let mut packet = [0_u8; 80];
    packet[0] = 1;
    packet[6..8].copy_from_slice(&60_000_u16.to_le_bytes());
    driver.memory.write_slice(&packet, GuestAddress(TRANSMIT_AT)).unwrap();
    driver.add(1, &[(TRANSMIT_AT, 80, false)]);
    driver.kick(1);
    assert_eq!(driver.take_used(1).len(), 3);
    assert_eq!(counters.transmit_dropped.load(Ordering::Relaxed), 3);
}

#[test]
fn a_copy_without_a_tap_goes_on_and_loses_its_packets() {
    let Some(mut wire) = wire() else { return };
    let source = start(&mut wire, ALL_FEATURES, 4, 2048);
    let mut counters = None;
    let copying = source.copy(|state| {
        let DeviceState::Net(state) = state else { panic!("a network device saved {state:?}") };
        let device = Net::restore(state, None).unwrap();
        counters = Some(device.counters());
        Box::new(device)
    });
    let mut copy = copying.unwrap();
    transmit(&mut copy, &frame([0xff; 6], MAC, 100, 6));
    assert!(!copy.poll() || copy.take_used(0).is_empty(), "nothing arrives");
    assert_eq!(counters.unwrap().transmit_dropped.load(Ordering::Relaxed), 1);
}

#[test]
fn a_copy_goes_on_with_a_tap_of_its_own() {
    let (Some(mut first), Some(mut second)) = (wire(), wire()) else { return };
    assert_ne!(first.index, second.index);
    let source = start(&mut first, ALL_FEATURES, 64, 2048);
    let tap = second.tap.take().unwrap();
    let mut copy = source
        .copy(|state| {
            let DeviceState::Net(state) = state else { panic!("a network device saved {state:?}") };
            assert_eq!(*state, NetState { mac: MAC, features: Some(source.features) });
            Box::new(Net::restore(state, Some(tap)).unwrap())
        })
        .unwrap();
    let inward = frame(MAC, [2, 0, 0, 0, 0, 9], 100, 5);
    second.send(&inward);
    let mut packets = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(5);
    while packets.is_empty() && Instant::now() < deadline {
        packets = own(received(&mut copy, 2048));
    }
    assert_eq!(packets[0][NET_HEADER_LEN..], inward);
    let out = frame([0xff; 6], MAC, 100, 6);
    transmit(&mut copy, &out);
    assert_eq!(second.receive().unwrap(), out);
}
