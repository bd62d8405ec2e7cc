//! Bad input gets a clear error that ends with what to do.

use anyhow::{Result, ensure};
use forkd_testkit::{Said, on_real_guests};

#[test]
fn numbers_of_children_outside_the_limits_are_refused() -> Result<()> {
    on_real_guests(|host| {
        let tag = &host.numpy()?.tag;
        for n in ["0", "1001", "-1", "many"] {
            host.forkd(&["spawn", "--tag", tag, "-n", n])?.failure(2)?.says(&[n])?;
        }
        Ok(())
    })
}

#[test]
fn an_unknown_tag_is_named_with_the_command_that_lists_tags() -> Result<()> {
    on_real_guests(|host| {
        host.numpy()?;
        host.forkd(&["spawn", "--tag", "nowhere"])?.failure(1)?.says(&["nowhere", "forkd images"])
    })
}

#[test]
fn a_tag_that_could_leave_its_directory_is_refused() -> Result<()> {
    on_real_guests(|host| {
        for tag in ["../up", "a/b", ".hidden", ""] {
            ensure!(host.forkd(&["spawn", "--tag", tag])?.code == 2, "{tag:?}");
        }
        Ok(())
    })
}

#[test]
fn a_bake_whose_warm_up_fails_leaves_nothing_behind() -> Result<()> {
    on_real_guests(|host| {
        host.numpy()?;
        let output = host.forkd(&[
            "from-image",
            "debian:bookworm?include=python3-numpy",
            "--tag",
            "testkit-broken",
            "--warm",
            "import no_such_module",
        ])?;
        output.failure(1)?.says(&["no_such_module"])?;
        ensure!(!host.snapshots()?.iter().any(|info| info.tag.as_str() == "testkit-broken"));
        ensure!(!host.sandboxes()?.iter().any(|info| info.snapshot_tag.as_str() == "testkit-broken"));
        Ok(())
    })
}
