//! How much of its log the kernel says on the console.
//!
//! Booting, all of it is of interest. Later it is not worth its price: the console is a serial port, each
//! character of which is an exit from the guest, and every copy would begin with a line about its
//! random generator before it runs anything. Warnings and errors are still said, and `dmesg` has everything.

use std::fs;

use crate::console;

/// The first of its numbers is the level below which messages reach the console.
const LEVELS: &str = "/proc/sys/kernel/printk";
/// Errors (3) and warnings (4), not notices (5).
const WARNINGS: &str = "5";

/// Keeps notices off the console from now on, unless the command line says what should be on it.
pub(super) fn keep_notices_off_the_console(command_line: &str) {
    if is_chosen(command_line) {
        return;
    }
    if let Err(error) = fs::write(LEVELS, WARNINGS) {
        console::warn(&format!("cannot write {LEVELS}, so that notices stay on the console: {error}"));
    }
}

/// Whether the command line asks for a level of its own.
fn is_chosen(command_line: &str) -> bool {
    command_line.split_whitespace().any(|word| {
        let (name, _) = word.split_once('=').unwrap_or((word, ""));
        ["loglevel", "debug", "quiet", "ignore_loglevel"].contains(&name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_on_the_command_line_is_left_alone() {
        for chosen in ["console=ttyS0 loglevel=7", "debug", "panic=-1 ignore_loglevel pci=off", "quiet"] {
            assert!(is_chosen(chosen), "{chosen}");
        }
        for silent in ["", "console=ttyS0 panic=-1", "my.debug=1 printk.loglevel=3"] {
            assert!(!is_chosen(silent), "{silent}");
        }
    }
}
