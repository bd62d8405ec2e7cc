//! Sandbox identities: `sb-<unix seconds, hex>-<sequence, hex>`, as existing clients know them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The identity of one sandbox, unique on its host for ever.
///
/// Text form: `sb-` + the creation time in seconds (lower-case hex) + `-` + a sequence number of at
/// least four hex digits. Parsing accepts whatever a path or URL segment may safely hold, because
/// the identity is looked up and never taken apart.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(value_type = String, example = "sb-6b02c814-0000"))]
#[serde(try_from = "String", into = "String")]
pub struct SandboxId(String);

/// Why a text is not a sandbox id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a sandbox id; ids look like \"sb-6b02c814-0000\" (`forkd ls` lists them)")]
pub struct SandboxIdError {
    text: String,
}

impl SandboxId {
    /// The id of the `sequence`-th sandbox, created at `unix_seconds`.
    pub fn new(unix_seconds: u64, sequence: u64) -> Self {
        Self(format!("sb-{unix_seconds:x}-{sequence:04x}"))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for SandboxId {
    type Err = SandboxIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let legal = |c: u8| c.is_ascii_alphanumeric() || c == b'-' || c == b'_';
        if text.is_empty() || text.len() > 64 || !text.bytes().all(legal) {
            return Err(SandboxIdError { text: text.to_owned() });
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for SandboxId {
    type Error = SandboxIdError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<SandboxId> for String {
    fn from(id: SandboxId) -> Self {
        id.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_the_known_shape() {
        assert_eq!(SandboxId::new(0x6b02_c814, 0).as_str(), "sb-6b02c814-0000");
        assert_eq!(SandboxId::new(1, 0x1_0000).as_str(), "sb-1-10000");
    }

    #[test]
    fn ids_that_could_leave_a_path_are_refused() {
        for bad in ["", "..", "a/b", "a b", "a\n", "sb-é", &"x".repeat(65)] {
            assert!(bad.parse::<SandboxId>().is_err(), "{bad:?}");
        }
    }
}
