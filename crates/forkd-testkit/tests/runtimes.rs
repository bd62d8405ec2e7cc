//! Languages that stay warm, and images that have none.

use anyhow::{Context, Result, ensure};
use forkd_testkit::{Said, on_real_guests};

#[test]
fn node_is_warmed_once_and_goes_on_in_every_copy() -> Result<()> {
    on_real_guests(|host| {
        let warm = "node:globalThis.answer = 42; globalThis.fs = require('fs')";
        host.once("debian:bookworm?include=nodejs", "testkit-node", &["--warm", warm], |copy| {
            // The image has no Python, so this is the language that is meant.
            ensure!(copy.eval("answer + 1")? == "43");
            ensure!(
                copy.eval("({ kernel: fs.readFileSync('/proc/sys/kernel/ostype', 'utf8').trim() })")?
                    == r#"{"kernel":"Linux"}"#
            );
            copy.eval("answer = 7")?;
            ensure!(copy.eval("answer")? == "7", "what one evaluation changes the next one sees");
            let error = copy.eval("answer.no.such.thing").expect_err("it throws");
            error.to_string().says(&["TypeError"])?;
            let sibling = host.spawn_one(&forkd_testkit::Snapshot { tag: "testkit-node".to_owned() })?;
            ensure!(sibling.eval("answer")? == "42", "a copy begins as the snapshot was");
            ensure!(sibling.eval("Math.random()")? != copy.eval("Math.random()")?, "copies do not share their luck");
            Ok(())
        })
    })
}

#[test]
fn an_image_of_one_static_program_runs_it_and_says_that_it_has_no_language() -> Result<()> {
    on_real_guests(|host| {
        let root = std::env::temp_dir().join(format!("forkd-testkit-static-{}", std::process::id()));
        std::fs::create_dir_all(root.join("bin"))?;
        // The program under test is linked statically and needs nothing but itself.
        std::fs::copy(host.programs().join("forkd"), root.join("bin/only"))?;
        let source = format!("dir:{}", root.to_str().context("the path is text")?);
        let outcome = host.once(&source, "testkit-static", &["--size", "64M"], |copy| {
            copy.exec(&["/bin/only", "--version"])?.says(&["forkd "])?;
            copy.exec_with(&[], &["sh", "-c", "true"])?.stderr.says(&["sh"])?;
            let eval = |options: &[&str]| {
                host.forkd(&[&["eval"], options, &[copy.id().as_str(), "--", "1 + 1"]].concat())?.failure(1)
            };
            eval(&[])?.says(&["no runtime", "neither python3 nor node"])?;
            eval(&["--language", "node"])?.says(&["cannot start the node runtime", "node"])
        });
        std::fs::remove_dir_all(&root)?;
        outcome
    })
}
