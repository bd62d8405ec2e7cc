//! Machines of unusual sizes and kernels.

use anyhow::{Context, Result, ensure};
use forkd_testkit::{Body, Daemon, NUMPY_DISK, Said, on_real_guests};
use forkd_types::Digest;

#[test]
fn eight_vcpus_are_all_there_in_a_copy() -> Result<()> {
    on_real_guests(|host| {
        host.once(NUMPY_DISK, "testkit-8-vcpus", &["--cpus", "8"], |copy| {
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
        host.once(NUMPY_DISK, "testkit-4-gib", &["--memory", "4G"], |copy| {
            let kib: u64 = copy.sh("awk '/MemTotal/ {print $2}' /proc/meminfo")?.parse()?;
            ensure!(kib > 3_900_000, "the guest sees {kib} KiB");
            ensure!(copy.sh("grep -c '^100000000-.*System RAM' /proc/iomem")? == "1");
            Ok(())
        })
    })
}

#[test]
fn the_largest_guest_boots_and_is_forked() -> Result<()> {
    on_real_guests(|host| {
        // Far more than a test's host may have: memory is taken as it is written.
        host.once(NUMPY_DISK, "testkit-16-gib", &["--memory", "16G"], |copy| {
            let kib: u64 = copy.sh("awk '/MemTotal/ {print $2}' /proc/meminfo")?.parse()?;
            ensure!(kib > 16_000_000, "the guest sees {kib} KiB");
            ensure!(copy.sh("grep -c '^100000000-43fffffff : System RAM' /proc/iomem")? == "1");
            Ok(())
        })
    })
}

#[test]
fn an_older_kernel_with_its_drivers_as_modules_boots() -> Result<()> {
    on_real_guests(|host| {
        host.once(NUMPY_DISK, "testkit-6-1", &["--kernel", "debian-6.1-generic"], |copy| {
            let release = copy.exec(&["uname", "-r"])?;
            ensure!(release.starts_with("6.1."), "{release}");
            copy.exec(&["cat", "/proc/modules"])?.says(&["ext4 ", "virtio_blk ", "vmw_vsock_virtio_transport "])
        })
    })
}

#[test]
fn the_kernel_image_of_an_installed_system_boots_with_its_modules() -> Result<()> {
    on_real_guests(|host| {
        let kernel = host.installed_kernel()?;
        let image = kernel.image.to_str().context("the path is text")?;
        // As small as a guest may be.
        host.once(NUMPY_DISK, "testkit-vmlinuz", &["--kernel", image, "--memory", "128M"], |copy| {
            ensure!(copy.exec(&["uname", "-r"])? == kernel.release);
            copy.exec(&["cat", "/proc/modules"])?.says(&["vmw_vsock_virtio_transport "])
        })
    })
}

#[test]
fn the_monitor_itself_boots_a_compressed_kernel() -> Result<()> {
    on_real_guests(|host| {
        let kernel = host.installed_kernel()?;
        let digest = Digest::from_bytes(*blake3::hash(&std::fs::read(&kernel.image)?).as_bytes());
        // Through the API, for the program would unpack it first.
        let daemon = Daemon::start(host, "1g")?;
        let image = daemon.receive(&kernel.image)?;
        let stored = daemon.call("PUT", &format!("/v1/blobs/{digest}"), Body::File(&image))?;
        ensure!(stored.status == 201, "{stored:?}");
        let mut request = daemon.bake_request(host.numpy()?, "compressed")?;
        request["kernel"] = digest.to_string().into();
        request["run"] = serde_json::json!([["/bin/sh", "-c", "cat /proc/version > /dev/console"]]);
        let baked = daemon.bake(&request)?;
        baked.lines().last().unwrap_or_default().says(&[r#""event":"done""#])?;
        baked.says(&[&format!("Linux version {}", kernel.release)])?;
        let spawned = daemon.call("POST", "/v1/sandboxes", Body::Text(r#"{"snapshot_tag":"compressed"}"#))?;
        ensure!(spawned.status == 201, "{spawned:?}");
        Ok(())
    })
}
