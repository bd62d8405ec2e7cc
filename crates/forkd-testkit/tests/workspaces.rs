//! Workspaces and lifetimes on real guests: what is put on disk is what comes back, and nothing is lost on the way.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use forkd_testkit::{Body, Daemon, Host, Said, on_real_guests};
use forkd_types::SandboxId;
use forkd_types::rest::{EvalResponse, SandboxInfo, SnapshotInfo, SpawnReport, WorkspaceInfo, WorkspaceStatus};
use serde_json::json;

fn post(daemon: &Daemon<'_>, target: &str, body: &serde_json::Value) -> Result<forkd_testkit::Answer> {
    daemon.call("POST", target, Body::Text(&body.to_string()))
}

fn get<T: serde::de::DeserializeOwned>(daemon: &Daemon<'_>, target: &str) -> Result<T> {
    daemon.call("GET", target, Body::Text(""))?.json(200)
}

fn eval(daemon: &Daemon<'_>, id: &SandboxId, code: &str) -> Result<String> {
    let request = json!({ "code": code, "timeout_secs": 120 });
    let answer: EvalResponse = post(daemon, &format!("/v1/sandboxes/{id}/eval"), &request)?.json(200)?;
    ensure!(answer.error.is_none(), "{id}: {answer:?}");
    Ok(answer.result.unwrap_or_default())
}

fn create(daemon: &Daemon<'_>, more: serde_json::Value, tag: &str) -> Result<WorkspaceInfo> {
    let mut body = json!({ "name": "w", "snapshot_tag": tag });
    body.as_object_mut().expect("object").extend(more.as_object().expect("object").clone());
    post(daemon, "/v1/workspaces", &body)?.json(201)
}

fn suspend(daemon: &Daemon<'_>, body: serde_json::Value) -> Result<WorkspaceInfo> {
    let info: WorkspaceInfo = post(daemon, "/v1/workspaces/w/suspend", &body)?.json(200)?;
    ensure!(info.status == WorkspaceStatus::Suspended && info.live_sandbox_id.is_none(), "{info:?}");
    Ok(info)
}

fn resume(daemon: &Daemon<'_>) -> Result<SandboxInfo> {
    let info: WorkspaceInfo = daemon.call("POST", "/v1/workspaces/w/resume", Body::Text(""))?.json(200)?;
    ensure!(info.status == WorkspaceStatus::Running, "{info:?}");
    let id = info.live_sandbox_id.context("what runs has a sandbox")?;
    get(daemon, &format!("/v1/sandboxes/{id}"))
}

fn live(info: &WorkspaceInfo) -> Result<&SandboxId> {
    info.live_sandbox_id.as_ref().context("what runs has a sandbox")
}

#[test]
fn a_workspace_comes_back_as_it_was_however_often_and_whatever_happens_to_its_daemon() -> Result<()> {
    on_real_guests(|host| {
        let numpy = host.numpy()?;
        let daemon = Daemon::start_beside(host, numpy)?;
        let made = create(&daemon, json!({ "memory_limit_mib": 2048 }), &numpy.tag)?;
        eval(&daemon, live(&made)?, "much, mark = b'x' * (8 << 20), ['first']")?;
        let again = post(&daemon, "/v1/workspaces", &json!({ "name": "w", "snapshot_tag": numpy.tag }))?;
        ensure!(again.status == 409, "{again:?}");
        for (round, body) in [json!({}), json!({ "diff": true }), json!({})].into_iter().enumerate() {
            let info = suspend(&daemon, body)?;
            ensure!(info.current_state_tag.as_ref().is_some_and(|tag| tag.as_str() == "ws-w-state"), "{info:?}");
            ensure!(get::<Vec<SandboxInfo>>(&daemon, "/v1/sandboxes")?.is_empty());
            let refused = post(&daemon, "/v1/workspaces/w/suspend", &json!({}))?;
            ensure!(refused.status == 400, "{refused:?}");
            let removal = daemon.call("DELETE", "/v1/snapshots/ws-w-state", Body::Text(""))?;
            ensure!(removal.status == 409, "{removal:?}");
            removal.body.says(&["ws-w-state", "workspace w"])?;
            daemon.shoot(Duration::ZERO, "GET", "/healthz", "")?;
            daemon.start_again()?;
            let sandbox = resume(&daemon)?;
            ensure!(sandbox.memory_limit_mib == Some(2048), "{sandbox:?}");
            let said = eval(&daemon, &sandbox.id, &format!("mark.append({round}) or (len(much), len(mark))"))?;
            ensure!(said == format!("(8388608, {})", round + 2), "{said}");
            let refused = daemon.call("POST", "/v1/workspaces/w/resume", Body::Text(""))?;
            ensure!(refused.status == 400, "{refused:?}");
        }
        daemon.is_well_and_tidy()?;

        // Its sandbox ends by another hand: it goes back to what was put on disk last.
        let info: WorkspaceInfo = get(&daemon, "/v1/workspaces/w")?;
        daemon.call("DELETE", &format!("/v1/sandboxes/{}", live(&info)?), Body::Text(""))?.expect(204)?;
        let info: WorkspaceInfo = get(&daemon, "/v1/workspaces/w")?;
        ensure!(info.status == WorkspaceStatus::Stale && info.live_sandbox_id.is_none(), "{info:?}");
        ensure!(eval(&daemon, &resume(&daemon)?.id, "mark")? == "['first', 0, 1]");
        daemon.call("DELETE", "/v1/workspaces/w", Body::Text(""))?.expect(204)?;
        ensure!(get::<Vec<SandboxInfo>>(&daemon, "/v1/sandboxes")?.is_empty());
        let left: Vec<SnapshotInfo> = get(&daemon, "/v1/snapshots")?;
        ensure!(left.iter().all(|info| info.tag.as_str() == numpy.tag), "the source stays, the state goes: {left:?}");
        Ok(())
    })
}

#[test]
fn a_daemon_that_dies_while_it_suspends_leaves_a_workspace_that_runs_or_is_on_disk() -> Result<()> {
    on_real_guests(|host| {
        let numpy = host.numpy()?;
        let daemon = Daemon::start_beside(host, numpy)?;
        let made = create(&daemon, json!({}), &numpy.tag)?;
        eval(&daemon, live(&made)?, "much, mark = b'x' * (32 << 20), 'kept'")?;
        let began = std::time::Instant::now();
        suspend(&daemon, json!({}))?;
        let took = began.elapsed();
        for moment in 0..6 {
            if get::<WorkspaceInfo>(&daemon, "/v1/workspaces/w")?.status != WorkspaceStatus::Running {
                resume(&daemon)?;
            }
            daemon.shoot(took * moment / 5, "POST", "/v1/workspaces/w/suspend", "{}")?;
            daemon.start_again()?;
            let info: WorkspaceInfo = get(&daemon, "/v1/workspaces/w")?;
            let running: Vec<SandboxInfo> = get(&daemon, "/v1/sandboxes")?;
            let id = match info.status {
                WorkspaceStatus::Running => live(&info)?.clone(),
                _ => resume(&daemon)?.id,
            };
            let expected = usize::from(info.status == WorkspaceStatus::Running);
            ensure!(running.len() == expected, "shot {moment}: {info:?}, {running:?}");
            ensure!(eval(&daemon, &id, "len(much), mark")? == "(33554432, 'kept')", "shot {moment}");
        }
        daemon.call("DELETE", "/v1/workspaces/w", Body::Text(""))?.expect(204)?;
        host.wait_until("no sandbox's monitor is left", || Ok(daemon.monitors()?.len() <= 2))?;
        daemon.is_well_and_tidy()
    })
}

#[test]
fn a_workspace_that_cannot_be_put_on_disk_runs_on() -> Result<()> {
    on_real_guests(|host| {
        let numpy = host.numpy()?;
        let daemon = Daemon::start(host, "64m")?;
        daemon.borrow(numpy)?;
        let made = create(&daemon, json!({}), &numpy.tag)?;
        let id = live(&made)?;
        eval(&daemon, id, "much, mark = b'x' * (96 << 20), 'kept'")?;
        let refused = post(&daemon, "/v1/workspaces/w/suspend", &json!({}))?;
        ensure!(refused.status >= 500, "{refused:?}");
        refused.body.says(&["ws-w-state", "No space left on device"])?;
        let info: WorkspaceInfo = get(&daemon, "/v1/workspaces/w")?;
        ensure!(info.status == WorkspaceStatus::Running && info.live_sandbox_id.as_ref() == Some(id), "{info:?}");
        ensure!(eval(&daemon, id, "len(much), mark")? == "(100663296, 'kept')");
        daemon.is_well_and_tidy()
    })
}

/// A child with a lifetime.
fn mortal(daemon: &Daemon<'_>, host: &Host, on_timeout: &str) -> Result<SandboxId> {
    let tag = &host.numpy()?.tag;
    let request = json!({ "snapshot_tag": tag, "timeout_secs": 3600, "on_timeout": on_timeout });
    let report: SpawnReport = post(daemon, "/v1/sandboxes?detail=true", &request)?.json(201)?;
    let failures = format!("children came up: {:?}", report.failures);
    let sandbox = report.sandboxes.into_iter().next().context(failures)?;
    ensure!(sandbox.expires_at_unix.is_some_and(|at| at > sandbox.created_at_unix + 3000), "{sandbox:?}");
    Ok(sandbox.id)
}

#[test]
fn a_lifetime_ends_also_while_no_daemon_runs_and_what_idles_is_put_on_disk() -> Result<()> {
    on_real_guests(|host| {
        let numpy = host.numpy()?;
        let daemon = Daemon::start_beside(host, numpy)?;
        let (killed, kept) = (mortal(&daemon, host, "kill")?, mortal(&daemon, host, "suspend")?);
        eval(&daemon, &kept, "mark = 'kept'")?;
        for id in [&killed, &kept] {
            let info: SandboxInfo =
                post(&daemon, &format!("/v1/sandboxes/{id}/timeout"), &json!({ "timeout_secs": 1 }))?.json(200)?;
            ensure!(info.expires_at_unix.is_some(), "{info:?}");
        }
        daemon.shoot(Duration::ZERO, "GET", "/healthz", "")?;
        daemon.start_again()?;
        let status = |id: &SandboxId| {
            Ok::<_, anyhow::Error>(daemon.call("GET", &format!("/v1/sandboxes/{id}"), Body::Text(""))?.status)
        };
        host.wait_until("the first is gone", || Ok(status(&killed)? == 404))?;
        host.wait_until("the second is on disk", || {
            let info: SandboxInfo = get(&daemon, &format!("/v1/sandboxes/{kept}"))?;
            Ok(info.stopped.is_some_and(|reason| reason.contains("suspended-")))
        })?;
        let tag = format!("suspended-{kept}");
        let report: SpawnReport =
            post(&daemon, "/v1/sandboxes?detail=true", &json!({ "snapshot_tag": tag }))?.json(201)?;
        let again = report.sandboxes.first().with_context(|| format!("children came up: {:?}", report.failures))?;
        ensure!(eval(&daemon, &again.id, "mark")? == "'kept'");

        let made = create(&daemon, json!({ "idle_suspend_secs": 5 }), &numpy.tag)?;
        eval(&daemon, live(&made)?, "mark = 'idle'")?;
        host.wait_until("the workspace is suspended for being idle", || {
            Ok(get::<WorkspaceInfo>(&daemon, "/v1/workspaces/w")?.status == WorkspaceStatus::Suspended)
        })?;
        let id = resume(&daemon)?.id;
        ensure!(eval(&daemon, &id, "__import__('time').sleep(8) or mark")? == "'idle'", "what is in use is not idle");
        Ok(())
    })
}
