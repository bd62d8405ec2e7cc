//! Listening on vsock (vsock(7)).

// rustix knows the family but not its address, and binding takes a raw one.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

struct Address(libc::sockaddr_vm);

// SAFETY: the pointer is to a whole `sockaddr_vm`, which lives through the call, with its length.
unsafe impl SocketAddrArg for Address {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        f((&raw const self.0).cast(), size_of::<libc::sockaddr_vm>() as SocketAddrLen)
    }
}

/// A socket that listens on `port`, whichever context id the machine has: a copy may wake up with
/// another.
pub(super) fn listen(port: u32, backlog: i32) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: `sockaddr_vm` is plain data, for which zeros are a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_port = port;
    address.svm_cid = libc::VMADDR_CID_ANY;
    rustix::net::bind(&socket, &Address(address))?;
    rustix::net::listen(&socket, backlog)?;
    Ok(socket)
}
