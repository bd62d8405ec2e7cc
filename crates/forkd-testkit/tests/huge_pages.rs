//! Memory in huge pages, with and without any reserved.

use anyhow::{Result, ensure};
use forkd_testkit::{Host, Said, Sandbox, on_real_guests};
use forkd_types::rest::SpawnReport;

/// The host's pool of reserved 2 MiB pages, put back to what it was.
struct Pool<'a> {
    host: &'a Host,
    was: String,
}

impl<'a> Pool<'a> {
    fn of(host: &'a Host) -> Result<Self> {
        let was = host.on_daemon_host(&["cat", "/proc/sys/vm/nr_hugepages"])?.success()?.trim().to_owned();
        Ok(Self { host, was })
    }

    fn reserve(&self, pages: &str) -> Result<()> {
        let script = r#"echo "$0" > /proc/sys/vm/nr_hugepages && cat /proc/sys/vm/nr_hugepages"#;
        let got = self.host.on_daemon_host(&["sh", "-c", script, pages])?.success()?;
        ensure!(got.trim() == pages, "asked for {pages} huge pages and got {got}");
        Ok(())
    }
}

impl Drop for Pool<'_> {
    fn drop(&mut self) {
        let _ = self.reserve(&self.was);
    }
}

/// Forks one copy with `--hugepages`; also gives what was warned of, which the program says as well.
fn spawn<'a>(host: &'a Host, tag: &str) -> Result<(Sandbox<'a>, Vec<String>)> {
    let output = host.forkd(&["spawn", "--tag", tag, "--hugepages", "--json"])?;
    let said = output.stderr.clone();
    let report: SpawnReport = output.json()?;
    ensure!(report.failures.is_empty(), "0 children came up: {:?}", report.failures);
    for warning in &report.warnings {
        said.says(&[&format!("warning: {warning}")])?;
    }
    let copy = report.sandboxes.into_iter().map(|info| host.adopt(info)).next();
    Ok((copy.ok_or_else(|| anyhow::anyhow!("0 children came up"))?, report.warnings))
}

/// How much of a copy's memory is in huge pages, in KiB.
fn huge_kib(host: &Host, copy: &Sandbox<'_>) -> Result<u64> {
    let script = r#"awk '/^Private_Hugetlb|^Shared_Hugetlb/ {sum += $2} END {print sum + 0}' /proc/"$0"/smaps"#;
    Ok(host.on_daemon_host(&["sh", "-c", script, &copy.monitor_pid()?])?.success()?.trim().parse()?)
}

#[test]
fn huge_pages_are_used_where_reserved_and_missed_aloud_where_not() -> Result<()> {
    on_real_guests(|host| {
        let tag = &host.numpy()?.tag;
        let pool = Pool::of(host)?;
        pool.reserve("0")?;
        let (copy, warnings) = spawn(host, tag)?;
        ensure!(warnings.len() == 1, "{warnings:?}");
        warnings[0].says(&["4 KiB pages", "sysctl vm.nr_hugepages="])?;
        ensure!(huge_kib(host, &copy)? == 0);
        ensure!(copy.eval("numpy.zeros(2).tolist()")? == "[0.0, 0.0]");

        // What the warning says to type, typed.
        let advised = warnings[0].split("vm.nr_hugepages=").nth(1).unwrap_or_default();
        let advised: String = advised.chars().take_while(char::is_ascii_digit).collect();
        pool.reserve(&advised)?;
        let (huge, warnings) = spawn(host, tag)?;
        ensure!(warnings.is_empty(), "{warnings:?}");
        ensure!(huge_kib(host, &huge)? > 50 << 10, "{} KiB are in huge pages", huge_kib(host, &huge)?);
        ensure!(huge.eval("numpy.zeros(2).tolist()")? == "[0.0, 0.0]");
        ensure!(copy.eval("1 + 1")? == "2", "the copy without them goes on");
        Ok(())
    })
}
