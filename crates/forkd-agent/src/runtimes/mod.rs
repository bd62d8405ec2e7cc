//! Warm runtimes: one persistent interpreter per language.
//!
//! An interpreter starts at the first use of its language, keeps its state between evaluations, and
//! is part of every snapshot of the guest. Evaluations of one language run one after the other. See
//! [`supervisor`] for the life of one interpreter.

mod answer;
mod process;
mod supervisor;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use forkd_proto::agent::{Eval, Evaluated, Failure};
use rustix::event::{PollFd, PollFlags};

use crate::connection::Connection;
use crate::environment::{Environment, find_program};
use crate::failure;
use crate::identity::{self, CurrentIdentity};
use crate::reaper::Reaper;
pub use answer::fit_in_a_frame;
use supervisor::{Job, Supervisor, Told};

/// A language with a warm runtime.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Language {
    /// Python 3.
    Python,
    /// JavaScript in Node.
    Node,
}

impl Language {
    /// All, in the order in which an unnamed language is looked for.
    pub const ALL: [Self; 2] = [Self::Python, Self::Node];

    fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|language| language.name() == name)
    }

    /// Its name in requests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Python => "python",
            Self::Node => "node",
        }
    }

    /// The program that interprets it.
    fn program(self) -> &'static str {
        match self {
            Self::Python => "python3",
            Self::Node => "node",
        }
    }

    /// Arguments that make the program this crate's runner.
    fn arguments(self) -> [&'static str; 2] {
        match self {
            Self::Python => ["-c", include_str!("python_runner.py")],
            Self::Node => ["-e", include_str!("node_runner.js")],
        }
    }
}

impl fmt::Display for Language {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// What source text may be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// Statements in the persistent namespace; the value of a final expression is the result.
    Persistent,
    /// What the TCP protocol takes: one Python expression over numpy alone, or the body of an async
    /// function; nothing stays.
    Single,
}

/// What a copy tells its interpreters.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reseed<'a> {
    /// The copy's seed.
    pub seed: &'a [u8],
    /// The copy's id.
    pub sandbox_id: &'a str,
}

/// What shows that a client does not wait for its answer any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Gone {
    /// It ended its direction of the connection.
    AtEndOfInput,
    /// The connection broke; ending its direction is how it says that its request is complete.
    WhenBroken,
}

/// The interpreters of this guest.
#[derive(Debug)]
pub struct Runtimes {
    environment: Arc<Environment>,
    reaper: Arc<Reaper>,
    identity: Arc<CurrentIdentity>,
    supervisors: [OnceLock<Arc<Supervisor>>; Language::ALL.len()],
}

impl Runtimes {
    /// None is started yet.
    pub fn new(environment: Arc<Environment>, reaper: Arc<Reaper>, identity: Arc<CurrentIdentity>) -> Self {
        Self { environment, reaper, identity, supervisors: Default::default() }
    }

    /// Names of the languages whose interpreter is running.
    pub fn warm(&self) -> Vec<String> {
        self.running().map(|supervisor| supervisor.language().name().to_owned()).collect()
    }

    /// Version of numpy in the Python interpreter, if it is imported there.
    pub fn numpy_version(&self) -> Option<String> {
        self.running().find_map(|supervisor| supervisor.numpy_version())
    }

    fn running(&self) -> impl Iterator<Item = &Arc<Supervisor>> {
        self.supervisors.iter().filter_map(OnceLock::get).filter(|supervisor| supervisor.is_warm())
    }

    /// Evaluates what a client asked for. When the client goes before the end, the evaluation is
    /// interrupted.
    pub fn evaluate(&self, request: &Eval, client: &Connection) -> Result<Evaluated, Failure> {
        let language = match request.language.as_deref() {
            Some(name) => Some(Language::from_name(name).ok_or_else(|| {
                failure::not_found(format!("cannot evaluate {name:?}: the languages are \"python\" and \"node\""))
            })?),
            None => None,
        };
        let limit = request.timeout_ms.map(Duration::from_millis);
        let evaluated = self.run(language, &request.code, Scope::Persistent, limit, (client, Gone::AtEndOfInput))?;
        Ok(fit_in_a_frame(evaluated))
    }

    /// Evaluates `code`; `client` is watched for hanging up.
    pub fn run(
        &self,
        language: Option<Language>,
        code: &str,
        scope: Scope,
        limit: Option<Duration>,
        (client, gone): (&Connection, Gone),
    ) -> Result<Evaluated, Failure> {
        let (language, program) = self.locate(language)?;
        let supervisor = self.supervisor(language)?;
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        let job = Arc::new(Job::new(program, code.to_owned(), scope, deadline)?);
        supervisor.submit(Arc::clone(&job));
        let identities = self.identity.count();
        let mut watch_client = true;
        loop {
            let mut fds = vec![PollFd::new(&*job, PollFlags::IN)];
            if watch_client {
                // That both directions are over, or broken, is told unasked.
                let asked = if gone == Gone::AtEndOfInput { PollFlags::RDHUP } else { PollFlags::empty() };
                fds.push(PollFd::new(client, asked));
            }
            let _ = rustix::event::poll(&mut fds, None);
            if let Some(outcome) = job.take_outcome() {
                return outcome;
            }
            let client_events = fds.get(1).map_or(PollFlags::empty(), PollFd::revents);
            if !client_events.is_empty() {
                watch_client = false;
                // As for programs: in a copy of the machine, the code goes on.
                let reset = client_events.intersects(PollFlags::ERR);
                if !(reset && self.identity.changes(identities, identity::RESET_PATIENCE)) {
                    job.cancel();
                    supervisor.nudge();
                }
            }
        }
    }

    /// The language to use and its program: the one asked for, else the first that the image has.
    fn locate(&self, language: Option<Language>) -> Result<(Language, PathBuf), Failure> {
        let path = self.environment.get("PATH").unwrap_or_default();
        let find = |language: Language| find_program(language.program(), &path, Path::new("/"));
        match language {
            Some(language) => match find(language) {
                Ok(program) => Ok((language, program)),
                Err(error) => Err(failure::not_found(format!("cannot start the {language} runtime: {error}"))),
            },
            None => {
                Language::ALL.into_iter().find_map(|language| Some((language, find(language).ok()?))).ok_or_else(|| {
                    failure::not_found(format!(
                        "this image has no runtime: neither python3 nor node is in PATH ({path})"
                    ))
                })
            }
        }
    }

    fn supervisor(&self, language: Language) -> Result<&Arc<Supervisor>, Failure> {
        let place = &self.supervisors[language as usize];
        if let Some(supervisor) = place.get() {
            return Ok(supervisor);
        }
        let started = Supervisor::start(language, Arc::clone(&self.environment), Arc::clone(&self.reaper))
            .map_err(|error| failure::from_io(format_args!("cannot watch over the {language} runtime"), &error))?;
        Ok(place.get_or_init(|| started))
    }

    /// Gives every running interpreter randomness of its own; returns what could not be done.
    pub fn reseed(&self, reseed: &Reseed<'_>) -> Vec<String> {
        let told: Vec<_> = self.running().map(|supervisor| (supervisor, supervisor.reseed(reseed))).collect();
        let now = Instant::now();
        told.into_iter()
            .filter_map(|(supervisor, sent)| {
                let deadline = now + supervisor.reseed_patience();
                let done = sent.and_then(|told| match told {
                    Told::Now => supervisor.await_reseeded(deadline),
                    Told::WhenUsed => Ok(()),
                });
                let error = done.err()?;
                Some(format!("the {} runtime was not reseeded: {error}", supervisor.language()))
            })
            .collect()
    }
}
