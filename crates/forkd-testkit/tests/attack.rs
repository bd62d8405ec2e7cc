//! The API's own description turned against it: requests that fit it and requests that do not, thousands of them,
//! none of which may be the daemon's fault.
//!
//! The daemon is one of this host, without any snapshot: what reaches guests is tried on real agents elsewhere.

#[allow(dead_code)]
mod client_programs;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use forkd_testkit::Host;
use serde::Deserialize;

use client_programs::{python, run};

/// Makes requests from an OpenAPI document.
const SCHEMATHESIS: &str = "schemathesis==4.32.5";

/// How long a daemon with nothing in it may take to come up.
const START_LIMIT: Duration = Duration::from_secs(30);

/// A daemon in a directory of its own, without guests.
struct EmptyDaemon {
    process: Child,
    url: String,
    _directory: tempfile::TempDir,
}

/// What the daemon writes into `daemon.json`.
#[derive(Deserialize)]
struct Whereabouts {
    address: String,
}

impl EmptyDaemon {
    fn start(programs: &Path) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let log = std::fs::File::create(directory.path().join("log"))?;
        let mut process = Command::new(programs.join("forkd-controller"))
            // Nothing of this host's network is to be changed, and no sandbox will need one.
            .args(["serve", "--network", "off", "--bind", "127.0.0.1:0", "--kill-on-exit", "--state-dir"])
            .arg(directory.path().join("state"))
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()?;
        let began = Instant::now();
        let announced = directory.path().join("state/daemon.json");
        loop {
            let text = std::fs::read_to_string(&announced).unwrap_or_default();
            if let Ok(Whereabouts { address }) = serde_json::from_str(&text) {
                return Ok(Self { process, url: format!("http://{address}"), _directory: directory });
            }
            let ended = process.try_wait()?;
            if ended.is_some() || began.elapsed() > START_LIMIT {
                let log = std::fs::read_to_string(directory.path().join("log")).unwrap_or_default();
                let _ = process.kill();
                bail!("the daemon did not come up: {ended:?}\n{log}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// How long a plain question takes, the best of a few.
    fn answer_time(&self, interpreter: &Path) -> Result<Duration> {
        let script = "import sys, time, urllib.request\n\
             def ask():\n    began = time.perf_counter()\n    urllib.request.urlopen(sys.argv[1] + '/v1/sandboxes').read()\n    \
             return time.perf_counter() - began\n\
             print(min(ask() for _ in range(20)))";
        let said = run(Command::new(interpreter).args(["-c", script, &self.url]))?;
        Ok(Duration::from_secs_f64(said.trim().parse().context("a number of seconds")?))
    }
}

impl Drop for EmptyDaemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn no_request_that_can_be_made_from_the_api_s_description_is_the_daemon_s_fault() -> Result<()> {
    let interpreter = python("schemathesis", &[SCHEMATHESIS])?;
    let daemon = EmptyDaemon::start(Host::shared()?.programs())?;
    let before = daemon.answer_time(&interpreter)?;
    let program: PathBuf = interpreter.with_file_name("schemathesis");
    let scratch = tempfile::tempdir()?;
    let mut command = Command::new(program);
    command.current_dir(scratch.path()).arg("run").arg(format!("{}/openapi.json", daemon.url)).args([
        // An answer without an end is no answer to it.
        "--exclude-path",
        "/v1/events",
        "--checks",
        "not_a_server_error,content_type_conformance,response_schema_conformance,status_code_conformance",
        "--phases",
        "examples,coverage,fuzzing",
        "--max-examples",
        "25",
        "--continue-on-failure",
        "--suppress-health-check",
        "all",
        "--seed",
        "1",
        "--no-color",
    ]);
    let said = run(&mut command)?;
    ensure!(!said.contains("FAILURES"), "{said}");
    let after = daemon.answer_time(&interpreter)?;
    ensure!(after < before * 20, "a plain question takes {after:?}, it took {before:?} before");
    Ok(())
}
