//! Whatever dies or fails while a snapshot is made or removed: there are whole snapshots only, and the sandboxes
//! run on.

use std::time::Instant;

use anyhow::{Result, ensure};
use forkd_testkit::{Body, Daemon, Host, Said, on_real_guests};
use forkd_types::rest::{EvalResponse, SandboxInfo, SnapshotInfo, SnapshotStatus, SpawnReport};
use serde_json::json;

/// At how many moments of an operation the daemon is shot.
const MOMENTS: u32 = 6;

fn post(daemon: &Daemon<'_>, target: &str, body: &serde_json::Value) -> Result<forkd_testkit::Answer> {
    daemon.call("POST", target, Body::Text(&body.to_string()))
}

fn get<T: serde::de::DeserializeOwned>(daemon: &Daemon<'_>, target: &str) -> Result<T> {
    daemon.call("GET", target, Body::Text(""))?.json(200)
}

fn spawn(daemon: &Daemon<'_>, tag: &str) -> Result<SandboxInfo> {
    let report: SpawnReport = post(daemon, "/v1/sandboxes?detail=true", &json!({ "snapshot_tag": tag }))?.json(201)?;
    let failures = format!("children came up: {:?}", report.failures);
    report.sandboxes.into_iter().next().ok_or_else(|| anyhow::anyhow!(failures))
}

fn eval(daemon: &Daemon<'_>, sandbox: &SandboxInfo, code: &str) -> Result<String> {
    let target = format!("/v1/sandboxes/{}/eval", sandbox.id);
    let answer: EvalResponse = post(daemon, &target, &json!({ "code": code, "timeout_secs": 120 }))?.json(200)?;
    ensure!(answer.error.is_none(), "{answer:?}");
    Ok(answer.result.unwrap_or_default())
}

fn listed(daemon: &Daemon<'_>, tag: &str) -> Result<Option<SnapshotInfo>> {
    let all: Vec<SnapshotInfo> = get(daemon, "/v1/snapshots")?;
    let mut found = all.into_iter().filter(|info| info.tag.as_str() == tag);
    let first = found.next();
    ensure!(found.next().is_none(), "{tag} is listed more than once");
    Ok(first)
}

/// Fails unless the snapshot is whole, every byte of it.
fn verify(daemon: &Daemon<'_>, tag: &str) -> Result<()> {
    let said = post(daemon, &format!("/v1/snapshots/{tag}/verify"), &json!({}))?.expect(200)?;
    said.lines().last().unwrap_or_default().says(&[r#""event":"done""#, r#""good":true"#])
}

fn remove(daemon: &Daemon<'_>, tag: &str) -> Result<()> {
    daemon.call("DELETE", &format!("/v1/snapshots/{tag}"), Body::Text(""))?.expect(204).map(drop)
}

/// A request of which the daemon is to die, and what it makes or removes.
struct Deed<'a> {
    method: &'a str,
    target: &'a str,
    body: serde_json::Value,
    tag: &'a str,
}

/// Does the deed once to see how long it takes, then shoots the daemon at moments spread over that time. Before each
/// time `prepare` makes the store as it has to be; after each, the daemon is started again and everything looked at.
fn shoot_throughout(
    daemon: &Daemon<'_>,
    sandbox: &SandboxInfo,
    deed: &Deed<'_>,
    prepare: impl Fn() -> Result<()>,
) -> Result<()> {
    prepare()?;
    let began = Instant::now();
    let answer = daemon.call(deed.method, deed.target, Body::Text(&deed.body.to_string()))?;
    ensure!((200..300).contains(&answer.status), "{answer:?}");
    let took = began.elapsed();
    for moment in 0..MOMENTS {
        prepare()?;
        daemon.shoot(took * moment / (MOMENTS - 1), deed.method, deed.target, &deed.body.to_string())?;
        daemon.start_again()?;
        let context = format!("shot {moment} of {MOMENTS} while {} {}", deed.method, deed.target);
        looks_well(daemon, sandbox, deed.tag).map_err(|error| error.context(context))?;
    }
    Ok(())
}

/// What must hold after the daemon has died and was started again.
fn looks_well(daemon: &Daemon<'_>, sandbox: &SandboxInfo, tag: &str) -> Result<()> {
    daemon.is_well_and_tidy()?;
    ensure!(eval(daemon, sandbox, "len(much), mark")? == "(16777216, 'kept')");
    for info in get::<Vec<SnapshotInfo>>(daemon, "/v1/snapshots")? {
        ensure!(info.status == SnapshotStatus::Ready, "{info:?}");
    }
    if listed(daemon, tag)?.is_some() {
        verify(daemon, tag)?;
    }
    let monitors = daemon.monitors()?;
    ensure!(sandbox.pid.is_some_and(|pid| monitors == [pid]), "{monitors:?} run for {sandbox:?}");
    Ok(())
}

/// A daemon on the disk with a sandbox whose memory can be told from others'.
fn with_sandbox(host: &Host) -> Result<(Daemon<'_>, SandboxInfo)> {
    let numpy = host.numpy()?;
    let daemon = Daemon::start_beside(host, numpy)?;
    let sandbox = spawn(&daemon, &numpy.tag)?;
    eval(&daemon, &sandbox, "much, mark = b'x' * (16 << 20), 'kept'")?;
    Ok((daemon, sandbox))
}

fn without(daemon: &Daemon<'_>, tag: &str) -> Result<()> {
    if listed(daemon, tag)?.is_some() { remove(daemon, tag) } else { Ok(()) }
}

#[test]
fn a_daemon_that_dies_while_a_sandbox_is_snapshotted_leaves_it_running_and_whole_snapshots() -> Result<()> {
    on_real_guests(|host| {
        let (daemon, sandbox) = with_sandbox(host)?;
        let target = format!("/v1/sandboxes/{}/branch", sandbox.id);
        let deed = Deed { method: "POST", target: &target, body: json!({ "tag": "shot" }), tag: "shot" };
        shoot_throughout(&daemon, &sandbox, &deed, || without(&daemon, "shot"))?;
        without(&daemon, "shot")?;
        post(&daemon, &target, &deed.body)?.expect(201)?;
        verify(&daemon, "shot")?;
        ensure!(eval(&daemon, &spawn(&daemon, "shot")?, "len(much), mark")? == "(16777216, 'kept')");
        Ok(())
    })
}

#[test]
fn a_daemon_that_dies_while_it_compacts_or_removes_leaves_whole_snapshots() -> Result<()> {
    on_real_guests(|host| {
        let (daemon, sandbox) = with_sandbox(host)?;
        let target = format!("/v1/sandboxes/{}/branch", sandbox.id);
        let layer = json!({ "tag": "layer", "mode": "diff", "parent_tag": host.numpy()?.tag });
        post(&daemon, &target, &layer)?.expect(201)?;
        let body = json!({ "to": "flat" });
        let deed = Deed { method: "POST", target: "/v1/snapshots/layer/compact", body, tag: "flat" };
        shoot_throughout(&daemon, &sandbox, &deed, || without(&daemon, "flat"))?;
        without(&daemon, "flat")?;
        post(&daemon, deed.target, &deed.body)?.expect(200)?;
        ensure!(eval(&daemon, &spawn(&daemon, "flat")?, "mark")? == "'kept'");

        let again = || {
            if listed(&daemon, "layer")?.is_some() {
                Ok(())
            } else {
                post(&daemon, &target, &layer)?.expect(201).map(drop)
            }
        };
        let deed = Deed { method: "DELETE", target: "/v1/snapshots/layer", body: json!({}), tag: "layer" };
        // The sandbox made to check the compacted one.
        for info in get::<Vec<SandboxInfo>>(&daemon, "/v1/sandboxes")?.iter().filter(|info| info.id != sandbox.id) {
            daemon.call("DELETE", &format!("/v1/sandboxes/{}", info.id), Body::Text(""))?.expect(204)?;
        }
        shoot_throughout(&daemon, &sandbox, &deed, again)
    })
}

#[test]
fn a_disk_that_fills_while_a_snapshot_is_written_fails_that_alone() -> Result<()> {
    on_real_guests(|host| {
        let numpy = host.numpy()?;
        let daemon = Daemon::start(host, "96m")?;
        daemon.borrow(numpy)?;
        let sandbox = spawn(&daemon, &numpy.tag)?;
        eval(&daemon, &sandbox, "much = b'x' * (128 << 20)")?;
        let target = format!("/v1/sandboxes/{}/branch", sandbox.id);
        let layer = |tag: &str| json!({ "tag": tag, "mode": "diff", "parent_tag": numpy.tag });
        let refused = post(&daemon, &target, &layer("too-big"))?;
        ensure!(refused.status == 500, "{refused:?}");
        refused.body.says(&["too-big", "No space left on device", "memory.layer", daemon.directory()])?;
        ensure!(listed(&daemon, "too-big")?.is_none());
        daemon.is_well_and_tidy()?;
        ensure!(eval(&daemon, &sandbox, "len(much)")? == format!("{}", 128 << 20));

        // The same when nobody waits: it is there to be asked about until it is removed.
        let begun: SnapshotInfo =
            post(&daemon, &target, &json!({ "tag": "later", "mode": "live", "wait": false }))?.json(202)?;
        ensure!(begun.status == SnapshotStatus::Writing, "{begun:?}");
        host.wait_until("it has failed", || {
            Ok(listed(&daemon, "later")?.is_some_and(|info| info.status == SnapshotStatus::Failed))
        })?;
        let failed = listed(&daemon, "later")?.and_then(|info| info.warning).unwrap_or_default();
        failed.says(&["later", "No space left on device", "memory.layer", daemon.directory()])?;
        let refused = post(&daemon, "/v1/sandboxes", &json!({ "snapshot_tag": "later" }))?;
        ensure!(refused.status == 409, "{refused:?}");
        refused.body.says(&["later", "not ready", "No space left on device"])?;
        remove(&daemon, "later")?;
        ensure!(listed(&daemon, "later")?.is_none());
        daemon.is_well_and_tidy()?;

        // None of this was a snapshot of the sandbox, and the next one is.
        let info: SandboxInfo = get(&daemon, &format!("/v1/sandboxes/{}", sandbox.id))?;
        ensure!(info.branch_count == 0 && info.last_branch_memory_path.is_none(), "{info:?}");
        let small = spawn(&daemon, &numpy.tag)?;
        post(&daemon, &format!("/v1/sandboxes/{}/branch", small.id), &layer("small"))?.expect(201)?;
        verify(&daemon, "small")
    })
}

/// Holds the vCPU of a monitor for some seconds, as a debugger does. Arguments: process id, seconds.
const HOLD: &str = r#"
my ($pid, $seconds) = @ARGV;
my @threads = grep { $_ != $pid } map { m{(\d+)$} } glob "/proc/$pid/task/*";
my ($seize, $interrupt) = (0x4206, 0x4207);
for my $thread (@threads) {
    syscall(101, $seize, $thread, 0, 0) == 0 or die "cannot seize $thread: $!\n";
    syscall(101, $interrupt, $thread, 0, 0) == 0 or die "cannot stop $thread: $!\n";
}
$| = 1;
print "held ", scalar @threads, "\n";
close STDOUT;
sleep $seconds;
"#;

#[test]
fn a_guest_that_does_not_stand_still_in_time_is_left_running() -> Result<()> {
    on_real_guests(|host| {
        let sandbox = host.spawn_one(host.numpy()?)?;
        sandbox.eval("mark = 'kept'")?;
        let id = sandbox.id().as_str();
        let hold = r#"perl -e "$0" "$1" 20 </dev/null 2>&1 & sleep 1"#;
        host.on_daemon_host(&["sh", "-c", hold, HOLD, &sandbox.monitor_pid()?])?.success()?.says(&["held 1"])?;
        let refused = host.forkd(&["snapshot", "--from-sandbox", id, "--tag", "testkit-held"])?;
        refused.failure(1)?.says(&[id, "1 of 1 vCPUs did not leave the guest within 2s"])?;
        ensure!(host.snapshots()?.iter().all(|info| info.tag.as_str() != "testkit-held"));
        ensure!(sandbox.eval("mark")? == "'kept'");
        host.forkd(&["snapshot", "--from-sandbox", id, "--tag", "testkit-held"])?.success()?;
        host.forkd(&["verify", "testkit-held"])?.success()?;
        host.forkd(&["rmi", "testkit-held"])?.success().map(drop)
    })
}

/// Sends a signal to the children of a monitor. Arguments: process id, signal.
const SIGNAL_CHILDREN: &str = r#"kill "-$2" $(cat /proc/$1/task/$1/children) && echo done"#;

#[test]
fn a_snapshot_that_is_being_written_is_one_thing_that_can_neither_be_used_nor_made_nor_removed() -> Result<()> {
    on_real_guests(|host| {
        let (daemon, sandbox) = with_sandbox(host)?;
        eval(&daemon, &sandbox, "more = b'x' * (96 << 20)")?;
        let target = format!("/v1/sandboxes/{}/branch", sandbox.id);
        let branch = json!({ "tag": "slow", "mode": "live", "wait": false });
        post(&daemon, &target, &branch)?.expect(202)?;
        let pid = sandbox.pid.map(|pid| pid.to_string()).unwrap_or_default();
        let signal = |name: &str| host.on_daemon_host(&["sh", "-c", SIGNAL_CHILDREN, "signal", &pid, name]);
        signal("STOP")?.success()?.says(&["done"])?;
        ensure!(listed(&daemon, "slow")?.is_some_and(|info| info.status == SnapshotStatus::Writing && !info.bootable));
        for (what, refused) in [
            ("spawn", post(&daemon, "/v1/sandboxes", &json!({ "snapshot_tag": "slow" }))?),
            ("branch", post(&daemon, &target, &branch)?),
            ("compact", post(&daemon, "/v1/snapshots/slow/compact", &json!({ "to": "flat" }))?),
            ("remove", daemon.call("DELETE", "/v1/snapshots/slow", Body::Text(""))?),
        ] {
            ensure!(refused.status == 409, "{what}: {refused:?}");
            refused.body.says(&["slow", "being made"])?;
        }
        // Its source is free for the next one meanwhile, and to end.
        post(&daemon, &target, &json!({ "tag": "quick" }))?.expect(201)?;
        signal("CONT")?.success()?;
        daemon.call("DELETE", &format!("/v1/sandboxes/{}", sandbox.id), Body::Text(""))?.expect(204)?;
        host.wait_until("it is ready", || Ok(listed(&daemon, "slow")?.is_some_and(|info| info.bootable)))?;
        verify(&daemon, "slow")?;
        host.wait_until("nothing writes any more", || {
            // Zygotes there are none: nothing was spawned since.
            Ok(daemon.monitors()?.len() <= 1)
        })?;
        daemon.is_well_and_tidy()
    })
}

#[test]
fn a_snapshot_is_replaced_by_that_of_a_sandbox_and_not_while_others_build_on_it() -> Result<()> {
    on_real_guests(|host| {
        for tag in ["testkit-over", "testkit-old"] {
            if host.snapshots()?.iter().any(|info| info.tag.as_str() == tag) {
                host.forkd(&["rmi", tag])?.success()?;
            }
        }
        let first = host.spawn_one(host.numpy()?)?;
        let id = first.id().as_str();
        let snapshot = ["snapshot", "--from-sandbox", id, "--tag", "testkit-old"];
        first.eval("mark = 'first'")?;
        host.forkd(&snapshot)?.success()?;
        first.eval("mark = 'second'")?;
        host.forkd(&snapshot)?.failure(1)?.says(&["testkit-old", "exists already"])?;
        let replace = [&snapshot[..], &["--replace"]].concat();
        host.forkd(&replace)?.success()?;
        ensure!(host.spawn_one(&host.snapshot("testkit-old"))?.eval("mark")? == "'second'");
        let second = host.spawn_one(&host.snapshot("testkit-old"))?;
        host.forkd(&["snapshot-diff", "--from", "testkit-old", "--tag", "testkit-over", "--exec", "true"])?
            .success()?;
        host.forkd(&replace)?.failure(1)?.says(&["testkit-old", "testkit-over"])?;

        // What a sandbox changed is worth nothing without what it was forked from, and that is said.
        host.forkd(&["rmi", "testkit-over"])?.success()?;
        host.forkd(&replace)?.success()?;
        let orphan = ["snapshot", "--from-sandbox", second.id().as_str(), "--tag", "testkit-over"];
        host.forkd(&orphan)?.failure(1)?.says(&["testkit-old", "removed or replaced since"])?;
        ensure!(second.eval("mark")? == "'second'");
        host.forkd(&["rmi", "testkit-old"])?.success().map(drop)
    })
}
