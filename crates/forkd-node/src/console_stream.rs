//! A sandbox's console as it grows.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::console::Follower;
use crate::sandbox::Sandbox;

/// How often a console that is silent is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What a sandbox's guest writes to its console, from some point on until its machine ends.
pub struct ConsoleStream {
    follower: Follower,
    sandbox: Arc<Sandbox>,
}

impl ConsoleStream {
    pub(crate) fn new(follower: Follower, sandbox: Arc<Sandbox>) -> Self {
        Self { follower, sandbox }
    }

    /// The next piece; none when the machine has ended and everything was told.
    pub async fn next(&mut self) -> io::Result<Option<String>> {
        loop {
            let ended = self.sandbox.machine().is_none();
            match self.follower.take() {
                Ok(piece) if !piece.is_empty() => return Ok(Some(piece)),
                Ok(_) => {}
                // The file goes with its sandbox.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            }
            if ended {
                return Ok(None);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}
