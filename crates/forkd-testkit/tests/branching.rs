//! Running sandboxes are copied, snapshotted and rewound, and go on as if nothing had happened.

use anyhow::{Result, ensure};
use forkd_testkit::{CountingLoop, Host, Said, on_real_guests};
use forkd_types::rest::{CheckpointInfo, SnapshotInfo, SnapshotStatus};
use serde_json::Value;

/// Removes what an earlier attempt of the test left.
fn without(host: &Host, tags: &[&str]) -> Result<()> {
    let there = host.snapshots()?;
    for tag in tags.iter().rev().filter(|tag| there.iter().any(|info| info.tag.as_str() == **tag)) {
        host.forkd(&["rmi", tag])?.success()?;
    }
    Ok(())
}

fn listed(host: &Host, tag: &str) -> Result<Option<SnapshotInfo>> {
    Ok(host.snapshots()?.into_iter().find(|info| info.tag.as_str() == tag))
}

#[test]
fn no_copy_disagrees_with_itself_or_with_a_peer_outside() -> Result<()> {
    on_real_guests(|host| {
        let source = host.spawn_one(host.numpy()?)?;
        let counting = CountingLoop::start(host, &source)?;
        for n in [1, 2] {
            let (copies, received) = counting.around(|| source.branch(n))?;
            for copy in &copies {
                counting.check(copy, received)?;
            }
            counting.goes_on()?;
        }
        Ok(())
    })
}

#[test]
fn no_snapshot_disagrees_with_itself_or_with_a_peer_outside() -> Result<()> {
    on_real_guests(|host| {
        const TAG: &str = "testkit-instant";
        without(host, &[TAG])?;
        let source = host.spawn_one(host.numpy()?)?;
        let counting = CountingLoop::start(host, &source)?;
        for options in [&[][..], &["--sync"], &["--layer", "--sync"]] {
            let snapshot = [&["snapshot", "--from-sandbox", source.id().as_str(), "--tag", TAG], options].concat();
            let (_, received) = counting.around(|| host.forkd(&snapshot)?.success())?;
            counting.check(&host.spawn_one(&host.snapshot(TAG))?, received)?;
            without(host, &[TAG])?;
        }
        counting.goes_on()
    })
}

#[test]
fn no_rewind_disagrees_with_itself_or_with_a_peer_outside() -> Result<()> {
    on_real_guests(|host| {
        let source = host.spawn_one(host.numpy()?)?;
        let id = source.id().as_str();
        let counting = CountingLoop::start(host, &source)?;
        let (_, received) = counting.around(|| host.forkd(&["checkpoint", id])?.success())?;
        // One connection throughout; only the rewind, which makes a copy of the source, ends it.
        counting.goes_on()?;
        host.forkd(&["rewind", id])?.success()?;
        counting.check(&source, received)?;
        host.wait_until("the peer hears of the rewind", || Ok(counting.broke().is_some()))
    })
}

#[test]
fn a_branch_is_measured_by_its_guest_and_from_outside() -> Result<()> {
    on_real_guests(|host| {
        let tag = &host.numpy()?.tag;
        let arguments = ["--snapshot", tag, "--private", "16M,1024G", "--runs", "1", "--after", "1", "--json"];
        let report: Value = host.forkd(&[&["bench", "branch"], &arguments[..]].concat())?.json()?;
        let rows = report["rows"].as_array().map(Vec::as_slice).unwrap_or_default();
        let subjects: Vec<_> = rows.iter().map(|row| (row["mode"].as_str(), row["kind"].as_str())).collect();
        let kinds = ["copy", "checkpoint", "snapshot"].map(Some);
        let expected = ["idle", "dirtying"].map(Some).into_iter().flat_map(|mode| kinds.map(|kind| (mode, kind)));
        ensure!(subjects.iter().copied().eq(expected), "{subjects:?}");
        for row in rows {
            let number = |name: &str| row[name].as_f64();
            ensure!(row["runs"] == 1 && row["private_mib"] == 16 && row["pages"] == "4k", "{row}");
            ensure!(number("dirty_mib").is_some_and(|mib| mib >= 16.0), "the guest holds what it was told to: {row}");
            // A ticker cannot be early, and while the monitor forks its guest does nothing.
            for gap in ["gap_ms", "usual_gap_ms", "later_gap_ms", "usual_later_gap_ms"] {
                ensure!(number(gap).is_some_and(|gap| gap >= 1.0), "{gap}: {row}");
            }
            for gap in ["tcp_gap_ms", "usual_tcp_gap_ms", "later_tcp_gap_ms", "usual_later_tcp_gap_ms"] {
                ensure!(number(gap).is_some_and(|gap| gap > 0.0), "{gap}: {row}");
            }
            let (pause, gap) = (number("pause_ms").unwrap_or(0.0), number("gap_ms").unwrap_or(0.0));
            match (row["kind"].as_str(), number("fork_ms")) {
                // The daemon does not say where the time of a checkpoint went.
                (Some("checkpoint"), None) => ensure!(pause > 0.0 && row["ratio"].is_null(), "{row}"),
                (_, Some(fork)) => {
                    ensure!(0.0 < fork && fork <= pause && fork * 0.95 <= gap, "{row}");
                    ensure!(number("ratio").is_some_and(|ratio| ratio >= 1.0), "{row}");
                }
                (_, None) => anyhow::bail!("no fork: {row}"),
            }
            ensure!(number("answer_ms").is_some() == (row["kind"] == "copy"), "{row}");
            ensure!(number("written_ms").is_some() == (row["kind"] == "snapshot"), "{row}");
            let written_to = number("usual_dirtied_mib_per_s").unwrap_or(0.0);
            ensure!((written_to > 0.0) == (row["mode"] == "dirtying"), "{row}");
            let in_a_row = if row["mode"] == "idle" && row["kind"] == "copy" { 10 } else { 0 };
            ensure!(row["in_a_row_ms"].as_array().is_some_and(|pauses| pauses.len() == in_a_row), "{row}");
        }
        let skipped = &report["skipped"];
        ensure!(skipped[0]["private_mib"] == 1 << 20, "{skipped}");
        skipped[0]["reason"].as_str().unwrap_or_default().says(&["has room for", "MiB"])?;
        ensure!(host.snapshots()?.iter().all(|info| !info.tag.as_str().starts_with("bench-")), "a snapshot was left");
        Ok(())
    })
}

#[test]
fn a_snapshot_of_a_running_sandbox_needs_nothing_but_itself() -> Result<()> {
    on_real_guests(|host| {
        without(host, &["testkit-base", "testkit-shot"])?;
        let first = host.spawn_one(host.numpy()?)?;
        first.eval("memory = 'of the sandbox'")?;
        first.sh("echo 'disk of the sandbox' > /root/note")?;
        let id = first.id().as_str();
        host.forkd(&["snapshot", "--from-sandbox", id, "--tag", "testkit-base", "--sync"])?.success()?;
        first.eval("memory = 'changed since'")?;

        let second = host.spawn_one(&host.snapshot("testkit-base"))?;
        second.sh("echo 'and of its copy' >> /root/note")?;
        let id = second.id().as_str();
        host.forkd(&["snapshot", "--from-sandbox", id, "--tag", "testkit-shot", "--sync"])?.success()?;
        host.forkd(&["rmi", "testkit-base"])?.success()?;
        host.forkd(&["verify", "testkit-shot"])?.success()?;

        let third = host.spawn_one(&host.snapshot("testkit-shot"))?;
        ensure!(third.eval("memory")? == "'of the sandbox'");
        ensure!(third.exec(&["cat", "/root/note"])? == "disk of the sandbox\nand of its copy");
        ensure!(first.eval("memory")? == "'changed since'");
        without(host, &["testkit-shot"])
    })
}

#[test]
fn a_snapshot_that_nobody_waits_for_is_writing_and_then_ready() -> Result<()> {
    on_real_guests(|host| {
        without(host, &["testkit-later"])?;
        let sandbox = host.spawn_one(host.numpy()?)?;
        let id = sandbox.id().as_str();
        host.forkd(&["snapshot", "--from-sandbox", id, "--tag", "testkit-later", "--live", "--no-wait"])?.success()?;
        let entries = host.snapshots()?.into_iter().filter(|info| info.tag.as_str() == "testkit-later").count();
        ensure!(entries == 1, "it is listed {entries} times");
        host.wait_until("it is ready", || {
            let info = listed(host, "testkit-later")?;
            ensure!(!matches!(&info, Some(info) if info.status == SnapshotStatus::Failed), "{info:?}");
            Ok(info.is_some_and(|info| info.bootable))
        })?;
        host.forkd(&["snapshot", "--from-sandbox", id, "--tag", "testkit-later"])?
            .failure(1)?
            .says(&["testkit-later"])?;
        ensure!(sandbox.eval("1 + 1")? == "2");
        without(host, &["testkit-later"])
    })
}

#[test]
fn a_writer_that_is_shot_leaves_nothing_and_its_source_running() -> Result<()> {
    on_real_guests(|host| {
        without(host, &["testkit-shot-writer"])?;
        let sandbox = host.spawn_one(host.numpy()?)?;
        // Much to write, so that there is a writer to be shot.
        sandbox.eval("much = b'x' * (128 << 20)")?;
        let id = sandbox.id().as_str();
        let branch = ["snapshot", "--from-sandbox", id, "--tag", "testkit-shot-writer", "--live", "--no-wait"];
        host.forkd(&branch)?.success()?;
        let shoot = "for p in /proc/[0-9]*; do [ \"$(cat $p/comm)\" = forkd-writer ] && kill -9 ${p#/proc/}; done 2>/dev/null; true";
        host.on_daemon_host(&["sh", "-c", shoot])?.success()?;
        host.wait_until("the snapshot is called failed, or ready if the shot came late", || {
            Ok(listed(host, "testkit-shot-writer")?.is_some_and(|info| info.status != SnapshotStatus::Writing))
        })?;
        ensure!(sandbox.eval("len(much)")? == format!("{}", 128 << 20));
        if listed(host, "testkit-shot-writer")?.is_some_and(|info| info.status == SnapshotStatus::Failed) {
            host.forkd(&["spawn", "--tag", "testkit-shot-writer"])?.failure(1)?.says(&["not ready"])?;
        }
        // The tag is free again either way.
        host.forkd(&["rmi", "testkit-shot-writer"])?.success()?;
        host.forkd(&branch[..5])?.success()?;
        host.forkd(&["verify", "testkit-shot-writer"])?.success()?;
        without(host, &["testkit-shot-writer"])
    })
}

#[test]
fn layers_hold_what_changed_and_are_guarded() -> Result<()> {
    on_real_guests(|host| {
        without(host, &["testkit-one", "testkit-two", "testkit-flat"])?;
        let base = &host.numpy()?.tag;
        let layer = |from: &str, tag: &str, command: &str| {
            host.forkd(&["snapshot-diff", "--from", from, "--tag", tag, "--exec", command])
        };
        layer(base, "testkit-one", "sh -c 'echo one > /root/one'")?
            .success()?
            .says(&["tag: testkit-one", "parent_tag"])?;
        layer("testkit-one", "testkit-two", "sh -c 'echo two > /root/two'")?.success()?;
        let stored =
            |tag: &str| Ok::<_, anyhow::Error>(listed(host, tag)?.and_then(|info| info.stored_bytes).unwrap_or(0));
        let (whole, thin) = (stored(base)?, stored("testkit-two")?);
        ensure!(thin * 4 < whole, "a layer takes {thin} bytes, its base {whole}");

        host.forkd(&["rmi", "testkit-one"])?.failure(1)?;
        // Refused at once, not after a boot.
        let replaced = host.forkd(&["from-image", forkd_testkit::NUMPY_DISK, "--tag", "testkit-one", "--replace"])?;
        replaced.failure(1)?.says(&["testkit-two"])?;
        host.forkd(&["verify", "testkit-two"])?.success()?;
        let top = host.spawn_one(&host.snapshot("testkit-two"))?;
        ensure!(top.sh("cat /root/one /root/two")? == "one\ntwo");

        host.forkd(&["snapshot-compact", "--from", "testkit-two", "--to", "testkit-flat"])?.success()?;
        host.forkd(&["rmi", "--cascade", "testkit-one"])?.success()?;
        ensure!(listed(host, "testkit-two")?.is_none(), "the layer went with what it builds on");
        let flat = host.spawn_one(&host.snapshot("testkit-flat"))?;
        ensure!(flat.sh("cat /root/one /root/two")? == "one\ntwo");
        ensure!(flat.eval("numpy.arange(3).tolist()")? == "[0, 1, 2]");

        layer("testkit-flat", "testkit-one", "sh -c 'echo again > /root/one'")?.success()?;
        host.forkd(&["rmi", "--force", "testkit-flat"])?.success()?;
        let orphan = listed(host, "testkit-one")?.ok_or_else(|| anyhow::anyhow!("the layer went too"))?;
        ensure!(!orphan.bootable && orphan.warning.is_some_and(|warning| warning.contains("testkit-flat")));
        host.forkd(&["spawn", "--tag", "testkit-one"])?.failure(1)?.says(&["testkit-flat"])?;
        host.forkd(&["rmi", "testkit-one"])?.success()?;

        layer(base, "testkit-never", "sh -c 'echo broken; exit 3'")?.failure(1)?.says(&["broken", "3"])?;
        ensure!(listed(host, "testkit-never")?.is_none(), "a command that failed made a layer");
        Ok(())
    })
}

#[test]
fn a_sandbox_is_brought_back_to_a_checkpoint_and_keeps_its_id() -> Result<()> {
    on_real_guests(|host| {
        let sandbox = host.spawn_one(host.numpy()?)?;
        let id = sandbox.id().as_str();
        sandbox.eval("steps = ['one']")?;
        sandbox.sh("echo one > /root/steps")?;
        host.forkd(&["checkpoint", id, "first"])?.success()?.says(&["first"])?;
        sandbox.eval("steps.append('two')")?;
        sandbox.sh("echo two >> /root/steps")?;
        host.forkd(&["checkpoint", id])?.success()?;
        host.forkd(&["checkpoint", id, "first"])?.failure(1)?.says(&["first", "already"])?;
        host.forkd(&["rewind", id, "nowhere"])?.failure(1)?.says(&["nowhere", "first", "forkd checkpoints"])?;
        ensure!(sandbox.eval("steps")? == "['one', 'two']", "a rewind that failed changed something");

        host.forkd(&["rewind", id, "-n", "2"])?.success()?;
        ensure!(sandbox.eval("steps")? == "['one']");
        ensure!(sandbox.exec(&["cat", "/root/steps"])? == "one");
        ensure!(sandbox.exec(&["hostname"])? == id);
        let left: Vec<CheckpointInfo> = host.forkd(&["checkpoints", id, "--json"])?.json()?;
        ensure!(left.len() == 1 && left[0].name == "first", "{left:?}");

        // A guest that was ruined is brought back too, as often as one likes.
        sandbox.exec_with(&["--timeout-secs", "20"], &["sh", "-c", "echo c > /proc/sysrq-trigger"])?;
        sandbox.wait_for_end()?.says(&["panic"])?;
        host.forkd(&["rewind", id])?.success()?;
        ensure!(sandbox.eval("steps")? == "['one']");
        ensure!(sandbox.branch_once()?.eval("steps")? == "['one']");
        host.forkd(&["tree"])?.success()?.says(&[id, "first"]).map(drop)
    })
}
