//! Sandboxes come and go, and one's end is nobody else's.

use anyhow::{Result, ensure};
use forkd_testkit::{Said, on_real_guests};

#[test]
fn a_killed_sandbox_is_gone_and_its_siblings_are_not() -> Result<()> {
    on_real_guests(|host| {
        let siblings = host.spawn(host.numpy()?, 3)?;
        siblings[1].kill()?.success()?.says(&[siblings[1].id().as_str()])?;
        let left: Vec<_> = host.sandboxes()?.into_iter().map(|info| info.id).collect();
        ensure!(!left.contains(siblings[1].id()));
        for index in [0, 2] {
            ensure!(left.contains(siblings[index].id()));
            ensure!(siblings[index].eval("1 + 1")? == "2");
        }
        siblings[1].exec_with(&[], &["true"])?.failure(1)?.says(&[siblings[1].id().as_str(), "forkd ls"])
    })
}

#[test]
fn a_monitor_that_is_shot_disturbs_nobody() -> Result<()> {
    on_real_guests(|host| {
        let siblings = host.spawn(host.numpy()?, 3)?;
        host.on_daemon_host(&["sh", "-c", &format!("kill -9 {}", siblings[1].monitor_pid()?)])?.success()?;
        siblings[1].wait_for_end()?;
        ensure!(siblings[0].eval("1 + 1")? == "2");
        ensure!(siblings[2].eval("1 + 1")? == "2");
        let later = host.spawn_one(host.numpy()?)?;
        ensure!(later.eval("1 + 1")? == "2");
        Ok(())
    })
}

#[test]
fn a_guest_panic_ends_its_sandbox_and_is_called_a_panic() -> Result<()> {
    on_real_guests(|host| {
        let siblings = host.spawn(host.numpy()?, 2)?;
        // The connection is lost with the guest, so the command itself fails.
        siblings[0].exec_with(&["--timeout-secs", "20"], &["sh", "-c", "echo c > /proc/sysrq-trigger"])?;
        siblings[0].wait_for_end()?.says(&["panic"])?;
        siblings[0].exec_with(&[], &["true"])?.failure(1)?.says(&["panic"])?;
        host.forkd(&["logs", siblings[0].id().as_str()])?.success()?.says(&["Kernel panic"])?;
        ensure!(siblings[1].eval("1 + 1")? == "2");
        Ok(())
    })
}

#[test]
fn a_guest_that_powers_off_has_ended_and_is_said_to() -> Result<()> {
    on_real_guests(|host| {
        let sandbox = host.spawn_one(host.numpy()?)?;
        sandbox.exec_with(&["--timeout-secs", "20"], &["sh", "-c", "echo o > /proc/sysrq-trigger; sleep 5"])?;
        sandbox.wait_for_end()?.says(&["powered"])
    })
}

#[test]
fn a_snapshot_is_listed_verified_and_protected_by_its_digests() -> Result<()> {
    on_real_guests(|host| {
        let numpy = host.numpy()?;
        let listed = host.snapshots()?;
        let info = listed.iter().find(|info| info.tag.as_str() == numpy.tag).expect("it is listed");
        ensure!(info.bootable, "{info:?}");
        let (stored, memory) = (info.stored_bytes.unwrap_or(u64::MAX), info.memory_bytes.unwrap_or(0));
        ensure!(stored < memory, "{stored} bytes are stored for {memory} bytes of memory: zero pages were kept");
        host.forkd(&["verify", &numpy.tag])?.success().map(drop)
    })
}
