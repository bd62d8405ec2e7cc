//! A namespace that plays a guest: its `eth0` is joined to a slot's tap frame by frame, as a monitor does it.
#![allow(unsafe_code)]

use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use forkd_net::Lease;
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::stage::{Server, fresh_namespace, run, within_namespace};

/// A guest that is plugged into a slot until it is dropped.
pub(crate) struct Guest {
    name: String,
    namespace: OwnedFd,
    stop: Arc<AtomicBool>,
    relaying: Option<JoinHandle<()>>,
}

impl Guest {
    pub(crate) fn plug_in(lease: &Lease) -> Self {
        let namespace = fresh_namespace();
        let tap = lease.tap().expect("tap");
        let eth0 = within_namespace(&namespace, || {
            let eth0 = tap_called("eth0");
            run("ip link set lo up");
            run("ip link set eth0 address aa:fc:00:00:00:01");
            run("ip address add 10.42.0.2/24 dev eth0");
            run("ip link set eth0 up");
            run("ip route add default via 10.42.0.1");
            eth0
        });
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let relaying = std::thread::spawn(move || relay(&[tap, eth0], &stopping));
        lease.used_by(ended_process()).expect("note");
        Self { name: format!("guest-of-{}", lease.netns()), namespace, stop, relaying: Some(relaying) }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        within_namespace(&self.namespace, work)
    }

    pub(crate) fn serve(&self, port: u16) -> Server {
        self.within(|| Server::start(port, None))
    }

    pub(crate) fn serve_word(&self, port: u16, word: &str) -> Server {
        let word = word.to_owned();
        self.within(|| Server::start(port, Some(word)))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(relaying) = self.relaying.take() {
            let _ = relaying.join();
        }
    }
}

/// Something that counts as a user that has ended; the relay ends before its guest's lease does.
fn ended_process() -> OwnedFd {
    let mut child = std::process::Command::new("true").spawn().expect("true");
    let pid = rustix::process::Pid::from_raw(child.id() as i32).expect("a pid");
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).expect("pidfd");
    child.wait().expect("wait");
    pidfd
}

fn relay(ends: &[OwnedFd; 2], stop: &AtomicBool) {
    let mut frame = vec![0; 66_000];
    let moment = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
    while !stop.load(Ordering::Relaxed) {
        let mut poll = ends.each_ref().map(|end| PollFd::new(end, PollFlags::IN));
        let _ = rustix::event::poll(&mut poll, Some(&moment));
        for (from, to) in [(0, 1), (1, 0)] {
            while let Ok(len) = rustix::io::read(&ends[from], &mut frame[..]) {
                let _ = rustix::io::write(&ends[to], &frame[..len]);
            }
        }
    }
}

/// Sends an echo request and waits for its answer.
pub(crate) fn ping(to: Ipv4Addr) {
    use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, ipproto, sockopt};
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP)).expect("raw socket");
    let limit = Some(Duration::from_secs(5));
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, limit).expect("timeout");
    // Echo request, no code, its checksum, identifier 0x1234, number 1.
    let request = [8, 0, 0xe5, 0xca, 0x12, 0x34, 0, 1];
    rustix::net::sendto(&socket, &request, SendFlags::empty(), &SocketAddrV4::new(to, 0)).expect("send");
    let mut packet = [0; 256];
    loop {
        let (len, _) = rustix::net::recv(&socket, &mut packet[..], RecvFlags::empty()).expect("an answer");
        // Behind the 20 bytes of the IP header: echo reply to the same identifier.
        if len >= 28 && packet[20] == 0 && packet[24..26] == [0x12, 0x34] {
            return;
        }
    }
}

fn tap_called(name: &str) -> OwnedFd {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let tap = rustix::fs::open("/dev/net/tun", flags, Mode::empty()).expect("/dev/net/tun");
    // SAFETY: `ifreq` is plain data, for which zeros are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes a `struct ifreq`, which `request` is.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF as libc::Ioctl, &raw mut request) };
    assert!(result >= 0, "TUNSETIFF: {}", std::io::Error::last_os_error());
    tap
}
