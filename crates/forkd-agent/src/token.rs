//! The shared secret of TCP connections.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// A secret that clients must show. Only its digest is kept, so that comparing takes the same time
/// whatever the offered text and its length.
#[derive(Clone)]
pub struct Token([u8; 32]);

/// Why there is no usable token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file cannot be read.
    #[error("cannot read the token file {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file holds white space only.
    #[error("the token file {} is empty; it must hold the token clients will show", .0.display())]
    Empty(PathBuf),
}

impl Token {
    /// Reads the token from `path`; white space around it does not count.
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let text = fs::read_to_string(path).map_err(|source| TokenError::Read { path: path.into(), source })?;
        match text.trim() {
            "" => Err(TokenError::Empty(path.into())),
            token => Ok(Self::new(token)),
        }
    }

    /// The token that is `text`.
    pub fn new(text: &str) -> Self {
        Self(Sha256::digest(text.as_bytes()).into())
    }

    /// Whether `offered` is the token.
    pub fn matches(&self, offered: &str) -> bool {
        let offered: [u8; 32] = Sha256::digest(offered.as_bytes()).into();
        let differences = self.0.iter().zip(offered).fold(0, |sum, (a, b)| sum | (a ^ b));
        std::hint::black_box(differences) == 0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Token(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_token_matches() {
        let token = Token::new("secret");
        assert!(token.matches("secret"));
        assert!(!token.matches("secre") && !token.matches("secrets") && !token.matches(""));
        assert!(!format!("{token:?}").contains("secret"));
    }

    #[test]
    fn an_empty_file_is_no_token() {
        let file = tempfile::NamedTempFile::new().expect("temporary file");
        fs::write(file.path(), " \n").expect("write");
        assert!(matches!(Token::read(file.path()), Err(TokenError::Empty(_))));
        fs::write(file.path(), " abc\n").expect("write");
        assert!(Token::read(file.path()).expect("token").matches("abc"));
        assert!(matches!(Token::read(Path::new("/nonexistent/token")), Err(TokenError::Read { .. })));
    }
}
