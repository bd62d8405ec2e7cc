//! What all requests share.

use std::io;
use std::sync::Arc;

use crate::environment::Environment;
use crate::exec::discard::Discarder;
use crate::identity::CurrentIdentity;
use crate::reaper::Reaper;
use crate::runtimes::Runtimes;

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
    pub identity: CurrentIdentity,
}

impl Agent {
    /// Starts what runs in the background.
    pub fn start(role: Role) -> io::Result<Arc<Self>> {
        let environment = Arc::new(match role {
            Role::Init => Environment::of_guest(),
            Role::Program => Environment::inherited(),
        });
        let reaper = Reaper::start()?;
        Ok(Arc::new(Self {
            role,
            runtimes: Runtimes::new(Arc::clone(&environment), Arc::clone(&reaper)),
            environment,
            discarder: Discarder::start()?,
            reaper,
            identity: CurrentIdentity::default(),
        }))
    }
}
