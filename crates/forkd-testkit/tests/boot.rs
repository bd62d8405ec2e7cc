//! Machines of unusual sizes and kernels.

use anyhow::{Result, ensure};
use forkd_testkit::{Host, Sandbox, Snapshot, on_real_guests};

/// Bakes with `options`, spawns one copy, asks it, and removes the snapshot.
fn baked(host: &Host, tag: &str, options: &[&str], ask: impl Fn(&Sandbox<'_>) -> Result<()>) -> Result<()> {
    host.numpy()?;
    let options: Vec<&str> = [&["--replace"], options].concat();
    let snapshot: Snapshot = host.bake(tag, &options)?;
    let outcome = host.spawn_one(&snapshot).and_then(|sandbox| ask(&sandbox));
    host.forkd(&["rmi", tag])?.success()?;
    outcome
}

#[test]
fn eight_vcpus_are_all_there_in_a_copy() -> Result<()> {
    on_real_guests(|host| {
        baked(host, "testkit-8-vcpus", &["--cpus", "8"], |copy| {
            ensure!(copy.exec(&["nproc"])? == "8");
            // Every one of them runs something.
            let script = "for i in 0 1 2 3 4 5 6 7; do taskset -c $i true || exit 1; done; echo all";
            ensure!(copy.sh(script)? == "all");
            Ok(())
        })
    })
}

#[test]
fn four_gibibytes_reach_past_the_device_hole() -> Result<()> {
    on_real_guests(|host| {
        baked(host, "testkit-4-gib", &["--memory", "4G"], |copy| {
            let kib: u64 = copy.sh("awk '/MemTotal/ {print $2}' /proc/meminfo")?.parse()?;
            ensure!(kib > 3_900_000, "the guest sees {kib} KiB");
            ensure!(copy.sh("grep -c '^100000000-.*System RAM' /proc/iomem")? == "1");
            Ok(())
        })
    })
}
