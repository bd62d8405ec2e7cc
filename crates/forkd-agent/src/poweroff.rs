//! Ending everything.

use std::time::{Duration, Instant};

use forkd_proto::agent::Response;
use forkd_proto::frame::FrameError;
use rustix::mount::MountFlags;
use rustix::process::{Pid, Signal};
use rustix::system::RebootCommand;

use crate::agent::{Agent, Role};
use crate::connection::Connection;
use crate::console;

/// How long processes may take to end by themselves.
const GRACE: Duration = Duration::from_secs(2);

/// Answers, then ends: as PID 1 everything, else this program.
pub fn serve(agent: &Agent, connection: Connection) -> Result<(), FrameError> {
    connection.respond(&Response::Done)?;
    connection.finish_sending();
    match agent.role {
        Role::Init => {
            // The answer leaves before the network does.
            std::thread::sleep(Duration::from_millis(20));
            shut_down();
        }
        Role::Program => {
            connection.close_gently();
            std::process::exit(0);
        }
    }
    Ok(())
}

/// Stops every process, puts file systems to rest and powers the machine off.
pub fn shut_down() {
    console::info("shutting down");
    // Process group 1 stands for every process but PID 1 (kill(2) with -1).
    let _ = rustix::process::kill_process_group(Pid::INIT, Signal::TERM);
    let deadline = Instant::now() + GRACE;
    while others_run() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = rustix::process::kill_process_group(Pid::INIT, Signal::KILL);
    let deadline = Instant::now() + Duration::from_secs(1);
    while others_run() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    power_off();
}

/// Whether any process but this one and the kernel's own is left.
fn others_run() -> bool {
    let Ok(entries) = std::fs::read_dir("/proc") else { return false };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != 1)
        // Kernel threads and zombies have no command line.
        .any(|pid| std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty()))
}

/// Puts file systems to rest and powers the machine off.
pub fn power_off() {
    rustix::fs::sync();
    if let Err(error) = rustix::mount::mount_remount("/", MountFlags::RDONLY, "") {
        console::warn(&format!("cannot make the root file system read-only before power-off: {error}"));
        rustix::fs::sync();
    }
    if let Err(error) = rustix::system::reboot(RebootCommand::PowerOff) {
        console::announce(&format!("forkd-agent: cannot power off: {error}"));
    }
}
