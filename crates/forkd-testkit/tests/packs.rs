//! Snapshots leave as packs and come back as what they were.

use anyhow::{Context, Result, ensure};
use forkd_testkit::{Host, on_real_guests};
use forkd_types::rest::UnpackReport;

/// Removes what an earlier attempt of the test left, children before their parents.
fn without(host: &Host, tags: &[&str]) -> Result<()> {
    let there = host.snapshots()?;
    for tag in tags.iter().filter(|tag| there.iter().any(|info| info.tag.as_str() == **tag)) {
        host.forkd(&["rmi", tag])?.success()?;
    }
    Ok(())
}

#[test]
fn a_chain_that_went_through_a_pack_runs_on_from_where_it_was() -> Result<()> {
    on_real_guests(|host| {
        const TAGS: [&str; 2] = ["testkit-pack-child", "testkit-pack-base"];
        without(host, &TAGS)?;
        let scratch = tempfile::tempdir()?;
        let file = |name: &str| Ok::<_, anyhow::Error>(scratch.path().join(name).to_str().context("text")?.to_owned());
        let (pack, again) = (file("pack")?, file("again")?);

        let source = host.spawn_one(host.numpy()?)?;
        source.eval("memory = numpy.arange(1_000_000)")?;
        source.sh("echo base > /root/note")?;
        let id = source.id().as_str();
        host.forkd(&["snapshot", "--from-sandbox", id, "--tag", "testkit-pack-base", "--sync"])?.success()?;
        let command = "sh -c 'echo child >> /root/note'";
        host.forkd(&[
            "snapshot-diff",
            "--from",
            "testkit-pack-base",
            "--tag",
            "testkit-pack-child",
            "--exec",
            command,
        ])?
        .success()?;

        host.forkd(&["pack", "--tag", "testkit-pack-child", "--out", &pack])?.success()?;
        without(host, &TAGS)?;
        host.forkd(&["spawn", "--tag", "testkit-pack-child"])?.failure(1)?;

        let report: UnpackReport = host.forkd(&["unpack", &pack, "--json"])?.json()?;
        ensure!(report.snapshots.len() == 2, "{report:?}");
        host.forkd(&["verify", "testkit-pack-child"])?.success()?;
        let child = host.spawn_one(&host.snapshot("testkit-pack-child"))?;
        ensure!(child.sh("cat /root/note")? == "base\nchild");
        ensure!(child.eval("int(memory.sum())")? == "499999500000", "the memory is another");
        // It is a snapshot like any other: branched, and packed to the same bytes.
        ensure!(child.branch_once()?.eval("len(memory)")? == "1000000");
        host.forkd(&["pack", "--tag", "testkit-pack-child", "--out", &again])?.success()?;
        ensure!(std::fs::read(&pack)? == std::fs::read(&again)?, "the same snapshot made another pack");
        without(host, &TAGS)
    })
}
