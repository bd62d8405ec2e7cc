//! The image's own warm-up program.
//!
//! `/etc/forkd-recipe.env` may name a program (`FORKD_WARMUP_CMD`) that prepares something before the
//! guest counts as ready: starts a database, opens a browser. Its first line of output must be
//! `{"ready":true}`. With `FORKD_AGENT_LANG=node` it also evaluates code: it reads
//! `{"id","code"}` lines and answers each with `{"id","result"}` or `{"id","error","stack"}`.

use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use forkd_proto::agent::{Evaluated, Failure, FailureCode};
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::{Value, json};

use crate::agent::Agent;
use crate::environment::{self, Environment, find_program};
use crate::reaper::ExitWatch;
use crate::spawn::{self, Program, Streams};
use crate::{failure, poison};

const RECIPE: &str = "/etc/forkd-recipe.env";
const COMMAND: &str = "FORKD_WARMUP_CMD";
const LANGUAGE: &str = "FORKD_AGENT_LANG";
/// The longest line that is believed to be one.
const LINE_LIMIT: usize = 64 << 20;

/// Why a warm-up program is of no use.
#[derive(Debug, thiserror::Error)]
pub enum WarmupError {
    /// Its command is not one.
    #[error("{COMMAND}={0:?} in {RECIPE} is not a command: a quote is not closed, or there is no word in it")]
    Command(String),
    /// It did not start.
    #[error("cannot start the warm-up program {name:?}")]
    Start {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It said something else first.
    #[error("the first line of the warm-up program {name:?} is {line:?}, it must be {{\"ready\":true}}")]
    NotReady {
        /// Its name.
        name: String,
        /// What it said.
        line: String,
    },
    /// It is gone, or nothing can be read from it.
    #[error("the warm-up program {name:?} ended before it was ready")]
    Ended {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A warm-up program that is ready.
#[derive(Debug)]
pub struct Warmup {
    evaluates: bool,
    process: Mutex<Lines>,
    _watch: ExitWatch,
}

/// Reads the recipe into the environment and runs its warm-up program until it is ready. `None` when
/// the image has none. Takes as long as the program takes.
pub fn run(agent: &Agent) -> Result<Option<Warmup>, WarmupError> {
    let Ok(recipe) = fs::read_to_string(RECIPE) else { return Ok(None) };
    let recipe = environment::parse(&recipe);
    for (name, value) in &recipe {
        if agent.environment.get(name).is_none() {
            agent.environment.set(name, value);
        }
    }
    match agent.environment.get(COMMAND).filter(|command| !command.trim().is_empty()) {
        Some(command) => start(agent, &agent.environment, &command).map(Some),
        None => Ok(None),
    }
}

fn start(agent: &Agent, environment: &Environment, command: &str) -> Result<Warmup, WarmupError> {
    let words = split_words(command).filter(|words| !words.is_empty());
    let args = words.ok_or_else(|| WarmupError::Command(command.to_owned()))?;
    let name = args[0].clone();
    let failed = |source| WarmupError::Start { name: name.clone(), source };
    let search_path = environment.get("PATH").unwrap_or_default();
    let path = find_program(&name, &search_path, Path::new("/"))
        .map_err(|error| failed(io::Error::new(io::ErrorKind::NotFound, error)))?;
    let program = Program {
        path,
        args,
        environment: environment.with(&[]),
        directory: "/".into(),
        credentials: None,
        streams: Streams::Lines,
        keeps: Vec::new(),
    };
    let (watch, ends) = spawn::start(&agent.reaper, program).map_err(failed)?;
    let (Some(input), Some(output)) = (ends.input, ends.output) else {
        return Err(failed(io::ErrorKind::BrokenPipe.into()));
    };
    let mut lines = Lines { input: input.into(), output, waiting: Vec::new(), asked: 0 };
    let line = lines.next(None).map_err(|source| WarmupError::Ended { name: name.clone(), source })?;
    let ready = serde_json::from_slice::<Value>(&line).is_ok_and(|line| line["ready"] == true);
    if !ready {
        return Err(WarmupError::NotReady { name, line: String::from_utf8_lossy(&line).into_owned() });
    }
    let evaluates = environment.get(LANGUAGE).as_deref() == Some("node");
    Ok(Warmup { evaluates, process: Mutex::new(lines), _watch: watch })
}

impl Warmup {
    /// Whether code is to be evaluated by this program.
    pub fn evaluates(&self) -> bool {
        self.evaluates
    }

    /// Evaluates `code`, one at a time. An answer that comes after `limit` is dropped.
    pub fn evaluate(&self, code: &str, limit: Option<Duration>) -> Result<Evaluated, Failure> {
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        poison::lock(&self.process).ask(code, deadline).map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => Failure {
                code: FailureCode::TimedOut,
                message: "the code ran longer than it may; the warm-up program still runs it".to_owned(),
            },
            _ => failure::from_io("lost touch with the warm-up program", &error),
        })
    }
}

/// A program that is spoken to in lines.
#[derive(Debug)]
struct Lines {
    input: fs::File,
    output: OwnedFd,
    waiting: Vec<u8>,
    asked: u64,
}

impl Lines {
    fn ask(&mut self, code: &str, deadline: Option<Instant>) -> io::Result<Evaluated> {
        self.asked += 1;
        let mut question = serde_json::to_vec(&json!({ "id": self.asked, "code": code }))?;
        question.push(b'\n');
        self.input.write_all(&question)?;
        loop {
            let line = self.next(deadline)?;
            // Other lines are late answers, or what the code printed.
            let Ok(answer) = serde_json::from_slice::<Value>(&line) else { continue };
            if answer["id"] != self.asked {
                continue;
            }
            let text = |name: &str| answer.get(name).and_then(Value::as_str).map(str::to_owned);
            return Ok(match answer.get("error") {
                Some(error) => Evaluated {
                    error: Some(text("stack").or_else(|| text("error")).unwrap_or_else(|| error.to_string())),
                    ..Evaluated::default()
                },
                None => Evaluated { result: answer.get("result").map(Value::to_string), ..Evaluated::default() },
            });
        }
    }

    /// The next line, without its end.
    fn next(&mut self, deadline: Option<Instant>) -> io::Result<Vec<u8>> {
        let mut searched = 0;
        loop {
            if let Some(end) = self.waiting[searched..].iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.waiting.drain(..=searched + end).collect();
                line.pop();
                return Ok(line);
            }
            searched = self.waiting.len();
            if searched > LINE_LIMIT {
                return Err(io::Error::other(format!("a line exceeds {LINE_LIMIT} bytes")));
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let mut fds = [PollFd::new(&self.output, PollFlags::IN)];
            match poll(&mut fds, left.and_then(|left| left.try_into().ok()).as_ref()) {
                Ok(0) | Err(rustix::io::Errno::INTR) => continue,
                Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
            let mut piece = [0; 16 << 10];
            match rustix::io::read(&self.output, &mut piece) {
                Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it closed its output")),
                Ok(got) => self.waiting.extend_from_slice(&piece[..got]),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Words of a command as a shell would split them: quotes and backslashes, no expansion. `None` when a
/// quote is not closed.
fn split_words(command: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut characters = command.chars();
    while let Some(character) = characters.next() {
        match character {
            quote @ ('\'' | '"') => {
                let word = word.get_or_insert_default();
                loop {
                    match characters.next()? {
                        end if end == quote => break,
                        '\\' if quote == '"' => match characters.next()? {
                            escaped @ ('"' | '\\' | '$' | '`') => word.push(escaped),
                            other => word.extend(['\\', other]),
                        },
                        other => word.push(other),
                    }
                }
            }
            '\\' => word.get_or_insert_default().push(characters.next()?),
            blank if blank.is_whitespace() => words.extend(word.take()),
            other => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);
    Some(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::Role;
    use proptest::prelude::*;

    fn words(command: &str) -> Option<Vec<String>> {
        split_words(command)
    }

    #[test]
    fn commands_are_split_as_a_shell_splits_them() {
        let expected = |words: &[&str]| Some(words.iter().map(|word| (*word).to_owned()).collect());
        assert_eq!(
            words(r#"node  /opt/b.js --name "two words" 'a"b' c\ d e""f "q\"x\n""#),
            expected(&["node", "/opt/b.js", "--name", "two words", "a\"b", "c d", "ef", "q\"x\\n"])
        );
        assert_eq!(words("  "), expected(&[]));
        assert_eq!(words("''"), expected(&[""]));
        assert_eq!(words("a 'b"), None);
        assert_eq!(words("a\\"), None);
    }

    #[test]
    fn a_warm_up_program_is_awaited_and_evaluates_in_turn() {
        let agent = Agent::start(Role::Program).expect("agent");
        agent.environment.set(LANGUAGE, "node");
        let directory = tempfile::tempdir().expect("tempdir");
        let script = directory.path().join("bridge.sh");
        let text = r#"sleep 0.1; echo '{"ready":true}'
            while read -r line; do
                id=${line##*\"id\":}; id=${id%%[!0-9]*}
                case $line in
                    *fail*) echo '{"id":'$id',"error":"no","stack":"no at all"}' ;;
                    *slow*) sleep 0.4; echo '{"id":'$id',"result":"late"}' ;;
                    *) echo noise; echo '{"id":'$id',"result":{"n":'$id'}}' ;;
                esac
            done"#;
        fs::write(&script, text).expect("write");
        let command = format!("sh {}", script.display());
        let warmup = start(&agent, &agent.environment, &command).expect("ready");
        assert!(warmup.evaluates());
        let result = |code: &str| warmup.evaluate(code, None).expect("evaluated").result;
        assert_eq!(result("1").as_deref(), Some(r#"{"n":1}"#));
        assert_eq!(warmup.evaluate("fail", None).expect("evaluated").error.as_deref(), Some("no at all"));
        let late = warmup.evaluate("slow", Some(Duration::from_millis(100))).expect_err("too slow");
        assert_eq!(late.code, FailureCode::TimedOut);
        assert_eq!(result("2").as_deref(), Some(r#"{"n":4}"#), "the late answer is not taken for this one");

        let failure = |command: &str| start(&agent, &agent.environment, command).expect_err("of no use");
        assert!(matches!(failure("echo hello"), WarmupError::NotReady { line, .. } if line == "hello"));
        assert!(matches!(failure("true"), WarmupError::Ended { .. }));
        assert!(matches!(failure("no-such-program"), WarmupError::Start { .. }));
        assert!(matches!(failure("'"), WarmupError::Command(_)));
    }

    proptest! {
        #[test]
        fn any_command_is_split_without_panic(command in "[a '\"\\\\]{0,20}") {
            let _ = split_words(&command);
        }
    }
}
