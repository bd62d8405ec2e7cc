//! A copy differs from its source and from its siblings in everything that makes it someone, and
//! shares nothing that it writes.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use forkd_testkit::{Sandbox, on_real_guests};

/// Asks every sandbox the same and fails if two answer alike.
fn all_differ(sandboxes: &[Sandbox<'_>], what: &str, ask: impl Fn(&Sandbox<'_>) -> Result<String>) -> Result<()> {
    let answers = sandboxes.iter().map(ask).collect::<Result<Vec<_>>>()?;
    let distinct: BTreeSet<_> = answers.iter().collect();
    ensure!(distinct.len() == sandboxes.len(), "{what} is not different in every copy: {answers:#?}");
    Ok(())
}

#[test]
fn twenty_siblings_answer_and_are_pairwise_different() -> Result<()> {
    on_real_guests(|host| {
        let siblings = host.spawn(host.numpy()?, 20)?;
        for sibling in &siblings {
            ensure!(sibling.eval("numpy.zeros(5).tolist()")? == "[0.0, 0.0, 0.0, 0.0, 0.0]");
        }
        all_differ(&siblings, "1 KiB of /dev/urandom", |s| s.sh("head -c 1024 /dev/urandom | sha256sum"))?;
        all_differ(&siblings, "Python's random", |s| s.eval("random.random()"))?;
        all_differ(&siblings, "numpy's global generator", |s| s.eval("numpy.random.rand()"))?;
        all_differ(&siblings, "the host name", |s| s.exec(&["hostname"]))?;
        all_differ(&siblings, "the machine id", |s| s.exec(&["cat", "/etc/machine-id"]))?;
        all_differ(&siblings, "the boot id", |s| s.exec(&["cat", "/proc/sys/kernel/random/boot_id"]))?;
        all_differ(&siblings, "the sandbox id inside", |s| s.exec(&["cat", "/run/forkd/sandbox-id"]))?;
        for sibling in &siblings {
            ensure!(sibling.exec(&["hostname"])? == sibling.id().as_str(), "the host name is the sandbox's id");
        }
        Ok(())
    })
}

#[test]
fn depth_is_not_special() -> Result<()> {
    on_real_guests(|host| {
        let mut line = vec![host.spawn_one(host.numpy()?)?];
        for generation in 0..3 {
            let newest = line.last().expect("never empty");
            newest.eval(&format!("generation = {generation}"))?;
            newest.sh(&format!("echo {generation} > /root/generation && sync"))?;
            line.push(newest.branch_once()?);
        }
        all_differ(&line, "1 KiB of /dev/urandom", |s| s.sh("head -c 1024 /dev/urandom | sha256sum"))?;
        all_differ(&line, "Python's random", |s| s.eval("random.random()"))?;
        all_differ(&line, "numpy's global generator", |s| s.eval("numpy.random.rand()"))?;
        all_differ(&line, "the host name", |s| s.exec(&["hostname"]))?;
        all_differ(&line, "the machine id", |s| s.exec(&["cat", "/etc/machine-id"]))?;
        all_differ(&line, "the sandbox id inside", |s| s.exec(&["cat", "/run/forkd/sandbox-id"]))?;
        // Each has what its source had when it was copied, and what it wrote itself.
        for (sandbox, expected) in line.iter().zip(["0", "1", "2", "2"]) {
            ensure!(sandbox.eval("generation")? == expected);
            ensure!(sandbox.exec(&["cat", "/root/generation"])? == expected);
        }
        Ok(())
    })
}

#[test]
fn what_one_copy_writes_no_other_sees() -> Result<()> {
    on_real_guests(|host| {
        let siblings = host.spawn(host.numpy()?, 3)?;
        siblings[0].eval("written = 'by the first'")?;
        siblings[0].sh("echo first > /root/note && sync")?;
        siblings[1].sh("echo second > /root/note && sync")?;
        ensure!(siblings[0].eval("written")? == "'by the first'");
        ensure!(siblings[1].eval("'written' in globals()")? == "False");
        ensure!(siblings[0].exec(&["cat", "/root/note"])? == "first");
        ensure!(siblings[1].exec(&["cat", "/root/note"])? == "second");
        ensure!(siblings[2].sh("test -e /root/note; echo $?")? == "1");
        // And not the zygote: a copy made now is as the snapshot was.
        let later = host.spawn_one(host.numpy()?)?;
        ensure!(later.sh("test -e /root/note; echo $?")? == "1");
        ensure!(later.eval("'written' in globals()")? == "False");
        Ok(())
    })
}

#[test]
fn the_wall_clock_is_right_and_the_monotonic_clock_goes_on() -> Result<()> {
    on_real_guests(|host| {
        let sandbox = host.spawn_one(host.numpy()?)?;
        let now = || Ok::<_, anyhow::Error>(host.on_daemon_host(&["date", "+%s"])?.success()?.trim().parse::<i64>()?);
        let (before, inside, after) = (now()?, sandbox.exec(&["date", "+%s"])?.parse::<i64>()?, now()?);
        ensure!((before - 2..=after + 2).contains(&inside), "the guest says {inside}, its host {before} to {after}");
        let ticks = sandbox.eval("__import__('time').monotonic()")?.parse::<f64>()?;
        let later = sandbox.eval("__import__('time').monotonic()")?.parse::<f64>()?;
        ensure!(later > ticks, "{ticks} then {later}");
        Ok(())
    })
}
