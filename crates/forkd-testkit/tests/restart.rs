//! A daemon that is shot with much under way: the next one finds everything that runs, and nothing else is left.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Result, ensure};
use forkd_testkit::{Body, Daemon, Host, on_real_guests};
use forkd_types::SandboxId;
use forkd_types::rest::{EvalResponse, SandboxInfo, SnapshotInfo, SnapshotStatus, SpawnReport};
use serde_json::json;

/// How many sandboxes there are when the daemon dies.
const SANDBOXES: usize = 50;

/// Sends a signal to the children of a monitor. Arguments: process id, signal.
const SIGNAL_CHILDREN: &str = r#"kill "-$2" $(cat /proc/$1/task/$1/children) && echo done"#;

fn post(daemon: &Daemon<'_>, target: &str, body: &serde_json::Value) -> Result<forkd_testkit::Answer> {
    daemon.call("POST", target, Body::Text(&body.to_string()))
}

fn get<T: serde::de::DeserializeOwned>(daemon: &Daemon<'_>, target: &str) -> Result<T> {
    daemon.call("GET", target, Body::Text(""))?.json(200)
}

fn spawn(daemon: &Daemon<'_>, tag: &str, n: usize) -> Result<Vec<SandboxInfo>> {
    let request = json!({ "snapshot_tag": tag, "n": n });
    let report: SpawnReport = post(daemon, "/v1/sandboxes?detail=true", &request)?.json(201)?;
    ensure!(report.sandboxes.len() == n, "not all children came up: {:?}", report.failures);
    Ok(report.sandboxes)
}

fn eval(daemon: &Daemon<'_>, id: &SandboxId, code: &str) -> Result<String> {
    let request = json!({ "code": code, "timeout_secs": 120 });
    let answer: EvalResponse = post(daemon, &format!("/v1/sandboxes/{id}/eval"), &request)?.json(200)?;
    ensure!(answer.error.is_none(), "{id}: {answer:?}");
    Ok(answer.result.unwrap_or_default())
}

/// A daemon with [`SANDBOXES`] sandboxes of three snapshots, the first of which can be told from all others.
fn crowd(host: &Host) -> Result<(Daemon<'_>, Vec<SandboxInfo>)> {
    let numpy = host.numpy()?;
    let daemon = Daemon::start_beside_with(host, numpy, "--child-deadline 240")?;
    let mut sandboxes = spawn(&daemon, &numpy.tag, 1)?;
    let first = sandboxes[0].id.clone();
    eval(&daemon, &first, "mark = 'kept'")?;
    for tag in ["second", "third"] {
        post(&daemon, &format!("/v1/sandboxes/{first}/branch"), &json!({ "tag": tag }))?.expect(201)?;
        sandboxes.extend(spawn(&daemon, tag, 1)?);
    }
    sandboxes.extend(spawn(&daemon, &numpy.tag, SANDBOXES - sandboxes.len())?);
    Ok((daemon, sandboxes))
}

/// What clients see that must not change: id, snapshot, process.
fn seen(sandboxes: &[SandboxInfo]) -> BTreeSet<(SandboxId, String, Option<u32>)> {
    sandboxes.iter().map(|one| (one.id.clone(), one.snapshot_tag.to_string(), one.pid)).collect()
}

#[test]
fn fifty_sandboxes_three_zygotes_and_a_branch_outlive_their_daemon() -> Result<()> {
    on_real_guests(|host| {
        let (daemon, sandboxes) = crowd(host)?;
        let running = daemon.monitors()?.len();
        ensure!(running <= SANDBOXES + 3, "{running} monitors run for fifty sandboxes and three snapshots");
        ensure!(
            running == SANDBOXES + 3,
            "{} of fifty sandboxes and three zygotes is not running",
            SANDBOXES + 3 - running
        );
        let first = &sandboxes[0];
        eval(&daemon, &first.id, "more = b'x' * (64 << 20)")?;
        let target = format!("/v1/sandboxes/{}/branch", first.id);
        let branch = json!({ "tag": "unfinished", "mode": "live", "wait": false });
        post(&daemon, &target, &branch)?.expect(202)?;
        let pid = first.pid.map(|pid| pid.to_string()).unwrap_or_default();
        let signal = |name: &str| host.on_daemon_host(&["sh", "-c", SIGNAL_CHILDREN, "signal", &pid, name]);
        signal("STOP")?.success()?;
        let writing: Vec<SnapshotInfo> = get(&daemon, "/v1/snapshots")?;
        ensure!(writing.iter().any(|info| info.status == SnapshotStatus::Writing), "{writing:?}");
        daemon.shoot(Duration::ZERO, "GET", "/healthz", "")?;
        signal("CONT")?.success()?;
        daemon.start_again()?;

        let found: Vec<SandboxInfo> = get(&daemon, "/v1/sandboxes")?;
        ensure!(found.len() == SANDBOXES, "{} are listed", found.len());
        ensure!(seen(&found) == seen(&sandboxes), "every sandbox is there once, in its own process");
        let snapshots: Vec<SnapshotInfo> = get(&daemon, "/v1/snapshots")?;
        let tags: BTreeSet<_> = snapshots.iter().map(|info| info.tag.as_str()).collect();
        ensure!(tags.len() == snapshots.len() && tags.contains("second") && tags.contains("third"), "{snapshots:?}");
        ensure!(snapshots.iter().all(|info| info.status == SnapshotStatus::Ready), "{snapshots:?}");
        ensure!(!tags.contains("unfinished"), "what was not written whole is not there");
        let is_sandbox = |pid: &u32| sandboxes.iter().any(|sandbox| sandbox.pid == Some(*pid));
        host.wait_until("zygotes and writers have ended", || Ok(daemon.monitors()?.iter().all(is_sandbox)))?;

        for sandbox in &sandboxes {
            ensure!(eval(&daemon, &sandbox.id, "6 * 7")? == "42", "{}", sandbox.id);
        }
        for sandbox in &sandboxes[..3] {
            ensure!(eval(&daemon, &sandbox.id, "mark")? == "'kept'", "{}", sandbox.id);
        }
        for sandbox in &sandboxes {
            let target = format!("/v1/sandboxes/{}/branch", sandbox.id);
            post(&daemon, &target, &json!({ "tag": "again", "replace": true }))?.expect(201)?;
        }
        ensure!(eval(&daemon, &spawn(&daemon, "second", 1)?[0].id, "mark")? == "'kept'");
        let copies: SpawnReport =
            post(&daemon, &format!("/v1/sandboxes/{}/fork?detail=true", first.id), &json!({}))?.json(201)?;
        ensure!(copies.sandboxes.len() == 1, "not all children came up: {:?}", copies.failures);
        ensure!(eval(&daemon, &copies.sandboxes[0].id, "mark, len(more)")? == "('kept', 67108864)");

        for sandbox in get::<Vec<SandboxInfo>>(&daemon, "/v1/sandboxes")? {
            daemon.call("DELETE", &format!("/v1/sandboxes/{}", sandbox.id), Body::Text(""))?.expect(204)?;
        }
        ensure!(get::<Vec<SandboxInfo>>(&daemon, "/v1/sandboxes")?.is_empty());
        // The one zygote is that of the child spawned since.
        host.wait_until("all monitors but a zygote have ended", || Ok(daemon.monitors()?.len() == 1))?;
        let run = format!("{}/run", daemon.directory());
        host.wait_until("their files are gone", || {
            let left = host.on_daemon_host(&["find", &run, "-name", "sb-*"])?.success()?;
            Ok(left.is_empty())
        })?;
        daemon.is_well_and_tidy()
    })
}
