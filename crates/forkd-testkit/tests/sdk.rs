//! The SDKs against the daemon: their own tests, and the examples of their READMEs, run literally.

#[allow(dead_code)]
mod client_programs;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result, ensure};
use forkd_testkit::{Host, on_real_guests, readme_commands};

use client_programs::{
    GuestAddress, copy_sources, environment, environment_of_forkd, expect, install, installed, python, run, workspace,
};

/// Begins the block of the project's README that this file runs.
const MARKER: &str = "<!-- commands: run by crates/forkd-testkit/tests/sdk.rs -->";

/// The snapshot that the READMEs speak of, made like the tests' own.
const QUICKSTART: &str = "quickstart";

/// What the examples of a README make, and an earlier attempt may have left behind.
struct Examples {
    snapshot: &'static str,
    workspace: &'static str,
}

/// The environment of a client, and the snapshot of the quick start; nothing is left of earlier runs of `examples`.
fn prepared(host: &Host, examples: Option<Examples>) -> Result<Vec<(&'static str, OsString)>> {
    static MADE: Mutex<bool> = Mutex::new(false);
    // Once: another test may have sandboxes of it that it is going to branch.
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    if !*made {
        let sandbox = host.spawn_one(host.numpy()?)?;
        // By another program under test it may have been made differently.
        let make = ["snapshot", "--from-sandbox", sandbox.id().as_str(), "--tag", QUICKSTART, "--replace"];
        host.forkd(&make)?.success()?;
        *made = true;
    }
    drop(made);
    if let Some(Examples { snapshot, workspace }) = examples {
        host.forkd(&["rmi", snapshot])?;
        host.forkd(&["workspace", "delete", workspace])?;
    }
    environment(host)
}

/// The Python package, installed from its folder as the README says: its interpreter, and a copy of its sources.
fn python_sdk() -> Result<(PathBuf, PathBuf)> {
    static INSTALLED: OnceLock<Result<(PathBuf, PathBuf), String>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| install_python_sdk().map_err(|error| format!("{error:#}")));
    installed.clone().map_err(anyhow::Error::msg)
}

fn install_python_sdk() -> Result<(PathBuf, PathBuf)> {
    let interpreter = python("python-sdk", &["hatchling", "httpx", "mypy", "websockets"])?;
    let sources = installed().join("python-sdk-sources");
    if sources.exists() {
        std::fs::remove_dir_all(&sources)?;
    }
    copy_sources(&workspace().join("sdk/python"), &sources)?;
    let folder = format!("{}[async,pty]", sources.to_str().context("the path is text")?);
    install(&interpreter, &["--force-reinstall", "--no-deps", "--no-build-isolation", &folder])?;
    Ok((interpreter, sources))
}

#[test]
fn the_python_sdk_passes_its_tests_and_its_readme_does_what_it_says() -> Result<()> {
    let (interpreter, sources) = python_sdk()?;
    run(Command::new(interpreter.with_file_name("mypy")).current_dir(&sources).args(["--strict", "src"]))?;
    on_real_guests(|host| {
        let variables = prepared(host, Some(Examples { snapshot: "with-a-plan", workspace: "notebook" }))?;
        let mut command = Command::new(&interpreter);
        command.args([
            "-m",
            "unittest",
            "discover",
            "--verbose",
            "--start-directory",
            ".",
            "--top-level-directory",
            ".",
        ]);
        let said = run(command.current_dir(&sources).envs(variables))?;
        expect(&said, "\nOK")?;
        ensure!(!said.contains("skipped"), "a test did not run:\n{said}");
        Ok(())
    })
}

#[test]
fn the_python_sandbox_without_a_daemons_address_runs_forkd_itself() -> Result<()> {
    let (interpreter, _) = python_sdk()?;
    on_real_guests(|host| {
        let tag = &host.numpy()?.tag;
        let script = format!(
            "from forkd import Sandbox\n\
             with Sandbox({tag:?}) as sandbox:\n    print(sandbox.eval('numpy.zeros(2).tolist()'), \
             sandbox.commands.run('echo $((6 * 7))').stdout)\n"
        );
        let mut command = Command::new(&interpreter);
        command.args(["-c", &script]).env("FORKD_TARGET", "10.42.0.2:8888").envs(environment_of_forkd(host)?);
        let _address = GuestAddress::add()?;
        expect(&run(&mut command)?, "[0.0, 0.0] 42")
    })
}

/// The TypeScript package, installed from its folder as the README says.
fn typescript_sdk() -> Result<PathBuf> {
    let (sources, project) = (installed().join("typescript-sdk"), installed().join("typescript-project"));
    copy_sources(&workspace().join("sdk/typescript"), &sources)?;
    std::fs::create_dir_all(&project)?;
    std::fs::write(project.join("package.json"), r#"{ "name": "project", "private": true, "type": "module" }"#)?;
    npm(&project, &["install", "--no-audit", "--no-fund", "--force", sources.to_str().context("the path is text")?])?;
    // An npm that asks before it runs install scripts has not compiled it.
    npm(&sources, &["run", "build"])?;
    let import = "import { Sandbox } from '@forkd/sdk'; console.log(typeof Sandbox.spawn)";
    let said = run(Command::new("node").args(["--input-type=module", "--eval", import]).current_dir(&project))?;
    expect(&said, "function")?;
    Ok(sources)
}

/// The files of the package's own tests, by name.
fn tests_below(sources: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(sources.join("test"))?.collect::<std::io::Result<Vec<_>>>()?;
    let mut files: Vec<PathBuf> = entries
        .iter()
        .map(std::fs::DirEntry::path)
        .filter(|path| path.to_string_lossy().ends_with(".test.mjs"))
        .collect();
    ensure!(files.len() > 3, "{files:?}");
    files.sort();
    Ok(files)
}

fn npm(directory: &Path, arguments: &[&str]) -> Result<String> {
    run(Command::new("npm").args(arguments).current_dir(directory))
}

#[test]
fn the_typescript_sdk_passes_its_tests_and_its_readme_does_what_it_says() -> Result<()> {
    let sources = typescript_sdk()?;
    on_real_guests(|host| {
        let variables = prepared(host, Some(Examples { snapshot: "with-a-plan-ts", workspace: "notebook-ts" }))?;
        let mut command = Command::new("node");
        command.args(["--test", "--test-concurrency=1", "--test-reporter=tap"]).args(tests_below(&sources)?);
        let said = run(command.current_dir(&sources).envs(variables))?;
        expect(&said, "# fail 0")?;
        expect(&said, "# skipped 0")
    })
}

#[test]
fn the_readme_leads_from_nothing_to_an_evaluation_in_both_languages() -> Result<()> {
    // As a clone has it, but what is installed there must not stay in the workspace.
    let clone = tempfile::tempdir()?;
    copy_sources(&workspace().join("sdk/python"), &clone.path().join("sdk/python"))?;
    copy_sources(&workspace().join("sdk/typescript"), &clone.path().join("sdk/typescript"))?;
    on_real_guests(|host| {
        prepared(host, None)?;
        // Sandboxes of other tests are not the README's to kill.
        let commands = readme_commands(MARKER, host.programs())?.replace("forkd kill --all\n", "");
        let mut shell = Command::new("bash");
        shell.args(["-c", &format!("set -eu\n{commands}")]).current_dir(clone.path()).envs(host.environment());
        for name in ["FORKD_URL", "FORKD_TOKEN"] {
            shell.env_remove(name);
        }
        let said = run(&mut shell)?;
        ensure!(said.matches("0.0\n").count() == 2, "{said}");
        Ok(())
    })
}
