//! Tap descriptors: made, found again in a running monitor, emptied.
#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::process::PidfdGetfdFlags;

const DEVICE: &str = "/dev/net/tun";

/// Makes the tap called `name` in the calling thread's namespace. It lasts as long as a descriptor of it.
pub(crate) fn create(name: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let tap = rustix::fs::open(DEVICE, flags, Mode::empty()).map_err(explain)?;
    // SAFETY: `ifreq` is plain data, for which zeros are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    assert!(name.len() < request.ifr_name.len(), "names of taps are constants, and short");
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes a `struct ifreq`, which `request` is.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF as libc::Ioctl, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(tap) }
}

fn explain(error: rustix::io::Errno) -> io::Error {
    let source = io::Error::from(error);
    match error {
        rustix::io::Errno::NOENT | rustix::io::Errno::NODEV => {
            io::Error::new(source.kind(), format!("{source}: {DEVICE} is missing; modprobe tun"))
        }
        _ => source,
    }
}

/// The tap that process `pid`, which `pidfd` holds, has open. Needs Linux 5.6 and the right to trace the process.
pub(crate) fn of_process(pid: i32, pidfd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        if fs::read_link(entry.path()).is_ok_and(|target| target == Path::new(DEVICE)) {
            let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
            let number = number.ok_or(io::ErrorKind::InvalidData)?;
            return Ok(rustix::process::pidfd_getfd(pidfd, number, PidfdGetfdFlags::empty())?);
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("process {pid} has no tap open")))
}

/// Throws away the packets that nobody read.
pub(crate) fn drain(tap: impl AsFd) -> io::Result<()> {
    // More than the interface's queue (500) and what may arrive meanwhile; the interface is down.
    const LIMIT: usize = 4096;
    let mut packet = vec![0; 66_000];
    for _ in 0..LIMIT {
        match rustix::io::read(&tap, &mut packet[..]) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::Error::other("packets keep coming although the interface is down"))
}
