//! The barrier at which vCPU threads stand still.
//!
//! ```text
//!            kick, wanted                all parked                 guard dropped
//! running ───────────────► leaving ─────────────────► standing ───────────────────► running
//!    │                        │ deadline passes: the guard is dropped ──────────────►│
//!    └── a vCPU cannot go on: retired, for ever
//! ```
//!
//! A thread parks only after its vCPU was kicked out of the guest, when its registers are whole, and
//! deposits its state before it parks: eight vCPUs save themselves at the same time.

use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use forkd_kvm::{Kicker, KvmError, VcpuState};

/// Why the machine does not stand still.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// A vCPU did not leave the guest in time.
    #[error("{running} of {total} vCPUs did not leave the guest within {deadline:?}")]
    Deadline {
        /// How many did not.
        running: usize,
        /// How many there are.
        total: usize,
        /// How long was waited.
        deadline: Duration,
    },
    /// A vCPU's state cannot be read.
    #[error("cannot save vCPU {index}")]
    Save {
        /// Which.
        index: usize,
        /// Why.
        source: KvmError,
    },
    /// A vCPU has stopped for good.
    #[error("the machine has stopped")]
    Stopped,
}

#[derive(Debug, Default)]
struct Inner {
    wanted: bool,
    /// Bumped with every resume, so that a parked thread cannot mistake the next pause for its own.
    round: u64,
    parked: usize,
    retired: usize,
    states: Vec<Option<Result<VcpuState, KvmError>>>,
}

/// The barrier of one machine.
#[derive(Debug)]
pub struct Gate {
    inner: Mutex<Inner>,
    arrived: Condvar,
    opened: Condvar,
    kickers: Vec<Kicker>,
}

/// Proof that every vCPU stands still; they go on when it is dropped.
#[derive(Debug)]
pub struct Paused<'a> {
    gate: &'a Gate,
}

impl Gate {
    /// A gate for the vCPUs that `kickers` reach, in order.
    pub fn new(kickers: Vec<Kicker>) -> Self {
        let states = kickers.iter().map(|_| None).collect();
        let inner = Mutex::new(Inner { states, ..Inner::default() });
        Self { inner, arrived: Condvar::new(), opened: Condvar::new(), kickers }
    }

    /// The kicker of vCPU `index`.
    pub fn kicker(&self, index: usize) -> &Kicker {
        &self.kickers[index]
    }

    /// Stops all vCPUs and collects their states. Whatever goes wrong, those that stopped go on.
    pub fn pause(&self, deadline: Duration) -> Result<(Paused<'_>, Vec<VcpuState>), PauseError> {
        let until = Instant::now() + deadline;
        self.lock().wanted = true;
        let paused = Paused { gate: self };
        self.kickers.iter().for_each(Kicker::kick);
        let total = self.kickers.len();
        let mut inner = self.lock();
        while inner.parked + inner.retired < total {
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                let running = total - inner.parked - inner.retired;
                drop(inner);
                return Err(PauseError::Deadline { running, total, deadline });
            };
            inner = self.arrived.wait_timeout(inner, left).expect("no thread panics while holding it").0;
        }
        if inner.retired > 0 {
            drop(inner);
            return Err(PauseError::Stopped);
        }
        let deposited: Result<Vec<_>, _> = inner
            .states
            .iter_mut()
            .enumerate()
            .map(|(index, slot)| {
                let state = slot.take().expect("a parked vCPU has deposited its state");
                state.map_err(|source| PauseError::Save { index, source })
            })
            .collect();
        drop(inner);
        Ok((paused, deposited?))
    }

    /// Called by the thread of vCPU `index` after a kick: stands still while a pause is wanted.
    pub fn visit(&self, index: usize, save: impl FnOnce() -> Result<VcpuState, KvmError>) {
        if self.lock().wanted {
            let state = save();
            let mut inner = self.lock();
            // The pause may have been given up while the state was being read.
            if inner.wanted {
                let round = inner.round;
                inner.states[index] = Some(state);
                inner.parked += 1;
                self.arrived.notify_one();
                while inner.round == round {
                    inner = self.opened.wait(inner).expect("no thread panics while holding it");
                }
            }
        }
        self.kickers[index].clear();
        // A pause that began between opening and clearing has had its kick cleared: kick again.
        if self.lock().wanted {
            self.kickers[index].kick();
        }
    }

    /// Called by a vCPU's thread when it cannot go on; never returns.
    pub fn retire(&self) -> ! {
        let mut inner = self.lock();
        inner.retired += 1;
        self.arrived.notify_one();
        loop {
            inner = self.opened.wait(inner).expect("no thread panics while holding it");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no thread panics while holding it")
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        let mut inner = self.gate.lock();
        inner.wanted = false;
        inner.round += 1;
        inner.parked = 0;
        inner.states.iter_mut().for_each(|slot| *slot = None);
        self.gate.opened.notify_all();
    }
}
