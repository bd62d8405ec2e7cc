//! Checkpoints: where they are, how long they live, and what is taken unasked.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use forkd_testkit::{Body, Daemon, Host, Said, Sandbox, on_real_guests};
use forkd_types::rest::{CheckpointInfo, CheckpointPlace, EvalResponse, SandboxInfo};

fn checkpoints(host: &Host, sandbox: &Sandbox<'_>) -> Result<Vec<CheckpointInfo>> {
    host.forkd(&["checkpoints", sandbox.id().as_str(), "--json"])?.json()
}

/// The directories of checkpoints on disk in the store that `snapshot` is in.
fn on_disk(host: &Host) -> Result<Vec<String>> {
    let snapshot = host.directory_of(host.numpy()?)?;
    let said =
        host.on_daemon_host(&["sh", "-c", "ls $(dirname \"$1\") | grep ^checkpoint- || true", "ls", &snapshot])?;
    Ok(said.success()?.lines().map(str::to_owned).collect())
}

#[test]
fn a_checkpoint_on_disk_is_as_good_as_one_in_memory_and_goes_with_its_sandbox() -> Result<()> {
    on_real_guests(|host| {
        let before = on_disk(host)?;
        let sandbox = host.spawn_one(host.numpy()?)?;
        let id = sandbox.id().as_str();
        sandbox.eval("steps = ['one']")?;
        sandbox.sh("echo one > /root/note; sync")?;
        host.forkd(&["checkpoint", id, "kept", "--disk"])?.success()?.says(&["kept"])?;
        sandbox.eval("steps.append('two')")?;
        sandbox.sh("echo two >> /root/note; sync")?;
        host.forkd(&["checkpoint", id])?.success()?;

        let all = checkpoints(host, &sandbox)?;
        let places: Vec<_> = all.iter().map(|info| (info.name.as_str(), info.place)).collect();
        ensure!(places == [("kept", CheckpointPlace::Disk), ("cp-1", CheckpointPlace::Memory)], "{places:?}");
        ensure!(all[0].stored_bytes.is_some_and(|bytes| bytes > 0) && all[0].private_bytes.is_none(), "{all:?}");
        // It is no snapshot that a user made, and cannot be removed as one.
        ensure!(host.snapshots()?.iter().all(|info| !info.tag.as_str().starts_with("checkpoint-")));
        let hidden = on_disk(host)?.into_iter().find(|tag| !before.contains(tag)).context("it is on disk")?;
        let refused = host.forkd(&["rmi", &hidden])?;
        refused.stdout.says(&[id, "forkd checkpoints"])?;
        refused.failure(1)?;

        host.forkd(&["rewind", id, "kept"])?.success()?;
        ensure!(sandbox.eval("steps")? == "['one']");
        ensure!(sandbox.exec(&["cat", "/root/note"])? == "one");
        // The machine goes on from a snapshot now, and is like any other: copied, kept, kept as a layer.
        sandbox.eval("steps.append('three')")?;
        ensure!(sandbox.branch_once()?.eval("steps")? == "['one', 'three']");
        for (tag, options) in [("testkit-rewound", &[][..]), ("testkit-rewound-layer", &["--layer"])] {
            if host.snapshots()?.iter().any(|info| info.tag.as_str() == tag) {
                host.forkd(&["rmi", tag])?.success()?;
            }
            host.forkd(&[&["snapshot", "--from-sandbox", id, "--tag", tag], options].concat())?.success()?;
            host.forkd(&["verify", tag])?.success()?;
            let copy = host.spawn_one(&host.snapshot(tag))?;
            ensure!(copy.eval("steps")? == "['one', 'three']", "{tag}");
            ensure!(copy.exec(&["cat", "/root/note"])? == "one", "{tag}");
            copy.kill()?.success()?;
            host.forkd(&["rmi", tag])?.success()?;
        }
        // A checkpoint of it is again one, in memory or on disk.
        host.forkd(&["checkpoint", id, "again", "--disk"])?.success()?;
        sandbox.eval("steps.clear()")?;
        host.forkd(&["rewind", id])?.success()?;
        ensure!(sandbox.eval("steps")? == "['one', 'three']");
        host.forkd(&["rewind", id, "kept"])?.success()?;
        ensure!(sandbox.eval("steps")? == "['one']");

        sandbox.kill()?.success()?;
        host.wait_until("the files of the checkpoints are gone", || {
            Ok(on_disk(host)?.iter().all(|tag| before.contains(tag)))
        })
    })
}

#[test]
fn a_checkpoint_before_every_program_undoes_what_it_did() -> Result<()> {
    on_real_guests(|host| {
        let tag = &host.numpy()?.tag;
        let spawned: serde_json::Value =
            host.forkd(&["spawn", "--tag", tag, "--auto-checkpoint", "exec", "--json"])?.json()?;
        let info: SandboxInfo = serde_json::from_value(spawned["sandboxes"][0].clone())?;
        let sandbox = host.adopt(info);
        let id = sandbox.id().as_str();
        sandbox.sh("echo precious > /root/data; sync")?;
        sandbox.sh("rm -rf /root/data")?;
        let names: Vec<_> = checkpoints(host, &sandbox)?.into_iter().map(|info| (info.name, info.automatic)).collect();
        ensure!(names == [("exec-1".to_owned(), true), ("exec-2".to_owned(), true)], "{names:?}");
        host.forkd(&["rewind", id])?.success()?;
        ensure!(sandbox.exec(&["cat", "/root/data"])? == "precious");
        // The last program had one too.
        ensure!(checkpoints(host, &sandbox)?.len() == 3);
        sandbox.eval("1 + 1")?;
        ensure!(checkpoints(host, &sandbox)?.len() == 4);
        Ok(())
    })
}

#[test]
fn the_oldest_checkpoints_go_to_disk_and_all_outlive_the_daemon() -> Result<()> {
    on_real_guests(|host| {
        let daemon = Daemon::start_beside_with(host, host.numpy()?, "--checkpoint-memory 24M")?;
        let spawn = serde_json::json!({"snapshot_tag": host.numpy()?.tag}).to_string();
        let sandboxes: Vec<SandboxInfo> = daemon.call("POST", "/v1/sandboxes", Body::Text(&spawn))?.json(201)?;
        let path = format!("/v1/sandboxes/{}", sandboxes[0].id);
        let eval = |code: &str| -> Result<String> {
            let body = serde_json::json!({"code": code}).to_string();
            let answer: EvalResponse = daemon.call("POST", &format!("{path}/eval"), Body::Text(&body))?.json(200)?;
            Ok(answer.result.unwrap_or_default())
        };
        let list = || -> Result<Vec<CheckpointInfo>> {
            daemon.call("GET", &format!("{path}/checkpoints"), Body::Text(""))?.json(200)
        };
        for name in ["a", "b", "c"] {
            // More than the half of what all together may take.
            eval(&format!("much, name = b'x' * (16 << 20), {name:?}"))?;
            let body = serde_json::json!({"name": name}).to_string();
            daemon.call("POST", &format!("{path}/checkpoints"), Body::Text(&body))?.expect(201)?;
        }
        let places =
            || Ok::<_, anyhow::Error>(list()?.into_iter().map(|info| (info.name, info.place)).collect::<Vec<_>>());
        host.wait_until("the oldest are on disk", || {
            let places = places()?;
            Ok(places.first().is_some_and(|(name, place)| name == "a" && *place == CheckpointPlace::Disk))
        })?;
        host.wait_until("the rest fits", || {
            let before = places()?;
            std::thread::sleep(Duration::from_secs(2));
            Ok(before == places()?)
        })?;
        let before = places()?;
        ensure!(before.len() == 3, "{before:?}");

        daemon.shoot(Duration::ZERO, "GET", "/healthz", "")?;
        daemon.start_again()?;
        ensure!(places()? == before, "after a restart: {:?}, before it: {before:?}", places()?);
        eval("name = 'gone wrong'")?;
        for name in ["c", "b", "a"] {
            let body = serde_json::json!({"name": name}).to_string();
            daemon.call("POST", &format!("{path}/rewind"), Body::Text(&body))?.expect(200)?;
            ensure!(eval("name, len(much)")? == format!("('{name}', {})", 16 << 20));
        }
        daemon.call("DELETE", &path, Body::Text(""))?.expect(204)?;
        host.wait_until("nothing of it is left", || {
            let find = ["find", daemon.directory(), "-name", "checkpoint-*", "-o", "-name", "frozen-*"];
            Ok(host.on_daemon_host(&find)?.success()?.is_empty())
        })
    })
}
