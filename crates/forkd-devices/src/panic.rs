//! pvpanic: an I/O port to which a guest kernel writes when it panics.
//!
//! The guest finds the port through the ACPI device `QEMU0001`. Reading tells which events are
//! understood; Linux writes only those.

/// The usual port.
pub const PANIC_PORT: u16 = 0x505;

const PANICKED: u8 = 1 << 0;
const CRASH_LOADED: u8 = 1 << 1;

/// What a guest kernel reported about its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestPanic {
    /// It panicked and stands still.
    Panicked,
    /// It panicked and starts a crash kernel, which is going to run on.
    CrashLoaded,
}

/// The port.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PanicPort;

impl PanicPort {
    /// A read of the port: the events that are understood.
    pub fn read(&self) -> u8 {
        PANICKED | CRASH_LOADED
    }

    /// A write to the port. Bits that are not understood are ignored; a plain panic counts more than
    /// a crash kernel.
    pub fn write(&self, value: u8) -> Option<GuestPanic> {
        if value & PANICKED != 0 {
            Some(GuestPanic::Panicked)
        } else if value & CRASH_LOADED != 0 {
            Some(GuestPanic::CrashLoaded)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_announced_events_are_reported() {
        let port = PanicPort;
        assert_eq!(port.read(), 3);
        assert_eq!(port.write(1), Some(GuestPanic::Panicked));
        assert_eq!(port.write(2), Some(GuestPanic::CrashLoaded));
        assert_eq!(port.write(3), Some(GuestPanic::Panicked));
        for value in [0, 4, 0x80] {
            assert_eq!(port.write(value), None);
        }
    }
}
