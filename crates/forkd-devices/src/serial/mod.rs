//! A 16550 serial port whose output goes to a console file.

mod console;
mod device;
mod state;

pub use console::{CONSOLE_LIMIT, Console};
pub use device::SerialPort;
pub use state::SerialState;
