//! The life of a sandbox: which states there are, and which steps lead from which to which.
//!
//! ```text
//!            fork sent                 agent answered                machine ended by itself
//! (nothing) ──────────► starting ───────────────────► running ───────────────────────────────► stopped
//!                          │ failure, deadline,        │ ▲ ▲ └─ rewound ─┘         rewound      │ ▲
//!                          │ caller gone               │ │ └────────────────────────────────────┘ │
//!                          │              being put on │ │ could not be,                          │
//!                          │              disk         ▼ │ runs on          on disk, or machine   │
//!                          │                        suspending ───────────────────────────────────┘
//!                          ▼                           │              ended by itself             │
//!                      (nothing) ◄── removed, from any of these; one that stopped, after a while ─┘
//! ```
//!
//! *Starting* is a [`Newborn`](crate::sandbox::Newborn), which becomes a sandbox only by being consumed, and undoes
//! itself when dropped. *Nothing* is not being in the [`Roster`](crate::sandbox::Roster). What lies between is a
//! [`Condition`], which changes by a [`Step`] alone and says no to one that does not belong.
//!
//! A machine that is suspending stands still: its process is stopped, so that nothing that happens after the instant
//! that is put on disk can be lost with it.

use forkd_types::rest::EndCode;

/// How a sandbox's machine ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct End {
    /// For programs.
    pub(crate) code: EndCode,
    /// What it did, as a predicate: `was powered off`.
    pub(crate) reason: String,
}

impl End {
    /// It is gone and nobody can say more than `reason`.
    pub(crate) fn lost(reason: impl Into<String>) -> Self {
        Self { code: EndCode::Lost, reason: reason.into() }
    }
}

/// What a sandbox in the roster is doing. `M` is what drives its machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Condition<M> {
    /// Its guest runs.
    Running(M),
    /// Its machine stands still while it is put on disk.
    Suspending(M),
    /// It has no machine.
    Stopped { end: End, at_unix: u64 },
}

/// What can happen to a sandbox in the roster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Step<M> {
    /// It is going to be put on disk, and stands still.
    Suspend,
    /// It was not put on disk, and goes on.
    GoOn,
    /// It has no machine any more.
    Stop { end: End, at_unix: u64 },
    /// It has another machine.
    Replace(M),
}

/// Why a step does not belong.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Refusal {
    /// It needs a machine, and that ended like this.
    Stopped(End),
    /// It needs one that does not stand still.
    Suspending,
    /// Nothing is being put on disk.
    NotSuspending,
}

impl<M: Clone> Condition<M> {
    /// Its machine, whatever that is doing.
    pub(crate) fn machine(&self) -> Option<&M> {
        match self {
            Self::Running(machine) | Self::Suspending(machine) => Some(machine),
            Self::Stopped { .. } => None,
        }
    }

    /// Its machine, if its guest runs.
    pub(crate) fn running(&self) -> Result<&M, Refusal> {
        match self {
            Self::Running(machine) => Ok(machine),
            Self::Suspending(_) => Err(Refusal::Suspending),
            Self::Stopped { end, .. } => Err(Refusal::Stopped(end.clone())),
        }
    }

    /// What it is after `step`.
    ///
    /// # Errors
    /// It is as it was.
    pub(crate) fn after(&self, step: Step<M>) -> Result<Self, Refusal> {
        match (self, step) {
            (Self::Running(machine), Step::Suspend) => Ok(Self::Suspending(machine.clone())),
            (Self::Suspending(machine), Step::GoOn) => Ok(Self::Running(machine.clone())),
            (Self::Running(_) | Self::Suspending(_), Step::Stop { end, at_unix }) => Ok(Self::Stopped { end, at_unix }),
            (Self::Running(_) | Self::Stopped { .. }, Step::Replace(machine)) => Ok(Self::Running(machine)),
            (Self::Suspending(_), Step::Suspend | Step::Replace(_)) => Err(Refusal::Suspending),
            (Self::Running(_), Step::GoOn) => Err(Refusal::NotSuspending),
            (Self::Stopped { end, .. }, Step::Suspend | Step::GoOn | Step::Stop { .. }) => {
                Err(Refusal::Stopped(end.clone()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_step() -> impl Strategy<Value = Step<u8>> {
        prop_oneof![
            Just(Step::Suspend),
            Just(Step::GoOn),
            any::<u64>().prop_map(|at_unix| Step::Stop { end: End::lost("ended"), at_unix }),
            any::<u8>().prop_map(Step::Replace),
        ]
    }

    proptest! {
        #[test]
        fn no_step_loses_a_machine_or_wakes_what_stands_still(steps in prop::collection::vec(any_step(), 0..40)) {
            let mut now = Condition::Running(0);
            for step in steps {
                let Ok(next) = now.after(step.clone()) else { continue };
                match (&now, &next) {
                    // A machine goes by stopping or by being replaced, and comes by being replaced alone.
                    (before, after) if before.machine() != after.machine() => {
                        let changes_it = matches!(step, Step::Stop { .. } | Step::Replace(_));
                        prop_assert!(changes_it);
                    }
                    (Condition::Suspending(_), Condition::Running(_)) => prop_assert_eq!(&step, &Step::GoOn),
                    _ => {}
                }
                let woken = matches!(now, Condition::Suspending(_)) && matches!(step, Step::Replace(_));
                prop_assert!(!woken);
                now = next;
            }
        }
    }

    #[test]
    fn what_stopped_comes_back_by_a_rewind_alone() {
        let stopped = Condition::Stopped { end: End::lost("was struck"), at_unix: 1 };
        let again = Step::Stop { end: End::lost("again"), at_unix: 2 };
        for step in [Step::Suspend, Step::GoOn, again] {
            assert_eq!(stopped.after(step), Err(Refusal::Stopped(End::lost("was struck"))), "the first reason stays");
        }
        assert_eq!(stopped.after(Step::Replace(7)), Ok(Condition::Running(7)));
    }

    #[test]
    fn a_second_suspend_is_refused() {
        let suspending = Condition::Running(7).after(Step::Suspend).expect("it runs");
        assert_eq!(suspending.after(Step::Suspend), Err(Refusal::Suspending));
        assert_eq!(suspending.running(), Err(Refusal::Suspending));
        assert_eq!(suspending.machine(), Some(&7));
    }
}
