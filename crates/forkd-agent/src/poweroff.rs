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
    // The last mounted first: one may lie on another.
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    for place in on_disks(&mounts).rev() {
        if let Err(error) = rustix::mount::mount_remount(&place, MountFlags::RDONLY, "") {
            console::warn(&format!("cannot make {place} read-only before power-off: {error}"));
            rustix::fs::sync();
        }
    }
    if let Err(error) = rustix::system::reboot(RebootCommand::PowerOff) {
        console::announce(&format!("forkd-agent: cannot power off: {error}"));
    }
}

/// Where the file systems of disks are mounted, in the order of mounting.
fn on_disks(mounts: &str) -> impl DoubleEndedIterator<Item = String> {
    mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let device = fields.next()?;
        let place = fields.next()?;
        // The kernel writes blanks and backslashes in octal.
        let plain = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
        device
            .starts_with("/dev/")
            .then(|| plain.iter().fold(place.to_owned(), |place, (octal, text)| place.replace(octal, text)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_told_from_the_kernels_own_file_systems() {
        let mounts = "proc /proc proc rw 0 0\n/dev/vda / ext4 rw,noatime 0 0\n/dev/vdb /my\\040data ext4 rw 0 0\n";
        assert_eq!(on_disks(mounts).collect::<Vec<_>>(), ["/", "/my data"]);
    }
}
