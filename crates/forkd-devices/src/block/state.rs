//! What a block device saves beside its transport; the bytes of the disk are kept as layers.

use serde::{Deserialize, Serialize};

/// The saved state of a [`Block`](super::Block).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BlockState {
    /// What GET_ID answers.
    pub serial: String,
}
