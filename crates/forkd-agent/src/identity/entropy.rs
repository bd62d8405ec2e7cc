//! Fresh randomness for the kernel's generator (random(4)).

// The two requests have no safe form.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;

use super::seed::SEED_LEN;

/// `_IOW('R', 0x03, int[2])`
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
/// `_IO('R', 0x07)`
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

/// `struct rand_pool_info` with its bytes.
#[repr(C)]
struct RandPoolInfo {
    entropy_bits: libc::c_int,
    buffer_bytes: libc::c_int,
    buffer: [u8; SEED_LEN],
}

/// Credits `seed` to the kernel's pool and makes the generator use it at once.
pub(super) fn credit(seed: &[u8; SEED_LEN]) -> io::Result<()> {
    let random = OpenOptions::new().write(true).open("/dev/urandom")?;
    let info = RandPoolInfo {
        entropy_bits: 8 * SEED_LEN as libc::c_int,
        buffer_bytes: SEED_LEN as libc::c_int,
        buffer: *seed,
    };
    // SAFETY: the kernel reads `buffer_bytes` bytes behind the two counts, all within `info`.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) })?;
    // SAFETY: takes no argument.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
