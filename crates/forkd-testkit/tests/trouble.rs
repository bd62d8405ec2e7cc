//! A host in trouble: its disk is full, a program is gone.

use anyhow::{Result, ensure};
use forkd_testkit::{Body, Daemon, Said, on_real_guests};

#[test]
fn a_full_disk_fails_a_bake_by_name_and_leaves_nothing_half_made() -> Result<()> {
    on_real_guests(|host| {
        let daemon = Daemon::start(host, "32m")?;
        let baked = daemon.bake(&daemon.bake_request(host.numpy()?, "too-big")?)?;
        let last = baked.lines().last().unwrap_or_default();
        last.says(&[r#""event":"failed""#, "No space left on device", "memory.layer", daemon.directory()])?;
        ensure!(!last.contains("its console ends"), "the guest has no part in it: {last}");
        ensure!(daemon.call("GET", "/v1/snapshots", Body::Text(""))?.body == "[]");
        daemon.is_well_and_tidy()
    })
}

#[test]
fn a_full_disk_refuses_an_upload_and_keeps_nothing_of_it() -> Result<()> {
    on_real_guests(|host| {
        let daemon = Daemon::start(host, "16m")?;
        let random = format!("{}.random", daemon.directory());
        // Nothing that could be stored as a hole.
        let script = r#"head -c 32000000 /dev/urandom > "$0""#;
        host.on_daemon_host(&["sh", "-c", script, &random])?.success()?;
        let target = format!("/v1/blobs/blake3:{}", "0".repeat(64));
        let refused = daemon.call("PUT", &target, Body::File(&random));
        host.on_daemon_host(&["rm", &random])?.success()?;
        let refused = refused?;
        ensure!(refused.status == 507, "{refused:?}");
        refused.body.says(&["no_space", "No space left on device", daemon.directory()])?;
        daemon.is_well_and_tidy()
    })
}

#[test]
fn a_monitor_program_that_is_gone_is_named_and_the_daemon_lives_on() -> Result<()> {
    on_real_guests(|host| {
        let numpy = host.numpy()?;
        let daemon = Daemon::start(host, "32m")?;
        daemon.borrow(numpy)?;
        let path = daemon.lose_monitor()?;
        let spawn = format!(r#"{{"snapshot_tag":"{}"}}"#, numpy.tag);
        let refused = daemon.call("POST", "/v1/sandboxes", Body::Text(&spawn))?;
        ensure!(refused.status == 500, "{refused:?}");
        refused.body.says(&["monitor_not_started", &path, "No such file", "--vmm"])?;
        let baked = daemon.bake(&daemon.bake_request(numpy, "never")?)?;
        baked.lines().last().unwrap_or_default().says(&[r#""event":"failed""#, &path, "No such file"])?;
        daemon.is_well_and_tidy()
    })
}
