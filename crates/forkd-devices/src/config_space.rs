//! A device's configuration space: read by vCPU threads without waiting for the device.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::signals::Signals;

/// The bytes that a driver sees at offset 0x100 of the register window.
///
/// The device and its transport share one. The driver may write only `writable`; the device sees
/// such a write the next time it looks.
pub struct ConfigSpace {
    bytes: Mutex<Vec<u8>>,
    generation: AtomicU32,
    writable: Range<usize>,
    signals: OnceLock<Arc<Signals>>,
}

impl ConfigSpace {
    /// A configuration space that the driver cannot write.
    pub fn read_only(bytes: Vec<u8>) -> Arc<Self> {
        Self::with_writable(bytes, 0..0)
    }

    /// A configuration space of which the driver may write the bytes `writable`.
    pub fn with_writable(bytes: Vec<u8>, writable: Range<usize>) -> Arc<Self> {
        Arc::new(Self { bytes: Mutex::new(bytes), generation: AtomicU32::new(0), writable, signals: OnceLock::new() })
    }

    /// Changes bytes from the device's side and, once a driver runs, raises a configuration
    /// interrupt. Bytes past the end are dropped.
    pub fn update(&self, offset: usize, bytes: &[u8]) {
        {
            let mut own = self.lock();
            for (to, from) in own.iter_mut().skip(offset).zip(bytes) {
                *to = *from;
            }
            self.generation.fetch_add(1, Ordering::AcqRel);
        }
        if let Some(signals) = self.signals.get() {
            signals.config_changed();
        }
    }

    /// The little-endian 32-bit field at `offset`; zero past the end.
    pub fn u32_at(&self, offset: usize) -> u32 {
        let mut field = [0; 4];
        self.read(offset, &mut field);
        u32::from_le_bytes(field)
    }

    /// Reads from `offset`; bytes past the end read as zero.
    pub(crate) fn read(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        for (to, from) in data.iter_mut().zip(self.lock().iter().skip(offset)) {
            *to = *from;
        }
    }

    /// A write by the driver; refused bytes are ignored, as the specification asks.
    pub(crate) fn driver_write(&self, offset: usize, data: &[u8]) {
        let mut bytes = self.lock();
        for (index, byte) in data.iter().enumerate() {
            if let Some(position) = offset.checked_add(index).filter(|position| self.writable.contains(position))
                && let Some(to) = bytes.get_mut(position)
            {
                *to = *byte;
            }
        }
    }

    pub(crate) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn set_generation(&self, generation: u32) {
        self.generation.store(generation, Ordering::Release);
    }

    /// Connects the interrupt of the transport that shows this space. Only the first call counts.
    pub(crate) fn attach(&self, signals: Arc<Signals>) {
        let _ = self.signals.set(signals);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_writes_only_where_it_may() {
        let config = ConfigSpace::with_writable(vec![0; 8], 4..8);
        config.driver_write(2, &[0xff; 10]);
        config.driver_write(usize::MAX, &[0xff; 4]);
        let mut bytes = [0xaa; 10];
        config.read(0, &mut bytes);
        assert_eq!(bytes, [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0]);
        assert_eq!(config.u32_at(4), u32::MAX);
        assert_eq!(config.u32_at(usize::MAX), 0);
    }

    #[test]
    fn an_update_changes_the_generation() {
        let config = ConfigSpace::read_only(vec![0; 4]);
        config.update(0, &7_u32.to_le_bytes());
        assert_eq!(config.u32_at(0), 7);
        assert_eq!(config.generation(), 1);
    }
}
