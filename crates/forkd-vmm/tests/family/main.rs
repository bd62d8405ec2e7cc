//! Correctness of the whole family: random writes to memory and disks across a random tree of forks,
//! branches, checkpoints, rewinds, snapshots, compactions and packs, every node compared byte for byte with a model.
//!
//! The monitors are processes of the real program, the store is the real one; the guest is a tiny one, so
//! that a tree takes seconds on the real `/dev/kvm`, emulated or not. `FORKD_FAMILY_TREES` sets the number of
//! trees. A tree that fails is made smaller until it does not fail any more, and is kept in
//! `family.regressions` to be tried first ever after.

mod guest;
mod monitor;
mod tree;

use std::cell::Cell;
use std::io::Write;

use libtest_mimic::{Arguments, Failed, Trial};
use monitor::Failure;
use proptest::prelude::*;
use proptest::test_runner::{Config, FileFailurePersistence, TestRunner};
use tree::{Act, Family, Made};

/// Acts of one tree; a good half of them make a node.
const ACTS: std::ops::Range<usize> = 380..420;
/// Nodes that a tree has at least.
const NODES: usize = 200;

fn main() {
    let arguments = Arguments::from_args();
    let missing = std::fs::File::options().read(true).write(true).open("/dev/kvm").err();
    if let Some(reason) = &missing {
        let _ = writeln!(std::io::stderr(), "SKIPPED, every test of this file: cannot open /dev/kvm: {reason}");
    }
    let trial = Trial::test("every_node_of_a_random_tree_holds_what_it_should", every_node_of_a_random_tree);
    libtest_mimic::run(&arguments, vec![trial.with_ignored_flag(missing.is_some())]).exit();
}

fn every_node_of_a_random_tree() -> Result<(), Failed> {
    let trees = std::env::var("FORKD_FAMILY_TREES").ok().map_or(Ok(1), |text| text.parse())?;
    let mut runner = TestRunner::new(Config {
        cases: trees,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/family.regressions"
        )))),
        max_shrink_time: 180_000,
        ..Config::default()
    });
    let acts = proptest::collection::vec(tree::act(), ACTS);
    let fewest = Cell::new(usize::MAX);
    runner.run(&acts, |acts| {
        let made = grow(&acts).map_err(|error| TestCaseError::fail(error.to_string()))?;
        let _ = writeln!(std::io::stderr(), "{} nodes: {made:?}", made.nodes());
        fewest.set(fewest.get().min(made.nodes()));
        Ok(())
    })?;
    assert!(fewest.get() >= NODES, "a tree had {} nodes only", fewest.get());
    Ok(())
}

/// Does all of it in a place of its own.
fn grow(acts: &[Act]) -> Result<Made, Failure> {
    let directory = tempfile::tempdir()?;
    let mut family = Family::begin(directory.path())?;
    for (number, act) in acts.iter().enumerate() {
        family.act(act).map_err(|error| format!("act {number}, {act:?}: {error}"))?;
    }
    let made = family.end()?;
    Ok(made)
}
