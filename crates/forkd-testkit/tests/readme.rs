//! The README's commands do what it says.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use forkd_testkit::{Said, on_real_guests, readme_commands};

/// Begins a block of commands that this test runs.
const MARKER: &str = "<!-- commands: run by crates/forkd-testkit/tests/readme.rs -->";

#[test]
fn the_quick_start_and_the_commands_that_follow_it_work() -> Result<()> {
    on_real_guests(|host| {
        // What a machine that died left behind is still listed.
        host.forkd(&["kill", "--all"])?;
        // Made anew, by the programs under test.
        host.forkd(&["rmi", "quickstart", "mine"])?;
        let shown = host.forkd(&["quickstart", "--yes", "-n", "3"])?.success()?;
        shown.says(&["[0.0, 0.0, 0.0, 0.0, 0.0]", "3 of 3 children answered"])?;
        ensure!(host.sandboxes()?.is_empty(), "the quick start leaves no sandbox behind");

        let script = format!("set -eu\n{}", readme_commands(MARKER, host.programs())?);
        let output = Command::new("bash")
            .args(["-c", &script])
            .envs(host.environment())
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."))
            .output()
            .context("bash runs")?;
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "{text}");
        text.says(&["Linux sb-", "15", "2 of 2 answered", "is at before again", "◆ mine"])?;
        ensure!(host.sandboxes()?.is_empty());
        Ok(())
    })
}
