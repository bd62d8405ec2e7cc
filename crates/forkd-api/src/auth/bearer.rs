//! The token file: one token, with every right.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The shortest token, in bytes.
const SHORTEST: usize = 16;

/// Texts that documentation puts where a token belongs.
const PLACEHOLDERS: [&str; 2] = ["REPLACE_ME", "CHANGE_ME"];

/// Why a token file is not usable.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// It cannot be read.
    #[error("cannot read the token file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It holds nothing.
    #[error("the token file {} is empty; put at least {SHORTEST} random bytes into it", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// It holds too little.
    #[error("the token in {} has {len} bytes; at least {SHORTEST} are needed", path.display())]
    Short {
        /// The file.
        path: PathBuf,
        /// How many bytes it has.
        len: usize,
    },
    /// It still holds what an example put there.
    #[error("the token in {} is a placeholder; put a random one into it, as `openssl rand -hex 32` makes", path.display())]
    Placeholder {
        /// The file.
        path: PathBuf,
    },
}

/// The token of a token file; only its hash is kept.
#[derive(Clone, Debug)]
pub struct Token(Arc<blake3::Hash>);

impl Token {
    /// Reads the token file, once.
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let path = path.to_owned();
        match std::fs::read_to_string(&path) {
            Ok(text) => Self::check(text.trim(), path),
            Err(source) => Err(TokenError::Read { path, source }),
        }
    }

    fn check(text: &str, path: PathBuf) -> Result<Self, TokenError> {
        if text.is_empty() {
            Err(TokenError::Empty { path })
        } else if PLACEHOLDERS.iter().any(|placeholder| text.starts_with(placeholder)) {
            Err(TokenError::Placeholder { path })
        } else if text.len() < SHORTEST {
            Err(TokenError::Short { path, len: text.len() })
        } else {
            Ok(Self(Arc::new(blake3::hash(text.as_bytes()))))
        }
    }

    /// Whether `presented` is the hash of the token. Hashes have one length, and comparing two of them takes
    /// constant time.
    pub(super) fn has_hash(&self, presented: &blake3::Hash) -> bool {
        *presented == *self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> Result<Token, TokenError> {
        Token::check(text, "/t".into())
    }

    #[test]
    fn weak_tokens_are_refused() {
        assert!(matches!(check(""), Err(TokenError::Empty { .. })));
        assert!(matches!(check("fifteen-bytes-x"), Err(TokenError::Short { len: 15, .. })));
        assert!(matches!(check("REPLACE_ME_with_a_random_one"), Err(TokenError::Placeholder { .. })));
        assert!(matches!(check("CHANGE_ME"), Err(TokenError::Placeholder { .. })));
    }

    #[test]
    fn only_the_token_is_accepted() {
        let token = check("0123456789abcdef").expect("long enough");
        assert!(token.has_hash(&blake3::hash(b"0123456789abcdef")));
        for other in ["", "0123456789abcde", "0123456789abcdef0", "0123456789abcdeF"] {
            assert!(!token.has_hash(&blake3::hash(other.as_bytes())), "{other}");
        }
    }
}
