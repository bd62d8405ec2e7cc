//! The meter: how long a guest stands still, as a program in it sees it.
//!
//! `forkd bench branch` runs the agent's program in the guest once more, as a process of its own. It holds memory
//! that it can keep writing to ([`memory`]), wakes every millisecond and notes the longest time between two wakings
//! ([`ticker`]), and sends back what it gets over TCP ([`echo`]). It is here, and not a script, because every guest
//! has this program whatever else its image has, and because a tick may then cost a few microseconds and waits for
//! no interpreter's lock.
//!
//! ```text
//! measuring ──an order──► answered with the stretch that it ends ──► measuring
//!     └──end of input──► holds its memory, does nothing
//! ```
//!
//! Input ends in a copy, where connections are reset: the copy is as large as its source and leaves the processor
//! to whoever is measured. In the source the agent kills the meter when its client goes.

mod echo;
mod memory;
mod ticker;

use std::io::{self, BufRead, Write};
use std::process::ExitCode;
use std::sync::mpsc;

use forkd_proto::meter::{Greeting, Order};

use crate::console;
use memory::HeldMemory;
use ticker::Ticker;

/// Is the meter that `arguments`, those after the verb, describe.
pub fn run(mut arguments: impl Iterator<Item = String>) -> ExitCode {
    let Some(mib) = arguments.next().and_then(|mib| mib.parse().ok()) else {
        console::error("usage: forkd-agent meter MIB   (the memory that it shall hold)");
        return ExitCode::from(2);
    };
    match measure(mib) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            console::error(&format!("cannot measure: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn measure(mib: u64) -> io::Result<()> {
    let room_mib = memory::room_mib()?;
    if mib > room_mib {
        return say(&Greeting::NoRoom { room_mib });
    }
    let memory = HeldMemory::written(mib)?;
    let echo_port = echo::serve()?;
    let (sender, orders) = mpsc::channel();
    std::thread::Builder::new().name("orders".into()).spawn(move || {
        for line in io::stdin().lock().lines() {
            let Some(order) = line.ok().and_then(|line| serde_json::from_str::<Order>(&line).ok()) else { return };
            if sender.send(order).is_err() {
                return;
            }
        }
    })?;
    say(&Greeting::Ready { echo_port })?;
    Ticker::new(&memory).run(&orders)?;
    memory.dirty(0);
    loop {
        std::thread::park();
    }
}

/// Writes one line to the client.
fn say(message: &impl serde::Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    // One write, so that a line is never seen in halves.
    let mut stdout = io::stdout().lock();
    stdout.write_all(&line)?;
    stdout.flush()
}
