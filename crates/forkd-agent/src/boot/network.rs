//! Network interfaces of the guest (netdevice(7)).

// Interfaces are set up by ioctls on `struct ifreq`, which have no safe form.
#![allow(unsafe_code)]

use std::fs;
use std::io::{self, Write};
use std::mem;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::console;
use crate::options::NetworkAddress;

const INTERFACE: &str = "eth0";
const NAME_SERVERS: &str = "nameserver 1.1.1.1\nnameserver 8.8.8.8\n";

/// Brings loopback up, and `eth0` if there is one and it is to have an address.
pub(super) fn bring_up(network: Option<&NetworkAddress>) {
    let control = match Control::open() {
        Ok(control) => control,
        Err(error) => return console::warn(&format!("no network: cannot open a socket: {error}")),
    };
    if let Err(error) = control.up("lo") {
        console::warn(&format!("cannot bring loopback up: {error}"));
    }
    let Some(network) = network.filter(|_| Path::new("/sys/class/net").join(INTERFACE).exists()) else { return };
    if let Err(error) = control.configure(INTERFACE, network) {
        console::warn(&format!("cannot configure {INTERFACE} as {}/{}: {error}", network.address, network.prefix));
    }
    if let Err(error) = ensure_name_servers(Path::new("/etc/resolv.conf")) {
        console::warn(&format!("cannot write /etc/resolv.conf: {error}"));
    }
}

/// Gives an image without name servers some; what it brings is left alone.
fn ensure_name_servers(file: &Path) -> io::Result<()> {
    if fs::metadata(file).is_ok_and(|file| file.len() > 0) {
        return Ok(());
    }
    // It may be a link into /run that nothing has filled yet.
    if let Ok(target) = fs::read_link(file)
        && let Some(parent) = file.parent().unwrap_or(Path::new("/")).join(target).parent()
    {
        fs::create_dir_all(parent)?;
    }
    fs::OpenOptions::new().write(true).create(true).truncate(true).open(file)?.write_all(NAME_SERVERS.as_bytes())
}

/// A socket to make the requests on.
struct Control(OwnedFd);

impl Control {
    fn open() -> io::Result<Self> {
        Ok(Self(rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?))
    }

    fn configure(&self, interface: &str, network: &NetworkAddress) -> io::Result<()> {
        self.set_address(libc::SIOCSIFADDR, interface, network.address)?;
        self.set_address(libc::SIOCSIFNETMASK, interface, netmask(network.prefix))?;
        self.up(interface)?;
        if let Some(gateway) = network.gateway {
            self.add_default_route(gateway)?;
        }
        Ok(())
    }

    fn up(&self, interface: &str) -> io::Result<()> {
        let mut request = request_for(interface)?;
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        // SAFETY: SIOCSIFFLAGS reads a `struct ifreq`, which `request` is.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::SIOCSIFFLAGS as libc::Ioctl, &raw const request) })
    }

    fn set_address(&self, what: libc::c_ulong, interface: &str, address: Ipv4Addr) -> io::Result<()> {
        let mut request = request_for(interface)?;
        request.ifr_ifru.ifru_addr = socket_address(address);
        // SAFETY: both requests that are passed as `what` read a `struct ifreq`, which `request` is.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), what as libc::Ioctl, &raw const request) })
    }

    fn add_default_route(&self, gateway: Ipv4Addr) -> io::Result<()> {
        // SAFETY: `rtentry` is plain data whose pointer may be null.
        let mut route: libc::rtentry = unsafe { mem::zeroed() };
        route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_gateway = socket_address(gateway);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        // SAFETY: SIOCADDRT reads a `struct rtentry`, which `route` is.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::SIOCADDRT as libc::Ioctl, &raw const route) })
    }
}

fn request_for(interface: &str) -> io::Result<libc::ifreq> {
    // SAFETY: `ifreq` is plain data, for which zeros are a value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    if interface.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

/// An address as `struct sockaddr`: family, port (none), four bytes.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: `sockaddr` is plain data, for which zeros are a value.
    let mut socket: libc::sockaddr = unsafe { mem::zeroed() };
    socket.sa_family = libc::AF_INET as libc::sa_family_t;
    for (to, from) in socket.sa_data[2..6].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    socket
}

fn netmask(prefix: u8) -> Ipv4Addr {
    Ipv4Addr::from_bits(u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0))
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_become_masks() {
        assert_eq!(
            [0, 8, 24, 32].map(netmask),
            [[0; 4], [255, 0, 0, 0], [255, 255, 255, 0], [255; 4]].map(Ipv4Addr::from)
        );
    }

    #[test]
    fn name_servers_are_given_only_to_images_without() {
        let root = tempfile::tempdir().expect("tempdir");
        let file = root.path().join("resolv.conf");
        std::os::unix::fs::symlink("run/stub.conf", &file).expect("link");
        ensure_name_servers(&file).expect("written through the link");
        assert_eq!(fs::read_to_string(root.path().join("run/stub.conf")).expect("read"), NAME_SERVERS);
        fs::write(&file, "nameserver 9.9.9.9\n").expect("write");
        ensure_name_servers(&file).expect("nothing to do");
        assert_eq!(fs::read_to_string(&file).expect("read"), "nameserver 9.9.9.9\n");
    }
}
