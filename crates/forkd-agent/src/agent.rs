//! What all requests share.

use std::io;
use std::sync::{Arc, OnceLock};

use crate::environment::Environment;
use crate::exec::discard::Discarder;
use crate::identity::CurrentIdentity;
use crate::reaper::Reaper;
use crate::runtimes::Runtimes;
use crate::warmup::Warmup;

/// What this agent is to the system it runs in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// PID 1 of a guest: identity and power are its to change.
    Init,
    /// An ordinary program among others.
    Program,
}

/// The state behind every connection.
#[derive(Debug)]
pub struct Agent {
    /// PID 1 or not.
    pub role: Role,
    /// The environment that programs start with.
    pub environment: Arc<Environment>,
    /// Waits for every process.
    pub reaper: Arc<Reaper>,
    /// Drains abandoned output.
    pub discarder: Arc<Discarder>,
    /// Warm interpreters.
    pub runtimes: Runtimes,
    /// Who this copy is.
    pub identity: Arc<CurrentIdentity>,
    /// The image's warm-up program, once it is ready.
    pub warmup: OnceLock<Warmup>,
}

impl Agent {
    /// The warm-up program, if there is one that evaluates code.
    pub fn evaluating_warmup(&self) -> Option<&Warmup> {
        self.warmup.get().filter(|warmup| warmup.evaluates())
    }

    /// Starts what runs in the background.
    pub fn start(role: Role) -> io::Result<Arc<Self>> {
        let environment = Arc::new(match role {
            Role::Init => Environment::of_guest(),
            Role::Program => Environment::inherited(),
        });
        let reaper = Reaper::start()?;
        let identity = Arc::new(CurrentIdentity::default());
        Ok(Arc::new(Self {
            role,
            runtimes: Runtimes::new(Arc::clone(&environment), Arc::clone(&reaper), Arc::clone(&identity)),
            environment,
            discarder: Discarder::start()?,
            reaper,
            identity,
            warmup: OnceLock::new(),
        }))
    }
}
