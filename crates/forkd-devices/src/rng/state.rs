//! What an entropy device saves: nothing; every copy draws from the host.

use serde::{Deserialize, Serialize};

/// The saved state of a [`Rng`](super::Rng).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct RngState {}
