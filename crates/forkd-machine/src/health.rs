//! Whether a machine that was started still lives, found out from outside.
//!
//! ```text
//!             QEMU's process is gone ───────────────► Dead (ended or panicked: the console says)
//!             QEMU says guest-panicked, paused… ────► Dead
//!   agent answers a ping ───────────────────────────► Well
//!   no answer, twice ───────────────────────────────► Dead (hung)
//! ```

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::agent::{self, AgentConnection};
use crate::console;
use crate::process::ProcessId;
use crate::qemu::QMP_SOCKET;
use crate::qmp::Qmp;

/// How long a healthy machine may take to answer when its processors are busy.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long it may take to answer the second time it is asked.
const LAST_CHANCE: Duration = Duration::from_secs(10);

/// How often a machine in use is asked.
const PING_EVERY: Duration = Duration::from_secs(5);

/// A panicking kernel writes its last words before QEMU ends.
const DYING_WORDS: Duration = Duration::from_secs(2);

/// What is needed to examine a running machine.
#[derive(Clone, Debug)]
pub(crate) struct Patient {
    pub(crate) qemu: ProcessId,
    pub(crate) directory: PathBuf,
    pub(crate) agent: SocketAddr,
    pub(crate) token: String,
}

/// Why a machine cannot be used any more, in words that complete "the machine died: …".
pub(crate) type CauseOfDeath = String;

impl Patient {
    pub(crate) fn console(&self) -> PathBuf {
        self.directory.join("console.log")
    }

    /// Examines the machine; takes at most about half a minute, and milliseconds when it is well.
    pub(crate) fn examine(&self) -> Result<(), CauseOfDeath> {
        for limit in [PATIENCE, LAST_CHANCE] {
            self.check_qemu()?;
            if agent::ping(self.agent, &self.token, limit).is_ok() {
                return Ok(());
            }
        }
        self.check_qemu()?;
        let sign = console::sign_of_death(&self.console());
        Err(match sign {
            Some(sign) => format!("it hung ({sign})"),
            None => format!("it hung (no answer within {} s)", (PATIENCE + LAST_CHANCE).as_secs()),
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
        let ended = self.qemu.open().is_none_or(|process| process.wait(DYING_WORDS));
        if ended { Err(self.why_ended()) } else { self.examine() }
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
    cause: Option<CauseOfDeath>,
}

impl Watchdog {
    /// Begins to watch `patient` on behalf of `connection`.
    pub(crate) fn set(patient: Patient, connection: AgentConnection) -> Self {
        let shared = Arc::new(Shared::default());
        let watch = Arc::clone(&shared);
        let thread = std::thread::spawn(move || watch.run(&patient, &connection));
        Self { shared, thread: Some(thread) }
    }

    /// Why the machine died, if that is what ended the connection.
    pub(crate) fn cause(&self) -> Option<CauseOfDeath> {
        self.shared.lock().cause.clone()
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

    fn run(&self, patient: &Patient, connection: &AgentConnection) {
        loop {
            let state = self.lock();
            let wait = self.over.wait_timeout_while(state, PING_EVERY, |state| !state.over);
            let (state, _) = wait.unwrap_or_else(PoisonError::into_inner);
            if state.over {
                return;
            }
            drop(state);
            if let Err(cause) = patient.examine() {
                self.lock().cause = Some(cause);
                connection.close();
                return;
            }
        }
    }
}
