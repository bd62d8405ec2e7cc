//! What a balloon saves.

use serde::{Deserialize, Serialize};

/// The saved state of a [`Balloon`](super::Balloon).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct BalloonState {
    /// Pages the host wants in the balloon.
    pub target_pages: u32,
    /// Pages the driver says are in it.
    pub actual_pages: u32,
}
