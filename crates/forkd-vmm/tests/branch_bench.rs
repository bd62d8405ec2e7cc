//! Branching the tiny guest while it runs, and `forkd-vmm bench-branch`, on the real `/dev/kvm`.
//!
//! Where there is no `/dev/kvm`, every test is counted as ignored and the reason is printed.

use std::io::Write;
use std::process::Command;

use forkd_vmm::raw::{Branched, Pages, Source};
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::Value;

type Test = fn() -> Result<(), Failed>;

fn main() {
    let arguments = Arguments::from_args();
    let missing = std::fs::File::options().read(true).write(true).open("/dev/kvm").err();
    if let Some(reason) = &missing {
        let _ = writeln!(std::io::stderr(), "SKIPPED, every test of this file: cannot open /dev/kvm: {reason}");
    }
    let trials: [(&str, Test); 3] = [
        ("copies_of_a_waiting_guest_wake_and_stay", copies_wake_and_stay),
        ("the_benchmark_prints_every_figure", the_benchmark_prints_every_figure),
        ("branches_in_a_row_leak_neither_descriptors_nor_processes", branches_leak_nothing),
    ];
    let trials = trials.map(|(name, run)| Trial::test(name, run).with_ignored_flag(missing.is_some()));
    libtest_mimic::run(&arguments, trials.into()).exit();
}

fn copies_wake_and_stay() -> Result<(), Failed> {
    let source = Source::launch(&std::env::temp_dir(), 8, Pages::Small)?;
    let copies = (0..3).map(|_| source.branch()).collect::<Result<Vec<_>, _>>()?;
    for copy in &copies {
        assert!(!copy.pause.is_zero() && copy.running > copy.pause, "{copy:?}");
    }
    // Each says that it ran until this.
    copies.into_iter().try_for_each(Branched::kill)?;
    assert!(!source.bare_fork()?.is_zero());
    source.branch()?.kill()?;
    Ok(())
}

/// What `forkd-vmm bench-branch` prints.
fn bench(arguments: &[&str]) -> Result<Value, Failed> {
    let scratch = tempfile::tempdir()?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_forkd-vmm"));
    command.arg("bench-branch").arg("--scratch").arg(scratch.path()).args(arguments);
    let output = command.output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn the_benchmark_prints_every_figure() -> Result<(), Failed> {
    for pages in ["4k", "thp"] {
        let report = bench(&["--private-mib", "8", "--pages", pages, "--rounds", "1", "--in-a-row", "2"])?;
        assert_eq!((&report["private_mib"], &report["pages"]), (&8.into(), &pages.into()), "{report}");
        for figure in ["pause_us", "fork_us", "running_us"] {
            assert!(report["rounds"][0][figure].as_f64().is_some_and(|us| us > 0.0), "{figure}: {report}");
        }
        let stages = |list: &str| -> Vec<String> {
            let stages = report["rounds"][0][list].as_array().cloned().unwrap_or_default();
            stages.iter().filter_map(|stage| stage["name"].as_str().map(str::to_owned)).collect()
        };
        assert_eq!(stages("pause_stages"), ["quiesce", "seal", "fork"]);
        assert!(stages("running_stages").contains(&"vcpus".to_owned()), "{report}");
        assert_eq!(report["in_a_row_us"].as_array().map(Vec::len), Some(2), "{report}");
        assert!(report["soak"].is_null(), "{report}");
    }
    Ok(())
}

fn branches_leak_nothing() -> Result<(), Failed> {
    let report = bench(&["--private-mib", "8", "--rounds", "0", "--soak", "250"])?;
    let soak = &report["soak"];
    let at: Vec<_> = soak["steps"].as_array().into_iter().flatten().map(|step| step["branches"].as_u64()).collect();
    assert_eq!(at, [Some(0), Some(100), Some(200), Some(250)], "{soak}");
    assert_eq!((&soak["leaked_descriptors"], &soak["leaked_processes"]), (&0.into(), &0.into()), "{soak}");
    let rss = |step: usize| soak["steps"][step]["rss_kib"].as_u64().unwrap_or(0);
    assert!(rss(3) <= rss(1) + 256, "the source grows: {soak}");
    Ok(())
}
