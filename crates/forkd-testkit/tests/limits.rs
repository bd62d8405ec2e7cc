//! A sandbox takes of the host what its limits allow, and its end for wanting more is nobody else's.

use anyhow::{Context, Result, ensure};
use forkd_testkit::{Host, Said, Sandbox, on_real_guests};
use forkd_types::rest::{EndCode, SandboxInfo, SpawnReport};

/// Where the daemon's groups are, unless it is told otherwise.
const GROUPS: &str = "/sys/fs/cgroup/forkd";

/// Children of the snapshot of the tests with `limits`.
fn limited<'a>(host: &'a Host, n: usize, limits: &[&str]) -> Result<Vec<Sandbox<'a>>> {
    let (tag, count) = (&host.numpy()?.tag, n.to_string());
    let mut command = vec!["spawn", "--tag", tag, "-n", &count, "--json"];
    command.extend(limits.iter().flat_map(|limit| ["--limit", limit]));
    let report: SpawnReport = host.forkd(&command)?.json()?;
    let children: Vec<_> = report.sandboxes.into_iter().map(|info| host.adopt(info)).collect();
    ensure!(children.len() == n, "{} of {n} children came up; failures: {:?}", children.len(), report.failures);
    Ok(children)
}

fn info(host: &Host, sandbox: &Sandbox<'_>) -> Result<SandboxInfo> {
    let all = host.sandboxes()?;
    all.into_iter().find(|info| info.id == *sandbox.id()).with_context(|| format!("{} is gone", sandbox.id()))
}

/// A file of the group of a sandbox's first machine.
fn group_file(host: &Host, sandbox: &Sandbox<'_>, file: &str) -> Result<String> {
    let path = format!("{GROUPS}/sandboxes/{}/{file}", sandbox.id());
    Ok(host.on_daemon_host(&["cat", &path])?.success()?.trim().to_owned())
}

/// The names of all sandboxes' groups.
fn groups(host: &Host) -> Result<String> {
    host.on_daemon_host(&["ls", &format!("{GROUPS}/sandboxes")])?.success()
}

#[test]
fn a_sandbox_that_needs_more_memory_than_its_limit_ends_as_oom_and_its_sibling_lives() -> Result<()> {
    on_real_guests(|host| {
        let siblings = limited(host, 2, &["memory_mib=96"])?;
        let own = host.on_daemon_host(&["cat", &format!("/proc/{}/cgroup", siblings[0].monitor_pid()?)])?.success()?;
        own.says(&[&format!("0::/forkd/sandboxes/{}\n", siblings[0].id())])?;
        ensure!(group_file(host, &siblings[0], "memory.max")? == (96 << 20).to_string());
        // All of the snapshot is there and does not count.
        ensure!(siblings[0].eval("numpy.zeros(2).tolist()")? == "[0.0, 0.0]");
        // The evaluation that ends it is told why.
        let eaten = host.forkd(&["eval", siblings[0].id().as_str(), "--", "len(b'x' * (256 << 20))"])?;
        eaten.failure(1)?.says(&["ran out of memory", "limit of 96 MiB"])?;
        siblings[0].wait_for_end()?.says(&["ran out of memory"])?;
        let ended = info(host, &siblings[0])?;
        ensure!(ended.stopped_code == Some(EndCode::Oom), "{ended:?}");
        ensure!(siblings[1].eval("1 + 1")? == "2");
        // What it had is the host's again at once, and what the other has when that is killed.
        siblings[1].kill()?.success()?;
        host.wait_until("the groups of both are gone", || {
            let left = groups(host)?;
            Ok(siblings.iter().all(|sandbox| !left.contains(sandbox.id().as_str())))
        })
    })
}

#[test]
fn a_quarter_of_a_processor_makes_a_fraction_of_the_progress() -> Result<()> {
    on_real_guests(|host| {
        const COUNT: &str = "import time\nn, end = 0, time.time() + 4\nwhile time.time() < end: n += 1\nprint(n)";
        let whole = limited(host, 1, &[])?.remove(0);
        let quarter = limited(host, 1, &["cpus=0.25"])?.remove(0);
        ensure!(
            info(host, &quarter)?.limits.is_some_and(|limits| limits.cpus.is_some_and(|cpus| cpus.millis() == 250))
        );
        let count = |sandbox: &Sandbox<'_>| -> Result<f64> { Ok(sandbox.exec(&["python3", "-c", COUNT])?.parse()?) };
        let (whole, limited) = (count(&whole)?, count(&quarter)?);
        ensure!(limited < whole * 0.6, "{limited} counted with a quarter of a processor, {whole} with all");
        let throttled = group_file(host, &quarter, "cpu.stat")?;
        ensure!(!throttled.contains("nr_throttled 0"), "{throttled}");
        Ok(())
    })
}

#[test]
fn a_full_budget_of_disk_is_an_error_in_the_guest_which_lives_on_and_so_do_its_copies() -> Result<()> {
    on_real_guests(|host| {
        let sandbox = limited(host, 1, &["disk_mib=24"])?.remove(0);
        let write = |sandbox: &Sandbox<'_>, mib: u32| {
            let script = format!("dd if=/dev/urandom of=/root/big bs=1M count={mib} conv=fsync");
            sandbox.exec_with(&["--timeout-secs", "60"], &["sh", "-c", &script])
        };
        write(&sandbox, 4)?.success()?;
        // A copy has a budget of its own.
        let copy = sandbox.branch_once()?;
        ensure!(copy.info.limits.is_some_and(|limits| limits.disk_mib == Some(24)), "{:?}", copy.info);
        let full = write(&sandbox, 64)?;
        ensure!(full.code != 0 && full.stderr.contains("Input/output error"), "{full:?}");
        ensure!(sandbox.eval("1 + 1")? == "2");
        write(&copy, 4)?.success()?;
        ensure!(info(host, &sandbox)?.stopped.is_none());
        Ok(())
    })
}

#[test]
fn a_spawn_that_the_host_has_no_room_for_is_refused_with_the_numbers() -> Result<()> {
    on_real_guests(|host| {
        let tag = &host.numpy()?.tag;
        let spawn = ["spawn", "--tag", tag, "-n", "3", "--limit", "memory_mib=1000000"];
        let numbers = ["no room for 3 more", "memory limit of 976.6 GiB", "2.9 TiB", "promised already"];
        host.forkd(&spawn)?.failure(1)?.says(&numbers)?;
        let fits = limited(host, 1, &["memory_mib=64"])?.remove(0);
        ensure!(fits.info.memory_limit_mib == Some(64), "{:?}", fits.info);
        let wrong = host.forkd(&["spawn", "--tag", tag, "--limit", "pids=3"])?.failure(1)?;
        wrong.says(&["limits.pids is 3", "at least 16"])
    })
}
