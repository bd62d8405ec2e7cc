//! The life of one language's interpreter.
//!
//! ```text
//!          job           reply: outcome to the client
//! Absent ───────► Busy ─────────────────────────────► Idle ──job──► Busy
//!    ▲             │ time limit: SIGKILL, TimedOut      │
//!    ├─────────────┤ died: Internal                     │
//!    │             │ client gone: SIGINT (Python keeps its state), SIGKILL after a while
//!    └─────────────┴────────────────── died ────────────┘
//! ```
//!
//! A copy's interpreter takes its new seed before it runs anything else. While code runs, or while code
//! left threads behind, it is told at once; one that does nothing at all is told when it is next used, so
//! that a copy which never uses its interpreter does not pay for its memory.
//!
//! One thread per language owns the process and its pipes. Output between evaluations (of threads that
//! the code left running) is read and dropped, so that it is nobody's and blocks nobody.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use forkd_proto::agent::{Evaluated, Failure, FailureCode};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::process::Signal;
use serde_json::json;

use super::answer::Captured;
use super::process::{MessageBuffer, Process, Reply, encode};
use super::{Language, Reseed, Scope};
use crate::environment::Environment;
use crate::reaper::Reaper;
use crate::{console, failure, poison};

/// How long interrupted code may take to stop by itself.
const INTERRUPT_GRACE: Duration = Duration::from_secs(2);

/// One evaluation.
#[derive(Debug)]
pub(super) struct Job {
    program: PathBuf,
    code: String,
    scope: Scope,
    deadline: Option<Instant>,
    cancelled: AtomicBool,
    outcome: Mutex<Option<Result<Evaluated, Failure>>>,
    done: OwnedFd,
}

impl Job {
    pub(super) fn new(
        program: PathBuf,
        code: String,
        scope: Scope,
        deadline: Option<Instant>,
    ) -> Result<Self, Failure> {
        let done = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| failure::from_io("cannot queue the evaluation", &error.into()))?;
        Ok(Self { program, code, scope, deadline, cancelled: AtomicBool::new(false), outcome: Mutex::default(), done })
    }

    /// Nobody waits for the outcome any more. [`Supervisor::nudge`] makes it known at once.
    pub(super) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
    }

    pub(super) fn take_outcome(&self) -> Option<Result<Evaluated, Failure>> {
        poison::lock(&self.outcome).take()
    }

    fn finish(&self, outcome: Result<Evaluated, Failure>) {
        *poison::lock(&self.outcome) = Some(outcome);
        let _ = rustix::io::write(&self.done, &1u64.to_ne_bytes());
    }
}

impl AsFd for Job {
    /// Readable once there is an outcome.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.done.as_fd()
    }
}

/// How long an interpreter that was idle may take to reseed when its job has no deadline. It takes a millisecond,
/// but on a host where a hundred copies wake theirs at once, it waits for its turn on a processor.
const RESEED_LIMIT: Duration = Duration::from_secs(120);

/// What others know of the interpreter.
#[derive(Debug)]
struct Warm {
    control: Arc<Mutex<UnixStream>>,
    numpy_version: Option<String>,
    /// No code runs in it until it is asked to run some.
    alone: bool,
}

/// Whether code runs, and the seed that it is to have before it does.
#[derive(Debug, Default)]
struct Turn {
    busy: bool,
    reseed: Option<Vec<u8>>,
}

/// What became of a seed that was handed over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Told {
    /// The interpreter answers; see [`Supervisor::await_reseeded`].
    Now,
    /// It is kept for the interpreter until it is next used.
    WhenUsed,
}

/// One language's interpreter, seen from outside.
#[derive(Debug)]
pub(super) struct Supervisor {
    language: Language,
    environment: Arc<Environment>,
    reaper: Arc<Reaper>,
    jobs: Mutex<VecDeque<Arc<Job>>>,
    wake: OwnedFd,
    warm: Mutex<Option<Warm>>,
    turn: Mutex<Turn>,
}

impl Supervisor {
    /// Starts the thread; the interpreter starts with the first job.
    pub(super) fn start(
        language: Language,
        environment: Arc<Environment>,
        reaper: Arc<Reaper>,
    ) -> io::Result<Arc<Self>> {
        let supervisor = Arc::new(Self {
            language,
            environment,
            reaper,
            jobs: Mutex::default(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            warm: Mutex::default(),
            turn: Mutex::default(),
        });
        let working = Arc::clone(&supervisor);
        std::thread::Builder::new().name(language.name().into()).stack_size(512 << 10).spawn(move || working.run())?;
        Ok(supervisor)
    }

    pub(super) fn language(&self) -> Language {
        self.language
    }

    pub(super) fn is_warm(&self) -> bool {
        poison::lock(&self.warm).is_some()
    }

    pub(super) fn numpy_version(&self) -> Option<String> {
        poison::lock(&self.warm).as_ref()?.numpy_version.clone()
    }

    pub(super) fn submit(&self, job: Arc<Job>) {
        poison::lock(&self.jobs).push_back(job);
        self.nudge();
    }

    /// Makes the thread look at its jobs.
    pub(super) fn nudge(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn control(&self) -> io::Result<Arc<Mutex<UnixStream>>> {
        let warm = poison::lock(&self.warm);
        let warm = warm.as_ref().ok_or_else(|| io::Error::other("it has ended meanwhile"))?;
        Ok(Arc::clone(&warm.control))
    }

    /// Tells the interpreter to reseed, now or when it is next used.
    pub(super) fn reseed(&self, reseed: &Reseed<'_>) -> io::Result<Told> {
        let seed = crate::identity::seed::derive(reseed.seed, self.language.name());
        let message = encode(&json!({ "seed": crate::identity::seed::to_hex(&seed), "sandbox_id": reseed.sandbox_id }));
        // Held while it is decided: code does not begin to run meanwhile.
        let mut turn = poison::lock(&self.turn);
        if !turn.busy && poison::lock(&self.warm).as_ref().is_some_and(|warm| warm.alone) {
            turn.reseed = Some(message);
            return Ok(Told::WhenUsed);
        }
        turn.reseed = None;
        self.send_reseed(&message)?;
        Ok(Told::Now)
    }

    fn send_reseed(&self, message: &[u8]) -> io::Result<()> {
        let control = self.control()?;
        let control = poison::lock(&control);
        // The answer to an earlier message that nobody waited for to the end.
        control.set_nonblocking(true)?;
        while let Ok(1..) = (&*control).read(&mut [0; 4096]) {}
        control.set_nonblocking(false)?;
        control.set_write_timeout(Some(Duration::from_secs(1)))?;
        (&*control).write_all(message)
    }

    /// Begins a turn of the interpreter, by `deadline` if the job has one: from here on code may run in it.
    fn begin(&self, deadline: Option<Instant>) -> Result<(), Failure> {
        let kept = {
            let mut turn = poison::lock(&self.turn);
            turn.busy = true;
            turn.reseed.take()
        };
        let (Some(message), true) = (kept, self.is_warm()) else { return Ok(()) };
        let deadline = deadline.unwrap_or_else(|| Instant::now() + RESEED_LIMIT);
        let reseeded = self.send_reseed(&message).and_then(|()| self.await_reseeded(deadline));
        reseeded.map_err(|error| {
            let language = self.language;
            failure::internal(format!(
                "the {language} runtime did not take its new seed, so the code was not run: {error}"
            ))
        })
    }

    /// How long to wait for [`Self::await_reseeded`]. Node has one thread, so while it computes it
    /// cannot answer; Python answers from a thread of its own.
    pub(super) fn reseed_patience(&self) -> Duration {
        let computing = self.language == Language::Node && poison::lock(&self.turn).busy;
        if computing { Duration::from_millis(200) } else { Duration::from_secs(2) }
    }

    /// Waits until the interpreter has reseeded.
    pub(super) fn await_reseeded(&self, deadline: Instant) -> io::Result<()> {
        let control = self.control()?;
        let control = poison::lock(&control);
        let mut received = MessageBuffer::default();
        let mut piece = [0; 4096];
        loop {
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            control.set_read_timeout(Some(left))?;
            match (&*control).read(&mut piece) {
                Ok(0) => return Err(io::Error::other("it has ended meanwhile")),
                Ok(got) => received.push(&piece[..got]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::Error::other("it is busy and will do so when the code lets it"));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if let Some(reply) = received.next::<Reply>()? {
                return reply.error.map_or(Ok(()), |error| Err(io::Error::other(error)));
            }
        }
    }

    fn run(&self) {
        let mut process = None;
        loop {
            let job = poison::lock(&self.jobs).pop_front();
            match job {
                Some(job) if job.cancelled.load(Ordering::Acquire) => {
                    job.finish(Err(failure::internal("the client went away before its code was run")));
                }
                Some(job) => {
                    let outcome = catch_unwind(AssertUnwindSafe(|| {
                        self.begin(job.deadline)?;
                        self.evaluate(&mut process, &job)
                    }));
                    poison::lock(&self.turn).busy = false;
                    // The client waits for an outcome, whatever happens here.
                    job.finish(outcome.unwrap_or_else(|_| {
                        self.forget(&mut process);
                        Err(failure::internal("the agent failed while it ran the code; see its console"))
                    }));
                }
                None => self.idle(&mut process),
            }
        }
    }

    /// Waits for a job, dropping output and noticing the interpreter's end.
    fn idle(&self, process: &mut Option<Process>) {
        let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
        if let Some(process) = &*process {
            fds.push(PollFd::new(&process.watch, PollFlags::IN));
            fds.extend(process.streams.iter().flatten().map(|stream| PollFd::new(stream, PollFlags::IN)));
        }
        let _ = poll(&mut fds, None);
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        if let Some(running) = process {
            drain(running);
            if let Some(code) = running.watch.code() {
                console::warn(&format!("the {} runtime ended by itself: {code}", self.language));
                self.forget(process);
            }
        }
    }

    fn forget(&self, process: &mut Option<Process>) {
        *process = None;
        *poison::lock(&self.warm) = None;
    }

    fn ensure_started<'a>(&self, process: &'a mut Option<Process>, job: &Job) -> Result<&'a mut Process, Failure> {
        if process.as_ref().is_some_and(|process| process.watch.code().is_some()) {
            self.forget(process);
        }
        if process.is_none() {
            let started = Process::start(&self.reaper, self.language, &job.program, self.environment.with(&[]))
                .map_err(|error| {
                    failure::from_io(
                        format_args!("cannot start the {} runtime {}", self.language, job.program.display()),
                        &error,
                    )
                })?;
            *poison::lock(&self.warm) =
                Some(Warm { control: Arc::clone(&started.control), numpy_version: None, alone: false });
            return Ok(process.insert(started));
        }
        Ok(process.as_mut().expect("it was found or started above"))
    }

    fn evaluate(&self, process: &mut Option<Process>, job: &Job) -> Result<Evaluated, Failure> {
        let running = self.ensure_started(process, job)?;
        drain(running);
        let mut captured = <[Captured; 2]>::default();
        let end = self.exchange(running, job, &mut captured);
        let [stdout, stderr] = captured;
        let failure = match end {
            Ok(reply) => {
                if let Some(warm) = &mut *poison::lock(&self.warm) {
                    warm.numpy_version = reply.numpy;
                    warm.alone = reply.alone;
                }
                return Ok(Evaluated {
                    result: reply.result,
                    error: reply.error,
                    stdout: stdout.into_text(),
                    stderr: stderr.into_text(),
                });
            }
            Err(failure) => failure,
        };
        running.watch.signal_group(Signal::KILL);
        self.forget(process);
        Err(failure)
    }

    /// Sends the code and collects what comes until the reply. After an error the interpreter is of no
    /// more use.
    fn exchange(&self, process: &mut Process, job: &Job, captured: &mut [Captured; 2]) -> Result<Reply, Failure> {
        let language = self.language;
        let broken =
            |error: io::Error| failure::from_io(format_args!("lost touch with the {language} runtime"), &error);
        let request = encode(&json!({ "code": job.code, "expression": job.scope == Scope::Single }));
        let mut sent = 0;
        let mut interrupted: Option<Instant> = None;
        let mut piece = vec![0; 64 << 10];
        loop {
            let deadline = [job.deadline, interrupted.map(|at| at + INTERRUPT_GRACE)].into_iter().flatten().min();
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(match interrupted {
                    Some(_) => failure::internal("the client went away while its code ran"),
                    None => Failure {
                        code: FailureCode::TimedOut,
                        message: format!(
                            "the code ran longer than it may, so the {language} runtime was ended; its state is lost"
                        ),
                    },
                });
            }
            let mut work = PollFlags::IN;
            work.set(PollFlags::OUT, sent < request.len());
            let mut fds = vec![
                PollFd::new(&self.wake, PollFlags::IN),
                PollFd::new(&process.watch, PollFlags::IN),
                PollFd::new(&process.work, work),
            ];
            fds.extend(process.streams.iter().flatten().map(|stream| PollFd::new(stream, PollFlags::IN)));
            let _ = poll(&mut fds, left.and_then(|left| left.try_into().ok()).as_ref());
            let [woken, ended] = [0, 1].map(|at: usize| !fds[at].revents().is_empty());
            drop(fds);
            if woken {
                let _ = rustix::io::read(&self.wake, &mut [0; 8]);
                if job.cancelled.load(Ordering::Acquire) && interrupted.is_none() {
                    interrupted = Some(Instant::now());
                    process.watch.signal_group(Signal::INT);
                }
            }
            collect(&mut process.streams, captured);
            if sent < request.len() {
                match (&process.work).write(&request[sent..]) {
                    Ok(written) => sent += written,
                    Err(error) if retry_later(&error) => {}
                    Err(_) if ended => {}
                    Err(error) => return Err(broken(error)),
                }
            }
            match (&process.work).read(&mut piece) {
                Ok(0) | Err(_) if ended => {
                    let code = process.watch.wait(None).expect("without a deadline it waits for the end");
                    return Err(failure::internal(format!(
                        "the {language} runtime ended while it ran the code ({code}); its state is lost{}",
                        last_words(&mut captured[1])
                    )));
                }
                Ok(0) => {
                    // It closed its socket; its end follows.
                    process.watch.wait(Some(Instant::now() + INTERRUPT_GRACE));
                    if process.watch.code().is_none() {
                        return Err(broken(io::ErrorKind::UnexpectedEof.into()));
                    }
                }
                Ok(got) => process.received.push(&piece[..got]),
                Err(error) if retry_later(&error) => {}
                Err(error) => return Err(broken(error)),
            }
            if let Some(reply) = process.received.next::<Reply>().map_err(broken)? {
                // The runner flushed before it replied, so all output of the code is in the pipes.
                collect(&mut process.streams, captured);
                return Ok(reply);
            }
        }
    }
}

fn retry_later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Takes what the streams hold now, and forgets those that ended: they would be ready for ever.
///
/// A pipe holds 64 KiB unless someone enlarged it; the bound keeps code that writes without end from
/// holding the loop, and so its time limit, up.
fn collect(streams: &mut [Option<OwnedFd>; 2], captured: &mut [Captured; 2]) {
    let mut piece = vec![0; 64 << 10];
    for (stream, captured) in streams.iter_mut().zip(captured) {
        for _ in 0..16 {
            let Some(pipe) = &stream else { break };
            match rustix::io::read(pipe, &mut piece) {
                Ok(got @ 1..) => captured.push(&piece[..got]),
                Ok(_) => *stream = None,
                Err(_) => break,
            }
        }
    }
}

/// Drops what the streams hold now.
fn drain(process: &mut Process) {
    collect(&mut process.streams, &mut <[Captured; 2]>::default());
}

/// What the interpreter said last, for an error message.
fn last_words(stderr: &mut Captured) -> String {
    let text = std::mem::take(stderr).into_text();
    let text = text.trim();
    if text.is_empty() {
        return String::new();
    }
    let mut from = text.len().saturating_sub(2000);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    format!("; it said:\n{}", &text[from..])
}
