//! Faults on purpose: a process dies, or one of its system calls fails, at one call after the other.
//!
//! `strace` does it, so the programs under test hold no code for it. A process is first traced unharmed,
//! which gives the list of calls that it makes; then it is begun anew for every call on the list and harmed
//! at that one. A call is named by its kind and by how many of the kind its thread has made before it, so what
//! is walked must make the same calls each time.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use forkd_testkit::faults::{Fault, Harm, Trace};
//! let trace = Trace::in_directory("/tmp/faults".as_ref());
//! let calm = trace.run(std::process::Command::new("touch").arg("/tmp/faults/file"), None)?;
//! for call in calm.calls {
//!     let fault = Fault { call, harm: Harm::Error("ENOSPC") };
//!     let run = trace.run(std::process::Command::new("touch").arg("/tmp/faults/file"), Some(&fault))?;
//!     assert!(!run.status.success());
//! }
//! # Ok(())
//! # }
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

/// Calls that change a file system, and `openat`, which needs a descriptor and a sound disk whether it changes
/// anything or not.
const CHANGES: &str = "openat creat write writev pwrite64 pwritev pwritev2 copy_file_range sendfile ftruncate fallocate \
                       mkdir mkdirat link linkat symlink symlinkat rename renameat renameat2 unlink unlinkat rmdir \
                       chmod fchmod fchown fsync fdatasync syncfs";

/// Calls that only take something away. When one fails, something is left.
const REMOVALS: [&str; 3] = ["unlink", "unlinkat", "rmdir"];

/// What is done to a process at a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Harm {
    /// It is killed; the call is not made.
    Kill,
    /// The call is not made and fails with this error, as strace spells it: `ENOSPC`.
    Error(&'static str),
    /// The call is made, and returns this much later.
    Delay(Duration),
}

/// One call that a process makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Its name.
    pub name: String,
    /// The how many-th of this name it is in its thread, from 1.
    pub number: usize,
    /// How strace shows it.
    pub text: String,
    /// The thread that makes it.
    pub thread: u32,
}

/// A harm at a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Where.
    pub call: Call,
    /// What.
    pub harm: Harm,
}

/// A process that was traced to its end.
#[derive(Debug)]
pub struct Run {
    /// How it ended.
    pub status: ExitStatus,
    /// The calls it made, in order.
    pub calls: Vec<Call>,
}

/// How processes are traced.
#[derive(Debug)]
pub struct Trace {
    log: PathBuf,
    paths: Vec<PathBuf>,
}

/// Why nothing can be traced here, if that is so.
pub fn cannot_trace() -> Option<String> {
    match Command::new("strace").args(["-f", "--seccomp-bpf", "-qq", "-o", "/dev/null", "true"]).output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(format!("strace cannot trace: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Some(format!("strace cannot be run: {error}")),
    }
}

/// Ends what a process does before that which is to be walked: see [`Run::between_marks`].
pub fn mark() {
    let _ = std::fs::remove_dir(MARK);
}

const MARK: &str = "/no-such-directory/forkd-mark";

impl Trace {
    /// Traces into a log in `directory`.
    pub fn in_directory(directory: &Path) -> Self {
        Self { log: directory.join("strace.log"), paths: Vec::new() }
    }

    /// Looks only at calls on these very paths, by whichever process of those traced.
    pub fn only(mut self, paths: impl IntoIterator<Item = PathBuf>) -> Self {
        self.paths.extend(paths);
        self
    }

    /// The command that runs `program` traced and harmed. It ends as the program does.
    pub fn command(&self, program: &Command, fault: Option<&Fault>) -> Command {
        let mut command = Command::new("strace");
        command.args(["-f", "-qq", "-y", "-s", "16", "-o"]).arg(&self.log);
        // A name that this architecture lacks is no error. The call to harm need not be one that is walked.
        let harmed = fault.map_or("openat", |fault| &fault.call.name);
        command.arg(format!("--trace=?{},{harmed}", CHANGES.replace(' ', ",?")));
        for path in &self.paths {
            command.arg("-P").arg(path);
        }
        if let Some(Fault { call, harm }) = fault {
            let harm = match harm {
                Harm::Kill => "signal=KILL".to_owned(),
                Harm::Delay(time) => format!("delay_exit={}us", time.as_micros()),
                Harm::Error(name) => {
                    // Several times faster; signals it cannot inject.
                    command.arg("--seccomp-bpf");
                    format!("error={name}")
                }
            };
            command.arg(format!("--inject={}:{harm}:when={}", call.name, call.number));
        }
        command.arg("--").arg(program.get_program()).args(program.get_args());
        for (name, value) in program.get_envs() {
            command.env(name, value.map(OsString::from).unwrap_or_default());
        }
        command
    }

    /// Runs `program` to its end.
    pub fn run(&self, program: &Command, fault: Option<&Fault>) -> Result<Run> {
        let output = self.command(program, fault).output().context("cannot run strace")?;
        let calls = self.calls()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(!said.contains("strace: "), "strace complains: {said}");
        Ok(Run { status: output.status, calls })
    }

    /// The calls in the log, in order.
    pub fn calls(&self) -> Result<Vec<Call>> {
        let text = std::fs::read(&self.log).with_context(|| format!("cannot read {}", self.log.display()))?;
        let mut made: BTreeMap<(u32, String), usize> = BTreeMap::new();
        let mut calls = Vec::new();
        for line in String::from_utf8_lossy(&text).lines() {
            // Signals, exits, and the second halves of calls that another thread's came between.
            let Some((thread, text)) = line.split_once(' ') else { continue };
            let (Ok(thread), Some((name, _))) = (thread.parse(), text.trim_start().split_once('(')) else { continue };
            if !CHANGES.split(' ').any(|change| change == name) {
                continue;
            }
            let number = made.entry((thread, name.to_owned())).or_default();
            *number += 1;
            calls.push(Call { name: name.to_owned(), number: *number, text: text.trim_start().to_owned(), thread });
        }
        Ok(calls)
    }
}

impl Run {
    /// The calls between the first two [`mark`]s.
    pub fn between_marks(&self) -> Result<&[Call]> {
        let marks: Vec<usize> = (0..self.calls.len()).filter(|&at| self.calls[at].text.contains(MARK)).collect();
        match marks[..] {
            [begin, end, ..] => Ok(&self.calls[begin + 1..end]),
            _ => bail!("{} of 2 marks were made before the process ended with {}", marks.len(), self.status),
        }
    }
}

impl Run {
    /// The thread that made the first [`mark`].
    pub fn marking_thread(&self) -> Option<u32> {
        self.calls.iter().find(|call| call.text.contains(MARK)).map(|call| call.thread)
    }

    /// A call of a thread that is not the one to make marks, for a trace that looks [only](Trace::only) at the path
    /// that is returned: numbers of several threads begin alike, and the wrong one would come to harm.
    pub fn narrowed(&self, call: &Call) -> Option<(PathBuf, Call)> {
        let path = call.paths().into_iter().next()?;
        let same = |other: &&Call| {
            (other.thread, &other.name) == (call.thread, &call.name) && other.paths().first() == Some(&path)
        };
        let number = self.calls.iter().filter(same).position(|other| other == call)? + 1;
        Some((path, Call { number, ..call.clone() }))
    }
}

impl Call {
    /// The `number`th call of `name` of whichever thread makes so many, for one that was not seen in a log.
    pub fn nth(name: &str, number: usize) -> Self {
        Self { name: name.to_owned(), number, text: format!("{name} number {number}"), thread: 0 }
    }

    /// Whether it only takes something away, or opens a directory to empty it.
    pub fn is_removal(&self) -> bool {
        let opens_directory = self.text.contains("O_NOFOLLOW") && self.text.contains("O_DIRECTORY");
        REMOVALS.contains(&self.name.as_str()) || (self.name == "openat" && opens_directory)
    }

    /// Whether a real call of this kind can fail with `error`.
    pub fn can_fail_with(&self, error: &str) -> bool {
        let takes_room = match self.name.as_str() {
            "openat" => self.text.contains("O_CREAT") || self.text.contains("O_TMPFILE"),
            "fchmod" | "chmod" | "fchown" => false,
            _ => !self.is_removal(),
        };
        match error {
            "ENOSPC" => takes_room,
            "EMFILE" | "ENFILE" => self.name == "openat",
            _ => true,
        }
    }

    /// The paths in angle brackets or quotes, in order: those of descriptors and those given as text. A name
    /// given together with a directory is joined to it.
    fn paths(&self) -> Vec<PathBuf> {
        let names_follow_directories = self.name.trim_end_matches('2').ends_with("at");
        let mut found: Vec<PathBuf> = Vec::new();
        let mut directory: Option<PathBuf> = None;
        let mut rest = self.text.split(") = ").next().unwrap_or_default();
        while let Some(at) = rest.find(['<', '"']) {
            let quoted = rest[at..].starts_with('"');
            let Some(len) = rest[at + 1..].find(if quoted { '"' } else { '>' }) else { break };
            let path = PathBuf::from(&rest[at + 1..at + 1 + len]);
            rest = &rest[at + len + 2..];
            match directory.take() {
                Some(directory) if quoted => found.push(directory.join(path)),
                None if !quoted && names_follow_directories => directory = Some(path),
                _ => found.push(path),
            }
        }
        found
    }
}

/// Checks that everything below `root` that gets a name in one of the directories `published` was on disk before
/// it got it, and that the name was on disk at the end.
///
/// Data counts as on disk when its file was flushed after it was last written, a name when its directory was.
pub fn check_flushed_before_named(calls: &[Call], root: &Path, published: &[&Path]) -> Result<()> {
    let mut unflushed: BTreeSet<PathBuf> = BTreeSet::new();
    for call in calls.iter().filter(|call| call.text.rsplit_once(") = ").is_some_and(|(_, r)| !r.starts_with('-'))) {
        let paths = call.paths();
        let Some(first) = paths.first().filter(|path| path.starts_with(root)) else { continue };
        let directory = |path: &Path| path.parent().unwrap_or(root).to_owned();
        match call.name.as_str() {
            "fsync" | "fdatasync" => {
                unflushed.remove(first);
            }
            "syncfs" => unflushed.clear(),
            "openat" if !call.text.contains("O_CREAT") => {}
            // A change of owner or mode alone loses nothing that was written.
            "fchmod" | "fchown" | "chmod" => {}
            "openat" | "mkdir" | "mkdirat" => {
                unflushed.insert(first.clone());
                unflushed.insert(directory(first));
            }
            "unlink" | "unlinkat" | "rmdir" => {
                unflushed.retain(|path| !path.starts_with(first));
                unflushed.insert(directory(first));
            }
            "link" | "linkat" | "rename" | "renameat" | "renameat2" => {
                let to = paths.last().expect("a first path is not the only one");
                if published.iter().any(|at| to.parent() == Some(at)) {
                    let early = unflushed.iter().find(|path| path.starts_with(first));
                    ensure!(early.is_none(), "{} is not on disk yet at: {}", early.unwrap_or(to).display(), call.text);
                }
                unflushed.extend([directory(first), directory(to)]);
            }
            _ => {
                unflushed.insert(first.clone());
            }
        }
    }
    for at in published {
        ensure!(!unflushed.contains(*at), "the names in {} are not on disk at the end", at.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(text: &str) -> Call {
        let name = text.split('(').next().expect("a name").to_owned();
        Call { name, number: 1, text: text.to_owned(), thread: 1 }
    }

    const CREATE: &str = r#"openat(5</r/staging/0>, "f", O_WRONLY|O_CREAT|O_EXCL, 0600) = 6</r/staging/0/f>"#;
    const WRITE: &str = r#"write(6</r/staging/0/f>, "<x>\"", 4) = 4"#;
    const FLUSH: &str = "fsync(6</r/staging/0/f>) = 0";
    const FLUSH_DIRECTORY: &str = "fsync(5</r/staging/0>) = 0";
    const NAME: &str =
        r#"renameat2(AT_FDCWD</w>, "/r/staging/0", AT_FDCWD</w>, "/r/snapshots/py", RENAME_NOREPLACE) = 0"#;
    const FLUSH_NAME: &str = "fsync(7</r/snapshots>) = 0";

    fn check(lines: &[&str]) -> Result<()> {
        let calls: Vec<_> = lines.iter().map(|line| call(line)).collect();
        check_flushed_before_named(&calls, Path::new("/r"), &[Path::new("/r/snapshots")])
    }

    #[test]
    fn what_is_named_must_be_flushed_and_its_name_too() {
        check(&[CREATE, WRITE, FLUSH, FLUSH_DIRECTORY, NAME, FLUSH_NAME]).expect("the right order");
        for (missing, says) in [(2, "/r/staging/0/f is not"), (3, "/r/staging/0 is not"), (5, "names in /r/snapshots")]
        {
            let mut lines = vec![CREATE, WRITE, FLUSH, FLUSH_DIRECTORY, NAME, FLUSH_NAME];
            lines.remove(missing);
            let error = check(&lines).expect_err("one is missing").to_string();
            assert!(error.contains(says), "{error}");
        }
        check(&[CREATE, FLUSH, WRITE, FLUSH_DIRECTORY, NAME, FLUSH_NAME]).expect_err("written after it was flushed");
        check(&[CREATE, WRITE, FLUSH, FLUSH_DIRECTORY, &NAME.replace("= 0", "= -1 EEXIST (File exists)")])
            .expect("nothing was named");
    }

    #[test]
    fn paths_are_those_of_descriptors_and_arguments() {
        assert_eq!(call(CREATE).paths(), [Path::new("/r/staging/0/f")]);
        assert_eq!(call(NAME).paths().last().map(PathBuf::as_path), Some(Path::new("/r/snapshots/py")));
        assert_eq!(call(FLUSH).paths(), [Path::new("/r/staging/0/f")]);
    }
}
