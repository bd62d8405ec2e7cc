//! Whether a machine that was started still lives, found out from outside.
//!
//! ```text
//!             QEMU's process is gone ───────────────► Dead (ended or panicked: the console says)
//!             QEMU says guest-panicked, paused… ────► Dead
//!   agent answers a ping ───────────────────────────► Well
//!   no answer, twice ───────────────────────────────► Dead (hung)
//! ```
//!
//! That takes half a minute, which is for those who would start the machine again. Whoever only asks gets to hear after
//! a few seconds that it does not answer.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::agent::{self, AgentConnection};
use crate::console;
use crate::process::ProcessId;
use crate::qemu::QMP_SOCKET;
use crate::qmp::Qmp;

/// How long a machine is waited for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// For an answer to somebody who only asks how it is.
    pub(crate) status: Duration,
    /// For an answer of a healthy machine whose processors are busy.
    pub(crate) answer: Duration,
    /// For an answer the second time it is asked.
    pub(crate) last_chance: Duration,
    /// Between two questions to a machine in use.
    pub(crate) ping_every: Duration,
    /// For the answer that it shuts down.
    pub(crate) shutdown: Duration,
    /// For a program to begin on a busy machine.
    pub(crate) begin: Duration,
    /// For a program to end after its time limit.
    pub(crate) end: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            status: Duration::from_secs(5),
            answer: Duration::from_secs(20),
            last_chance: Duration::from_secs(10),
            ping_every: Duration::from_secs(5),
            shutdown: Duration::from_secs(10),
            begin: Duration::from_secs(60),
            end: Duration::from_secs(20),
        }
    }
}

/// A panicking kernel writes its last words before QEMU ends.
const DYING_WORDS: Duration = Duration::from_secs(2);

/// What is needed to examine a running machine.
#[derive(Clone, Debug)]
pub(crate) struct Patient {
    pub(crate) qemu: ProcessId,
    pub(crate) directory: PathBuf,
    pub(crate) agent: SocketAddr,
    pub(crate) token: String,
    pub(crate) patience: Patience,
}

/// Why a machine cannot be used any more, in words that complete "the machine died: …".
pub(crate) type CauseOfDeath = String;

impl Patient {
    pub(crate) fn console(&self) -> PathBuf {
        self.directory.join("console.log")
    }

    /// Examines the machine; takes at most about half a minute, and milliseconds when it is well.
    pub(crate) fn examine(&self) -> Result<(), CauseOfDeath> {
        self.examine_within(&[self.patience.answer, self.patience.last_chance])
    }

    /// The same after it was silent for [`Patience::answer`] already.
    pub(crate) fn examine_again(&self) -> Result<(), CauseOfDeath> {
        self.examine_within(&[self.patience.last_chance])
    }

    fn examine_within(&self, limits: &[Duration]) -> Result<(), CauseOfDeath> {
        for limit in limits {
            self.check_qemu()?;
            if agent::ping(self.agent, &self.token, *limit).is_ok() {
                return Ok(());
            }
        }
        self.check_qemu()?;
        let sign = console::sign_of_death(&self.console());
        Err(match sign {
            Some(sign) => format!("it hung ({sign})"),
            None => {
                let patience = self.patience.answer + self.patience.last_chance;
                format!("it hung (no answer within {} s)", patience.as_secs())
            }
        })
    }

    /// Whether QEMU runs and thinks that the machine does. Cheap: milliseconds.
    pub(crate) fn check_qemu(&self) -> Result<(), CauseOfDeath> {
        if !self.qemu.is_alive() {
            return Err(self.why_ended());
        }
        // A control socket that is busy with another client is no sign of illness.
        match Qmp::connect(&self.directory, QMP_SOCKET).and_then(|mut qmp| qmp.run_state()) {
            Ok(state) if state != "running" => Err(format!("QEMU says that it is {state}")),
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// After a connection broke: dead or alive? Gives a dying QEMU a moment to finish.
    pub(crate) fn post_mortem(&self) -> Result<(), CauseOfDeath> {
        self.ended_meanwhile()?;
        self.examine()
    }

    /// Whether QEMU has ended, or is about to.
    pub(crate) fn ended_meanwhile(&self) -> Result<(), CauseOfDeath> {
        let ended = self.qemu.open().is_none_or(|process| process.wait(DYING_WORDS));
        if ended { Err(self.why_ended()) } else { Ok(()) }
    }

    fn why_ended(&self) -> CauseOfDeath {
        match console::sign_of_death(&self.console()) {
            Some(sign) => format!("QEMU ended after {sign}"),
            None => "QEMU ended".to_owned(),
        }
    }
}

/// Watches a machine while a connection to it is in use, and ends the connection when the machine
/// dies, so that nobody waits on a dead machine for ever.
pub(crate) struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<WatchState>,
    over: Condvar,
}

#[derive(Default)]
struct WatchState {
    over: bool,
    verdict: Option<Verdict>,
}

/// Why a watched connection was ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    /// The machine died.
    Died(CauseOfDeath),
    /// The machine lives, and the connection's work should have been over.
    Overdue,
}

impl Watchdog {
    /// Begins to watch `patient` on behalf of `connection`, whose work is to be over at `deadline`.
    pub(crate) fn set(patient: Patient, connection: AgentConnection, deadline: Option<Instant>) -> Self {
        let shared = Arc::new(Shared::default());
        let watch = Arc::clone(&shared);
        let thread = std::thread::spawn(move || watch.run(&patient, &connection, deadline));
        Self { shared, thread: Some(thread) }
    }

    /// Why the connection was ended, if the watchdog did it.
    pub(crate) fn verdict(&self) -> Option<Verdict> {
        self.shared.lock().verdict.clone()
    }
}

impl Drop for Watchdog {
    /// Lets go without waiting for a ping that may be under way.
    fn drop(&mut self) {
        self.shared.lock().over = true;
        self.shared.over.notify_all();
        drop(self.thread.take());
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, WatchState> {
        // Plain data, whole at every instant.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, patient: &Patient, connection: &AgentConnection, deadline: Option<Instant>) {
        loop {
            let state = self.lock();
            let wait = self.over.wait_timeout_while(state, patient.patience.ping_every, |state| !state.over);
            let (state, _) = wait.unwrap_or_else(PoisonError::into_inner);
            if state.over {
                return;
            }
            drop(state);
            let verdict = match patient.examine() {
                Err(cause) => Verdict::Died(cause),
                Ok(()) if deadline.is_some_and(|deadline| Instant::now() > deadline) => Verdict::Overdue,
                Ok(()) => continue,
            };
            self.lock().verdict = Some(verdict);
            connection.close();
            return;
        }
    }
}
