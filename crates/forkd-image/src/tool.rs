//! Running the programs that do part of the work.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use crate::{ImageError, Result};

/// Lines of output kept for an error.
const TAIL: usize = 30;
/// The longest line that is looked at; the rest of a longer one is a line of its own.
const LINE_LIMIT: u64 = 8192;

/// A program, the Debian package that has it, and its arguments.
pub(crate) struct Tool {
    name: &'static str,
    package: &'static str,
    command: Command,
}

/// How a program ended, and the end of what it wrote.
pub(crate) struct Ended {
    pub(crate) tool: &'static str,
    pub(crate) status: ExitStatus,
    pub(crate) tail: Vec<String>,
}

impl Tool {
    pub(crate) fn new(name: &'static str, package: &'static str) -> Self {
        let mut command = Command::new(name);
        // Messages are matched, so they must be untranslated. System programs live in sbin, which
        // an ordinary user's path lacks.
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("LC_ALL", "C.UTF-8").env("PATH", format!("{path}:/usr/local/sbin:/usr/sbin:/sbin"));
        command.stdin(Stdio::null());
        Self { name, package, command }
    }

    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    pub(crate) fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    pub(crate) fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    pub(crate) fn current_dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Runs to the end, handing every line of standard output and error to `line` as it comes.
    pub(crate) fn run_lines(mut self, mut line: impl FnMut(&str)) -> Result<Ended> {
        let (reader, writer) = io::pipe().map_err(ImageError::io("make a pipe for", self.name))?;
        let duplicate = writer.try_clone().map_err(ImageError::io("make a pipe for", self.name))?;
        self.command.stdout(duplicate).stderr(writer);
        let mut child = Reaped(self.spawn()?);
        // The command holds the writing ends; without this the pipe would never end.
        drop(self.command);
        let mut tail = VecDeque::with_capacity(TAIL);
        let mut reader = BufReader::new(reader);
        let mut raw = Vec::new();
        loop {
            raw.clear();
            let got = (&mut reader).take(LINE_LIMIT).read_until(b'\n', &mut raw);
            if got.map_err(ImageError::io("read the output of", self.name))? == 0 {
                break;
            }
            let text = String::from_utf8_lossy(&raw);
            // Progress bars rewrite their line.
            let text = text.trim_end().rsplit('\r').next().unwrap_or_default();
            line(text);
            if !text.is_empty() {
                if tail.len() == TAIL {
                    tail.pop_front();
                }
                tail.push_back(text.to_owned());
            }
        }
        let status = child.0.wait().map_err(ImageError::io("wait for", self.name))?;
        Ok(Ended { tool: self.name, status, tail: tail.into() })
    }

    /// Runs to the end and returns standard output; fails unless it succeeds.
    pub(crate) fn output(mut self) -> Result<String> {
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = self.spawn()?.wait_with_output().map_err(ImageError::io("wait for", self.name))?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        let tail = stderr.lines().map(str::to_owned).collect();
        Ended { tool: self.name, status: output.status, tail }.succeeded()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn spawn(&mut self) -> Result<Child> {
        self.command.spawn().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => ImageError::MissingTool { tool: self.name, package: self.package },
            _ => ImageError::io("start", self.name)(error),
        })
    }
}

impl Ended {
    pub(crate) fn succeeded(&self) -> Result<()> {
        if self.status.success() { Ok(()) } else { Err(self.error()) }
    }

    /// Its failure in its own last words.
    pub(crate) fn error(&self) -> ImageError {
        let keep = self.tail.len().saturating_sub(4);
        ImageError::Tool {
            tool: self.tool.to_owned(),
            status: self.status.to_string(),
            message: if self.tail.is_empty() { "it said nothing".to_owned() } else { self.tail[keep..].join("; ") },
        }
    }
}

/// A child that does not outlive an early return.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_both_streams_arrive_and_a_failure_carries_the_last_of_them() {
        let mut lines = Vec::new();
        let script = "echo one; echo two >&2; printf '10%%\\r100%%\\n'; seq 100 >&2; exit 3";
        let ended =
            Tool::new("sh", "dash").args(["-c", script]).run_lines(|line| lines.push(line.to_owned())).expect("runs");
        assert_eq!(&lines[..3], ["one", "two", "100%"]);
        assert_eq!(lines.len(), 103);
        let error = ended.succeeded().expect_err("exit 3").to_string();
        assert!(error.contains("exit status: 3") && error.ends_with("97; 98; 99; 100"), "{error}");
    }

    #[test]
    fn a_missing_program_is_named_with_its_package() {
        let error = Tool::new("no-such-program-here", "some-package").output().expect_err("missing");
        assert!(matches!(error, ImageError::MissingTool { tool: "no-such-program-here", package: "some-package" }));
    }
}
