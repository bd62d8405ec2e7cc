//! The tokens in force, and their replacement while requests are under way.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use super::bearer::Token;
use super::scope::Scope;
use super::tokens::{TokensError, TokensFile, unix_now};

/// Everything that a bearer token may be. Clones share it.
#[derive(Clone, Debug)]
pub struct Keyring(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// The token of the token file.
    single: Option<Token>,
    /// The file of named tokens.
    path: Option<PathBuf>,
    named: RwLock<Arc<TokensFile>>,
}

/// Whose token it is, and what it may do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Holder {
    /// None for the token of the token file.
    pub(super) name: Option<String>,
    pub(super) scope: Scope,
}

impl Keyring {
    /// The token of a token file, the tokens of a tokens file, or both.
    pub fn open(single: Option<Token>, path: Option<PathBuf>) -> Result<Self, TokensError> {
        let named = path.as_deref().map(TokensFile::read).transpose()?.unwrap_or_else(TokensFile::none);
        Ok(Self(Arc::new(Inner { single, path, named: RwLock::new(Arc::new(named)) })))
    }

    /// The file of named tokens, if there is one.
    pub fn path(&self) -> Option<&PathBuf> {
        self.0.path.as_ref()
    }

    /// Whether there is no token at all, so that nobody gets in.
    pub fn is_empty(&self) -> bool {
        self.0.single.is_none() && self.named().tokens().is_empty()
    }

    /// Reads the named tokens anew; returns how many there are. When the file is not good, those known so far stay
    /// in force.
    pub fn reload(&self) -> Result<usize, TokensError> {
        let Some(path) = &self.0.path else { return Ok(0) };
        let fresh = TokensFile::read(path)?;
        let count = fresh.tokens().len();
        *self.0.named.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(fresh);
        Ok(count)
    }

    /// Whose token `presented` is. It is compared with all of them, whichever it is, and only as a hash: the time
    /// this takes tells nothing of any token.
    pub(super) fn holder(&self, presented: &str) -> Option<Holder> {
        let hash = blake3::hash(presented.as_bytes());
        let mut found = None;
        if self.0.single.as_ref().is_some_and(|token| token.has_hash(&hash)) {
            found = Some(Holder { name: None, scope: Scope::Admin });
        }
        let (named, now) = (self.named(), unix_now());
        for token in named.tokens() {
            let before = token.previous.as_ref().filter(|old| now < old.until_unix);
            let is = token.hash.is(&hash) | before.is_some_and(|old| old.hash.is(&hash));
            if is {
                found = Some(Holder { name: Some(token.name.clone()), scope: token.scope });
            }
        }
        found
    }

    fn named(&self) -> Arc<TokensFile> {
        Arc::clone(&self.0.named.read().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tokens::TokensEditor;
    use super::*;

    #[test]
    fn changes_of_the_file_take_force_and_broken_ones_do_not() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("tokens.json");
        let text = TokensEditor::open(&path, true).expect("empty").create("ci", Scope::Spawn).expect("created");
        let keyring = Keyring::open(None, Some(path.clone())).expect("good");
        let scope_of = |text: &str| keyring.holder(text).map(|holder| holder.scope);
        assert_eq!(keyring.holder(&text), Some(Holder { name: Some("ci".to_owned()), scope: Scope::Spawn }));
        assert_eq!((scope_of(""), scope_of(&text[..69])), (None, None));

        let good = std::fs::read(&path).expect("read");
        std::fs::write(&path, "{").expect("write");
        keyring.reload().expect_err("broken");
        assert_eq!(scope_of(&text), Some(Scope::Spawn), "what was known stays");
        std::fs::write(&path, good).expect("write");

        let overlapping = TokensEditor::open(&path, false).expect("there").rotate("ci", 3600).expect("rotated");
        assert_eq!(keyring.reload().expect("good"), 1);
        assert_eq!((scope_of(&text), scope_of(&overlapping)), (Some(Scope::Spawn), Some(Scope::Spawn)));
        let last = TokensEditor::open(&path, false).expect("there").rotate("ci", 0).expect("rotated");
        keyring.reload().expect("good");
        assert_eq!((scope_of(&overlapping), scope_of(&last)), (None, Some(Scope::Spawn)));
        TokensEditor::open(&path, false).expect("there").revoke("ci").expect("there");
        keyring.reload().expect("good");
        assert!(keyring.is_empty() && scope_of(&last).is_none());
    }
}
