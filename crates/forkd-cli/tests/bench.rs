//! `forkd bench branch --raw` and `forkd bench chain` from the command line to the report, on the real
//! `/dev/kvm`.
//!
//! Where `/dev/kvm`, the monitor or a C compiler is missing, the test is counted as ignored and the reason
//! is printed.

use std::io::Write;
use std::path::Path;

use assert_cmd::Command;
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::Value;

type Check = fn() -> Result<(), Failed>;

fn main() {
    let arguments = Arguments::from_args();
    let missing = missing();
    if let Some(reason) = &missing {
        let _ = writeln!(std::io::stderr(), "SKIPPED, every test of this file: {reason}");
    }
    let trials: [(&str, Check); 2] = [
        ("the_smallest_run_of_branches_reports_every_field", branches),
        ("the_smallest_chain_reports_every_field", chain),
    ];
    let trials = trials.map(|(name, run)| Trial::test(name, run).with_ignored_flag(missing.is_some()));
    libtest_mimic::run(&arguments, trials.into()).exit();
}

/// What the test cannot do without on this host.
fn missing() -> Option<String> {
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        return Some(format!("cannot open /dev/kvm: {error}"));
    }
    let monitor = Path::new(env!("CARGO_BIN_EXE_forkd")).with_file_name("forkd-vmm");
    if !monitor.is_file() {
        return Some(format!("{} is not there: cargo build -p forkd-vmm", monitor.display()));
    }
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let compiler = std::env::split_paths(&paths).any(|path| path.join("cc").is_file() || path.join("gcc").is_file());
    (!compiler).then(|| "there is no C compiler".to_owned())
}

/// `forkd` with a data directory of its own.
fn forkd(home: &Path) -> Result<Command, Failed> {
    let mut forkd = Command::cargo_bin("forkd")?;
    forkd.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("HOME", home);
    Ok(forkd)
}

fn chain() -> Result<(), Failed> {
    let home = tempfile::tempdir()?;
    let mut forkd = forkd(home.path())?;
    forkd.args(["bench", "chain", "--depth", "3", "--runs", "2", "--memory", "128M", "--changed", "1M", "--json"]);
    let report: Value = serde_json::from_slice(&forkd.assert().success().get_output().stdout)?;
    let rows = report["rows"].as_array().cloned().unwrap_or_default();
    let depths: Vec<_> = rows.iter().map(|row| row["depth"].as_u64()).collect();
    assert_eq!(depths, [Some(0), Some(1), Some(2), Some(3)], "{report}");
    for row in &rows {
        for figure in ["spawn_ms", "ratio", "fork_ms", "load_ms", "layer_bytes", "verify_ms"] {
            assert!(row[figure].as_f64().is_some_and(|value| value > 0.0), "{figure}: {row}");
        }
    }
    // What a layer takes on disk is what changed, in memory and on disk, and little besides.
    for row in &rows[1..] {
        let changed = row["changed_bytes"].as_u64().unwrap_or_default();
        assert!((1 << 20..=2 << 20).contains(&changed), "{row}");
        assert!(row["bytes_ratio"].as_f64().is_some_and(|ratio| (1.0..1.1).contains(&ratio)), "{row}");
    }
    Ok(())
}

fn branches() -> Result<(), Failed> {
    let home = tempfile::tempdir()?;
    let mut forkd = forkd(home.path())?;
    forkd.args([
        "bench",
        "branch",
        "--raw",
        "--private",
        "8M",
        "--private",
        "4096G",
        "--runs",
        "1",
        "--gap-runs",
        "1",
        "--soak",
        "2",
        "--json",
    ]);
    let assert = forkd.assert().success();
    let report: Value = serde_json::from_slice(&assert.get_output().stdout)?;
    let rows = report["rows"].as_array().cloned().unwrap_or_default();
    let pages: Vec<_> = rows.iter().map(|row| row["pages"].as_str()).collect();
    assert_eq!(pages, [Some("4k"), Some("thp")], "{report}");
    for row in &rows {
        assert_eq!((row["private_mib"].as_u64(), row["runs"].as_u64()), (Some(8), Some(1)), "{row}");
        for figure in ["pause_ms", "fork_ms", "ratio", "running_ms", "limit_running_ms", "running_ratio"] {
            assert!(row[figure].as_f64().is_some_and(|value| value > 0.0), "{figure}: {row}");
        }
        assert_eq!(row["in_a_row_ms"].as_array().map(Vec::len), Some(10), "{row}");
        for guest in ["idle", "dirtying"] {
            let gaps = &row[guest];
            assert_eq!(gaps["runs"].as_u64(), Some(1), "{row}");
            for figure in ["pause_ms", "gap_ms", "gap_ratio", "usual_gap_ms", "later_gap_ms", "written_ms"] {
                assert!(gaps[figure].as_f64().is_some_and(|value| value > 0.0), "{guest} {figure}: {row}");
            }
        }
    }
    assert_eq!(report["soak"]["branches"], 2, "{report}");
    assert_eq!(report["soak"]["leaked_processes"], 0, "{report}");
    // What a host cannot have is left out, and that is said.
    assert_eq!(report["skipped"][0]["private_mib"], 4 << 20, "{report}");
    let said = String::from_utf8_lossy(&assert.get_output().stderr);
    assert!(said.contains("SKIPPED, 4194304 MiB private"), "{said}");
    Ok(())
}
