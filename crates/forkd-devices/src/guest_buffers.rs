//! Scattered guest memory, and vectored I/O straight between it and a descriptor.
//!
//! vm-memory moves data between a slice and a file only at the file's own position. A position is
//! shared by every process that inherited the descriptor, and monitors are forked, so every file
//! access here names its offset (`preadv`, `pwritev`). rustix takes `IoSlice`, which is a Rust
//! reference, and no reference to memory that a guest writes at any moment is sound; hence the raw
//! calls.
#![allow(unsafe_code)]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryError, Permissions, VolatileSlice};

use crate::GuestMemory;

/// The most pieces one vectored call takes (`IOV_MAX` on Linux).
const MOST_PIECES: usize = 1024;

/// Pieces of guest memory in the order in which they hold a stream of bytes.
#[derive(Clone, Debug, Default)]
pub struct GuestBuffers<'m> {
    slices: Vec<VolatileSlice<'m>>,
    len: usize,
}

impl<'m> GuestBuffers<'m> {
    /// Appends `len` bytes of guest memory at `address`.
    ///
    /// # Errors
    /// The range is not wholly in guest memory; nothing was appended then.
    pub fn push(
        &mut self,
        memory: &'m GuestMemory,
        address: GuestAddress,
        len: usize,
        access: Permissions,
    ) -> Result<(), GuestMemoryError> {
        let before = self.slices.len();
        for slice in memory.get_slices(address, len, access)? {
            match slice {
                Ok(slice) => self.slices.push(slice),
                Err(error) => {
                    self.slices.truncate(before);
                    return Err(error);
                }
            }
        }
        self.len += len;
        Ok(())
    }

    /// Ordinary memory as a target or source.
    pub fn from_host(bytes: &'m mut [u8]) -> Self {
        let len = bytes.len();
        Self { slices: vec![VolatileSlice::from(bytes)], len }
    }

    /// Total bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes the first `count` bytes (or all, if there are fewer) off the front.
    pub fn split_front(&mut self, count: usize) -> Self {
        let mut front = Self::default();
        let mut wanted = count.min(self.len);
        let mut taken = 0;
        for slice in &mut self.slices {
            if wanted == 0 {
                break;
            }
            if slice.len() <= wanted {
                front.slices.push(*slice);
                wanted -= slice.len();
                front.len += slice.len();
                taken += 1;
            } else {
                let (head, tail) = slice.split_at(wanted).expect("the split point lies inside the slice");
                front.len += head.len();
                front.slices.push(head);
                *slice = tail;
                wanted = 0;
            }
        }
        self.slices.drain(..taken);
        self.len -= front.len;
        front
    }

    /// Copies bytes out, up to the shorter of both; returns how many.
    pub fn copy_to(&self, target: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            if done == target.len() {
                break;
            }
            done += slice.copy_to(&mut target[done..]);
        }
        done
    }

    /// Copies bytes in, up to the shorter of both; returns how many.
    pub fn copy_from(&self, source: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            if done == source.len() {
                break;
            }
            let count = slice.len().min(source.len() - done);
            slice.copy_from(&source[done..done + count]);
            done += count;
        }
        done
    }

    /// Appends all bytes to `target`.
    pub fn append_to(&self, target: &mut Vec<u8>) {
        let start = target.len();
        target.resize(start + self.len, 0);
        self.copy_to(&mut target[start..]);
    }

    /// Overwrites everything with zeros.
    pub fn fill_zero(&self) {
        const ZEROS: [u8; 4096] = [0; 4096];
        for slice in &self.slices {
            let mut offset = 0;
            while offset < slice.len() {
                let count = ZEROS.len().min(slice.len() - offset);
                slice.write_slice(&ZEROS[..count], offset).expect("the range lies inside the slice");
                offset += count;
            }
        }
    }

    /// Fills the buffers from a file at `offset`; returns fewer bytes only at the file's end.
    pub fn read_from_file(&self, file: impl AsFd, offset: u64) -> io::Result<usize> {
        let fd = file.as_fd();
        let mut pieces = Pieces::from_buffers(self);
        pieces.transfer_all(|vectors, done| {
            // SAFETY: `vectors` describes memory that is mapped and writable for 'm (the slices
            // borrow it), at most MOST_PIECES long.
            unsafe {
                libc::preadv64(
                    fd.as_raw_fd(),
                    vectors.as_ptr(),
                    vectors.len() as libc::c_int,
                    (offset + done) as libc::off64_t,
                )
            }
        })
    }

    /// Receives what a stream socket has, without waiting.
    pub fn receive(&self, socket: impl AsFd) -> io::Result<usize> {
        let mut pieces = Pieces::from_buffers(self);
        pieces.message(socket, |fd, message| {
            // SAFETY: the header and the memory it names outlive the call; the slices are writable.
            unsafe { libc::recvmsg(fd, message, libc::MSG_DONTWAIT) }
        })
    }

    /// Sends what a stream socket takes, without waiting and without SIGPIPE.
    pub fn send(&self, socket: impl AsFd) -> io::Result<usize> {
        let mut pieces = Pieces::from_buffers(self);
        pieces.message(socket, |fd, message| {
            // SAFETY: as in `receive`; the memory is only read.
            unsafe { libc::sendmsg(fd, message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) }
        })
    }

    /// Reads one packet from a character device such as a tap.
    pub fn read_packet(&self, device: impl AsFd) -> io::Result<usize> {
        let pieces = Pieces::from_buffers(self);
        let vectors = pieces.whole()?;
        checked(|| {
            // SAFETY: the slices are mapped and writable for 'm; the count is within IOV_MAX.
            unsafe { libc::readv(device.as_fd().as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int) }
        })
    }

    /// Writes one packet to a character device such as a tap.
    pub fn write_packet(&self, device: impl AsFd) -> io::Result<usize> {
        let pieces = Pieces::from_buffers(self);
        let vectors = pieces.whole()?;
        checked(|| {
            // SAFETY: as in `read_packet`; the memory is only read.
            unsafe { libc::writev(device.as_fd().as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int) }
        })
    }
}

/// Bytes to write: ordinary memory and guest memory in one vectored call.
#[derive(Default)]
pub(crate) struct WriteFrom<'a> {
    pieces: Pieces<'a>,
}

impl<'a> WriteFrom<'a> {
    pub(crate) fn push_bytes(&mut self, bytes: &'a [u8]) {
        self.pieces.push(bytes.as_ptr(), bytes.len());
    }

    pub(crate) fn push_buffers(&mut self, buffers: &GuestBuffers<'a>) {
        self.pieces.push_buffers(buffers);
    }

    pub(crate) fn append(&mut self, other: Self) {
        self.pieces.vectors.extend(other.pieces.vectors);
        self.pieces.len += other.pieces.len;
    }

    pub(crate) fn len(&self) -> usize {
        self.pieces.len
    }

    /// Writes everything to `file` at `offset`.
    ///
    /// # Errors
    /// The error of the first call that failed; earlier parts are written then.
    pub(crate) fn write_to_file(mut self, file: impl AsFd, offset: u64) -> io::Result<()> {
        let fd = file.as_fd();
        let len = self.pieces.len;
        let done = self.pieces.transfer_all(|vectors, done| {
            // SAFETY: the pieces borrow their memory for 'a and are only read; at most MOST_PIECES.
            unsafe {
                libc::pwritev64(
                    fd.as_raw_fd(),
                    vectors.as_ptr(),
                    vectors.len() as libc::c_int,
                    (offset + done) as libc::off64_t,
                )
            }
        })?;
        if done == len { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }
}

/// The raw form of scattered memory, valid for `'a`.
#[derive(Default)]
struct Pieces<'a> {
    vectors: Vec<libc::iovec>,
    len: usize,
    memory: PhantomData<&'a ()>,
}

impl<'a> Pieces<'a> {
    fn from_buffers(buffers: &GuestBuffers<'a>) -> Self {
        let mut pieces = Self::default();
        pieces.push_buffers(buffers);
        pieces
    }

    fn push(&mut self, start: *const u8, len: usize) {
        if len > 0 {
            self.vectors.push(libc::iovec { iov_base: start.cast_mut().cast(), iov_len: len });
            self.len += len;
        }
    }

    fn push_buffers(&mut self, buffers: &GuestBuffers<'a>) {
        self.vectors.reserve(buffers.slices.len());
        for slice in &buffers.slices {
            self.push(pointer(slice), slice.len());
        }
    }

    fn whole(&self) -> io::Result<&[libc::iovec]> {
        if self.vectors.len() > MOST_PIECES { Err(io::ErrorKind::InvalidInput.into()) } else { Ok(&self.vectors) }
    }

    /// Repeats `call` (on the rest, with the bytes done so far) until everything is done or it
    /// returns zero.
    fn transfer_all(&mut self, call: impl Fn(&[libc::iovec], u64) -> libc::ssize_t) -> io::Result<usize> {
        let mut first = 0;
        let mut done = 0;
        while first < self.vectors.len() {
            let end = self.vectors.len().min(first + MOST_PIECES);
            let count = checked(|| call(&self.vectors[first..end], done as u64))?;
            if count == 0 {
                break;
            }
            done += count;
            let mut passed = count;
            while let Some(vector) = self.vectors.get_mut(first) {
                if passed < vector.iov_len {
                    vector.iov_base = vector.iov_base.wrapping_byte_add(passed);
                    vector.iov_len -= passed;
                    break;
                }
                passed -= vector.iov_len;
                first += 1;
            }
        }
        Ok(done)
    }

    fn message(
        &mut self,
        socket: impl AsFd,
        call: impl Fn(libc::c_int, *mut libc::msghdr) -> libc::ssize_t,
    ) -> io::Result<usize> {
        // SAFETY: all-zero is a valid msghdr: no name, no control data, no pieces.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.vectors.as_mut_ptr();
        message.msg_iovlen = self.vectors.len().min(MOST_PIECES);
        checked(|| call(socket.as_fd().as_raw_fd(), &raw mut message))
    }
}

fn pointer<B: BitmapSlice>(slice: &VolatileSlice<'_, B>) -> *const u8 {
    slice.ptr_guard().as_ptr()
}

/// Calls until the result is not "interrupted".
fn checked(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1_0000)]).unwrap()
    }

    #[test]
    fn ranges_outside_guest_memory_are_refused_whole() {
        let memory = memory();
        let mut buffers = GuestBuffers::default();
        assert!(buffers.push(&memory, GuestAddress(0x800), 0x1000, Permissions::Read).is_ok());
        assert!(buffers.push(&memory, GuestAddress(0x1_0800), 0x1000, Permissions::Read).is_err());
        assert!(buffers.push(&memory, GuestAddress(u64::MAX), 2, Permissions::Read).is_err());
        assert_eq!((buffers.len(), buffers.slices.len()), (0x1000, 2));
    }

    #[test]
    fn more_pieces_than_one_call_takes_are_written_and_read_back() {
        let memory = memory();
        let file = tempfile::tempfile().unwrap();
        let mut buffers = GuestBuffers::default();
        for index in 0..3000 {
            buffers.push(&memory, GuestAddress(index * 16), 3, Permissions::Write).unwrap();
        }
        let data: Vec<u8> = (0..9000_u32).map(|index| index as u8 ^ (index >> 8) as u8).collect();
        buffers.copy_from(&data);
        let mut write = WriteFrom::default();
        write.push_bytes(b"head");
        write.push_buffers(&buffers);
        write.write_to_file(&file, 100).unwrap();
        let mut back = vec![0; 9004];
        file.read_exact_at(&mut back, 100).unwrap();
        assert_eq!(&back[..4], b"head");
        assert_eq!(&back[4..], &data);

        buffers.fill_zero();
        assert_eq!(buffers.read_from_file(&file, 104).unwrap(), 9000);
        let mut bytes = Vec::new();
        buffers.append_to(&mut bytes);
        assert_eq!(bytes, data);
        assert_eq!(buffers.read_from_file(&file, 9100).unwrap(), 4, "a file's end cuts the read short");
    }

    proptest! {
        #[test]
        fn splitting_keeps_every_byte_in_order(lens in prop::collection::vec(0_usize..50, 0..20), cuts in prop::collection::vec(0_usize..80, 0..20)) {
            let memory = memory();
            let mut buffers = GuestBuffers::default();
            let mut address = 0;
            for len in lens {
                buffers.push(&memory, GuestAddress(address), len, Permissions::Write).unwrap();
                address += 64;
            }
            let data: Vec<u8> = (0..buffers.len()).map(|index| index as u8).collect();
            prop_assert_eq!(buffers.copy_from(&data), data.len());
            let mut back = Vec::new();
            for cut in cuts {
                let front = buffers.split_front(cut);
                prop_assert!(front.len() == cut || buffers.is_empty());
                front.append_to(&mut back);
            }
            buffers.append_to(&mut back);
            prop_assert_eq!(back, data);
        }
    }
}
