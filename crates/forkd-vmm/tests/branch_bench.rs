//! Branching the tiny guest while it runs, `forkd-vmm bench-branch` and `bench-gap`, on the real `/dev/kvm`.
//!
//! Where there is no `/dev/kvm`, every test is counted as ignored and the reason is printed.

use std::io::Write;
use std::process::Command;
use std::time::{Duration, Instant};

use forkd_vmm::raw::{Branched, Guest, Pages, Source};
use libtest_mimic::{Arguments, Failed, Trial};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

type Test = fn() -> Result<(), Failed>;

fn main() {
    let arguments = Arguments::from_args();
    let missing = std::fs::File::options().read(true).write(true).open("/dev/kvm").err();
    if let Some(reason) = &missing {
        let _ = writeln!(std::io::stderr(), "SKIPPED, every test of this file: cannot open /dev/kvm: {reason}");
    }
    let trials: [(&str, Test); 6] = [
        ("copies_of_a_waiting_guest_wake_and_stay", copies_wake_and_stay),
        ("the_benchmark_prints_every_figure", the_benchmark_prints_every_figure),
        ("branches_in_a_row_leak_neither_descriptors_nor_processes", branches_leak_nothing),
        ("a_guest_sees_how_long_it_did_not_run", a_stopped_guest_sees_it),
        ("a_guest_misses_no_more_of_a_branch_than_twice_its_pause", the_gap_is_the_pause),
        ("the_benchmark_of_gaps_prints_every_figure", the_benchmark_of_gaps_prints_every_figure),
    ];
    let trials = trials.map(|(name, run)| Trial::test(name, run).with_ignored_flag(missing.is_some()));
    libtest_mimic::run(&arguments, trials.into()).exit();
}

fn copies_wake_and_stay() -> Result<(), Failed> {
    let source = Source::launch(&std::env::temp_dir(), 8, Pages::Small, Guest::Waiting)?;
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

/// What a benchmark of `forkd-vmm` prints.
fn bench(subcommand: &str, arguments: &[&str]) -> Result<Value, Failed> {
    let scratch = tempfile::tempdir()?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_forkd-vmm"));
    command.arg(subcommand).arg("--scratch").arg(scratch.path()).args(arguments);
    let output = command.output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn the_benchmark_prints_every_figure() -> Result<(), Failed> {
    for pages in ["4k", "thp"] {
        let report =
            bench("bench-branch", &["--private-mib", "8", "--pages", pages, "--rounds", "1", "--in-a-row", "2"])?;
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
    let report = bench("bench-branch", &["--private-mib", "8", "--rounds", "0", "--soak", "250"])?;
    let soak = &report["soak"];
    let at: Vec<_> = soak["steps"].as_array().into_iter().flatten().map(|step| step["branches"].as_u64()).collect();
    assert_eq!(at, [Some(0), Some(100), Some(200), Some(250)], "{soak}");
    assert_eq!((&soak["leaked_descriptors"], &soak["leaked_processes"]), (&0.into(), &0.into()), "{soak}");
    let rss = |step: usize| soak["steps"][step]["rss_kib"].as_u64().unwrap_or(0);
    assert!(rss(3) <= rss(1) + 256, "the source grows: {soak}");
    Ok(())
}

fn a_stopped_guest_sees_it() -> Result<(), Failed> {
    const STOPPED: Duration = Duration::from_millis(200);
    let source = Source::launch(&std::env::temp_dir(), 8, Pages::Small, Guest::Ticking)?;
    let mut watch = source.watch()?;
    let pid = Pid::from_raw(source.pid()).expect("a process has an id");
    watch.mark()?;
    let begun = Instant::now();
    kill_process(pid, Signal::STOP)?;
    std::thread::sleep(STOPPED);
    kill_process(pid, Signal::CONT)?;
    let window = watch.mark()?;
    // A busy host stops it late, and lets it go on late.
    assert!(window.gap > STOPPED / 2 && window.gap < begun.elapsed() * 11 / 10, "{window:?}");
    assert!(window.gap_at >= window.gap && window.gap_at <= window.lasted, "{window:?}");
    assert!(window.ticks > 0, "{window:?}");
    // What was seen once is not seen again.
    assert!(watch.mark()?.lasted < window.lasted, "a window began before the last one ended");
    Ok(())
}

/// Of branches whose pause is a few milliseconds, so that it stands out from what the host does to any program;
/// what that is, is measured in turns with them and allowed for.
fn the_gap_is_the_pause() -> Result<(), Failed> {
    const BRANCHES: usize = 9;
    let scratch = tempfile::tempdir()?;
    for guest in [Guest::Ticking, Guest::Dirtying] {
        let source = Source::launch(scratch.path(), 192, Pages::Small, guest)?;
        let mut watch = source.watch()?;
        let (mut pauses, mut gaps, mut usual) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..BRANCHES {
            let directory = scratch.path().join(number.to_string());
            std::fs::create_dir(&directory)?;
            watch.mark()?;
            let writing = source.snapshot(&directory)?;
            let window = watch.mark()?;
            pauses.push(writing.pause);
            gaps.push(window.gap);
            writing.finish()?;
            std::fs::remove_dir_all(&directory)?;
            watch.mark()?;
            std::thread::sleep(window.lasted);
            usual.push(watch.mark()?.gap);
        }
        let [pause, gap, usual] = [pauses, gaps, usual].map(|mut values| {
            values.sort_unstable();
            values[BRANCHES / 2]
        });
        assert!(gap <= 2 * pause + usual, "{guest:?}: gap {gap:?}, pause {pause:?}, usually {usual:?}");
        assert!(gap >= pause / 4, "{guest:?}: the guest missed the branch: gap {gap:?}, pause {pause:?}");
    }
    Ok(())
}

fn the_benchmark_of_gaps_prints_every_figure() -> Result<(), Failed> {
    for guest in ["idle", "dirtying"] {
        let report =
            bench("bench-gap", &["--private-mib", "8", "--guest", guest, "--rounds", "1", "--after-ms", "50"])?;
        assert_eq!((&report["guest"], &report["pages"]), (&guest.into(), &"4k".into()), "{report}");
        assert!(report["clock_mhz"].as_f64().is_some_and(|mhz| mhz > 0.0), "{report}");
        let round = &report["rounds"][0];
        for figure in ["pause_us", "written_us"] {
            assert!(round[figure].as_f64().is_some_and(|us| us > 0.0), "{figure}: {report}");
        }
        for stretch in ["during", "later", "quiet", "quiet_later"] {
            for figure in ["gap_us", "gap_at_us", "lasted_us", "tick_us"] {
                assert!(round[stretch][figure].as_f64().is_some_and(|us| us > 0.0), "{stretch} {figure}: {report}");
            }
        }
        assert!(round["later"]["lasted_us"].as_f64() >= Some(50e3), "{report}");
    }
    Ok(())
}
