//! The serial port as vCPU threads use it.

use std::convert::Infallible;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};

use super::console::Console;
use super::state::SerialState;
use crate::mmio::RestoreError;
use crate::signals::InterruptLine;

/// A 16550 at eight consecutive I/O ports.
pub struct SerialPort {
    port: Mutex<Serial<Line, NoEvents, Console>>,
}

struct Line(Arc<dyn InterruptLine>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.trigger();
        Ok(())
    }
}

impl SerialPort {
    /// A port that no driver has found yet; output goes to `console`, which is open for appending.
    pub fn new(console: File, line: Arc<dyn InterruptLine>) -> Self {
        Self { port: Mutex::new(Serial::new(Line(line), Console::new(console))) }
    }

    /// A port whose driver goes on where it was, with a console of its own.
    ///
    /// # Errors
    /// The state holds more input than the port has room for.
    pub fn restore(state: &SerialState, console: File, line: Arc<dyn InterruptLine>) -> Result<Self, RestoreError> {
        let port = Serial::from_state(&state.into(), Line(line), NoEvents, Console::new(console))
            .map_err(|_| RestoreError::SerialInput { len: state.input.len() })?;
        Ok(Self { port: Mutex::new(port) })
    }

    /// A guest read of port `offset` (0 to 7).
    pub fn read(&self, offset: u8) -> u8 {
        self.lock().read(offset)
    }

    /// A guest write to port `offset` (0 to 7).
    pub fn write(&self, offset: u8, value: u8) {
        // The console takes every byte and the line cannot fail; what remains is loop-back into a
        // full FIFO, which on hardware loses the byte as well.
        let _ = self.lock().write(offset, value);
    }

    /// Writes an unfinished line of output now. Dropping the port does so too.
    pub fn flush(&self) {
        self.lock().writer_mut().finish_line();
    }

    /// Bytes of output that were not kept.
    pub fn dropped_bytes(&self) -> u64 {
        self.lock().writer().dropped()
    }

    /// The registers, to restore a copy from.
    pub fn save(&self) -> SerialState {
        self.lock().state().into()
    }

    fn lock(&self) -> MutexGuard<'_, Serial<Line, NoEvents, Console>> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::test_driver::CountingLine;

    const INTERRUPT_ENABLE: u8 = 1;
    const LINE_STATUS: u8 = 5;
    const SCRATCH: u8 = 7;

    fn console(directory: &tempfile::TempDir, name: &str) -> File {
        File::options().create(true).append(true).open(directory.path().join(name)).unwrap()
    }

    #[test]
    fn a_copy_writes_to_its_own_console_with_the_same_registers() {
        let directory = tempfile::tempdir().unwrap();
        let line = Arc::new(CountingLine::default());
        let port = SerialPort::new(console(&directory, "source"), Arc::clone(&line) as Arc<dyn InterruptLine>);
        port.write(SCRATCH, 0x5a);
        port.write(INTERRUPT_ENABLE, 2);
        b"hello\nwor".iter().for_each(|&byte| port.write(0, byte));
        assert!(line.count() > 0, "the transmitter is empty again");
        assert_eq!(port.read(LINE_STATUS) & 0x20, 0x20);

        let state: SerialState = postcard::from_bytes(&postcard::to_stdvec(&port.save()).unwrap()).unwrap();
        let copy = SerialPort::restore(&state, console(&directory, "copy"), line).unwrap();
        assert_eq!(copy.read(SCRATCH), 0x5a);
        b"copy\n".iter().for_each(|&byte| copy.write(0, byte));
        port.flush();
        let read = |name| std::fs::read_to_string(directory.path().join(name)).unwrap();
        assert_eq!((read("source").as_str(), read("copy").as_str()), ("hello\nwor", "copy\n"));
        assert_eq!(port.dropped_bytes(), 0);
    }

    #[test]
    fn a_state_with_too_much_input_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let line: Arc<dyn InterruptLine> = Arc::new(CountingLine::default());
        let mut state = SerialPort::new(console(&directory, "a"), Arc::clone(&line)).save();
        state.input = vec![0; 65];
        let refused = SerialPort::restore(&state, console(&directory, "b"), line);
        assert!(matches!(refused, Err(RestoreError::SerialInput { len: 65 })));
    }
}
