//! Named tokens: the file that holds them, hashed, and what `forkd-controller token` does to it.
//!
//! A token is 32 random bytes. Nobody guesses one, with its hash or without, so a fast hash is as good as a slow
//! one here, and a slow one would make every request pay. Slow hashes are for what people think up.

use std::fs::{File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::Scope;

/// The version of the file's format.
const CURRENT: u32 = 1;

/// The largest file that is read.
const FILE_LIMIT: u64 = 1 << 20;

/// The longest name.
const NAME_LIMIT: usize = 64;

/// What every token begins with, so that scanners for leaked secrets know it.
const PREFIX: &str = "forkd_";

/// Random bytes of a token.
const SECRET_BYTES: usize = 32;

/// Why the named tokens cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum TokensError {
    /// A system call on the file failed.
    #[error("cannot {action} the tokens file {}", path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others may read or write it.
    #[error("the tokens file {} has mode {mode:04o}; others must not see it: chmod 0600 {}", path.display(), path.display())]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// It is not what this program writes.
    #[error("the tokens file {} cannot be used: {what}", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A name breaks the rule.
    #[error("{name:?} cannot name a token; use 1 to {NAME_LIMIT} letters, digits, dots, dashes and underscores")]
    BadName {
        /// The name.
        name: String,
    },
    /// The name is taken.
    #[error("there is a token {name} already; rotate it, or choose another name")]
    Taken {
        /// The name.
        name: String,
    },
    /// No token has the name.
    #[error("there is no token {name}; there {}", match .have.as_slice() { [] => "are none".to_owned(), have => format!("is {}", have.join(", ")) })]
    Unknown {
        /// The name.
        name: String,
        /// Those there are.
        have: Vec<String>,
    },
}

/// A token as the file keeps it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NamedToken {
    /// Its name, for people and the audit log.
    pub name: String,
    /// What it may do.
    pub scope: Scope,
    /// The BLAKE3 hash of its text, in hex.
    pub hash: TokenHash,
    /// When it, or its present secret, was made.
    pub created_at_unix: u64,
    /// The secret before, as long as it may still be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<PreviousSecret>,
}

/// The secret that a token had before it was rotated.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PreviousSecret {
    /// Its hash.
    pub hash: TokenHash,
    /// When it ends.
    pub until_unix: u64,
}

/// The hash of a token. Comparing two takes constant time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TokenHash(blake3::Hash);

impl TokenHash {
    /// The hash of the token `text`.
    pub fn of(text: &str) -> Self {
        Self(blake3::hash(text.as_bytes()))
    }

    pub(super) fn is(&self, presented: &blake3::Hash) -> bool {
        self.0 == *presented
    }
}

impl Serialize for TokenHash {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.0.to_hex().as_str())
    }
}

impl<'de> Deserialize<'de> for TokenHash {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        blake3::Hash::from_hex(&text).map(Self).map_err(serde::de::Error::custom)
    }
}

/// The content of a tokens file.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TokensFile {
    version: u32,
    tokens: Vec<NamedToken>,
}

impl TokensFile {
    /// Reads and checks the file at `path`.
    pub fn read(path: &Path) -> Result<Self, TokensError> {
        let failed = |source| TokensError::Io { action: "read", path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let mode = file.metadata().map_err(failed)?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(TokensError::Mode { path: path.to_owned(), mode });
        }
        let mut bytes = Vec::new();
        file.take(FILE_LIMIT + 1).read_to_end(&mut bytes).map_err(failed)?;
        Self::parse(&bytes).map_err(|what| TokensError::Broken { path: path.to_owned(), what })
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        if bytes.len() as u64 > FILE_LIMIT {
            return Err(format!("it has more than {FILE_LIMIT} bytes"));
        }
        let Versioned { version } = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if version != CURRENT {
            return Err(format!("it has version {version}; this program knows version {CURRENT}"));
        }
        let file: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        for (at, token) in file.tokens.iter().enumerate() {
            check_name(&token.name).map_err(|error| error.to_string())?;
            if file.tokens[..at].iter().any(|other| other.name == token.name) {
                return Err(format!("two tokens are called {}", token.name));
            }
        }
        Ok(file)
    }

    /// A file with no tokens in it.
    pub(super) fn none() -> Self {
        Self { version: CURRENT, tokens: Vec::new() }
    }

    /// The tokens in the order they were made.
    pub fn tokens(&self) -> &[NamedToken] {
        &self.tokens
    }

    fn find(&mut self, name: &str) -> Result<&mut NamedToken, TokensError> {
        match self.tokens.iter().position(|token| token.name == name) {
            Some(at) => Ok(&mut self.tokens[at]),
            None => {
                let have = self.tokens.iter().map(|token| token.name.clone()).collect();
                Err(TokensError::Unknown { name: name.to_owned(), have })
            }
        }
    }
}

/// A tokens file that is being changed; nobody else changes it meanwhile.
pub struct TokensEditor {
    path: PathBuf,
    content: TokensFile,
    _lock: File,
}

impl TokensEditor {
    /// Opens the file at `path`. With `create`, one that is missing begins empty.
    pub fn open(path: &Path, create: bool) -> Result<Self, TokensError> {
        let io = |action| move |source| TokensError::Io { action, path: path.to_owned(), source };
        // A link stays one; what it names is replaced.
        let path_there = match std::fs::canonicalize(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && create => path.to_owned(),
            resolved => resolved.map_err(io("find"))?,
        };
        // The directory is the lock: the file itself is another one after each change.
        let lock = File::open(directory_of(&path_there)).map_err(io("open the directory of"))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).map_err(|error| io("lock")(error.into()))?;
        let content = match TokensFile::read(&path_there) {
            Err(TokensError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound && create => {
                TokensFile::none()
            }
            content => content?,
        };
        Ok(Self { path: path_there, content, _lock: lock })
    }

    /// Adds a token and returns its text, which nothing else keeps.
    pub fn create(&mut self, name: &str, scope: Scope) -> Result<String, TokensError> {
        check_name(name)?;
        if self.content.tokens.iter().any(|token| token.name == name) {
            return Err(TokensError::Taken { name: name.to_owned() });
        }
        let text = self.fresh_secret()?;
        let hash = TokenHash::of(&text);
        let token = NamedToken { name: name.to_owned(), scope, hash, created_at_unix: unix_now(), previous: None };
        self.content.tokens.push(token);
        self.save()?;
        Ok(text)
    }

    /// Gives a token another text, which is returned; the old one is good for `overlap_secs` more.
    pub fn rotate(&mut self, name: &str, overlap_secs: u64) -> Result<String, TokensError> {
        let text = self.fresh_secret()?;
        let (token, now) = (self.content.find(name)?, unix_now());
        let previous = PreviousSecret { hash: token.hash, until_unix: now.saturating_add(overlap_secs) };
        token.previous = (overlap_secs > 0).then_some(previous);
        (token.hash, token.created_at_unix) = (TokenHash::of(&text), now);
        self.save()?;
        Ok(text)
    }

    /// Removes a token.
    pub fn revoke(&mut self, name: &str) -> Result<(), TokensError> {
        self.content.find(name)?;
        self.content.tokens.retain(|token| token.name != name);
        self.save()
    }

    fn fresh_secret(&self) -> Result<String, TokensError> {
        let mut bytes = [0; SECRET_BYTES];
        let mut filled = 0;
        while filled < bytes.len() {
            let more = rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty());
            filled += more.map_err(|error| TokensError::Io {
                action: "find random bytes for",
                path: self.path.clone(),
                source: error.into(),
            })?;
        }
        let hex = bytes.iter().map(|byte| format!("{byte:02x}"));
        Ok(std::iter::once(PREFIX.to_owned()).chain(hex).collect())
    }

    /// Puts the content in the file's place, whole or not at all.
    fn save(&self) -> Result<(), TokensError> {
        let write = || -> io::Result<()> {
            let directory = directory_of(&self.path);
            let mut text = serde_json::to_vec_pretty(&self.content)?;
            text.push(b'\n');
            let mut fresh = tempfile::NamedTempFile::new_in(directory)?;
            fresh.write_all(&text)?;
            fresh.as_file().set_permissions(Permissions::from_mode(0o600))?;
            if let Ok(old) = std::fs::metadata(&self.path) {
                // An administrator may edit what the daemon's own user reads.
                std::os::unix::fs::fchown(fresh.as_file(), Some(old.uid()), Some(old.gid()))?;
            }
            fresh.as_file().sync_all()?;
            fresh.persist(&self.path).map_err(|error| error.error)?;
            File::open(directory)?.sync_all()
        };
        write().map_err(|source| TokensError::Io { action: "write", path: self.path.clone(), source })
    }
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn check_name(name: &str) -> Result<(), TokensError> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    match (1..=NAME_LIMIT).contains(&name.len()) && name.bytes().all(legal) {
        true => Ok(()),
        false => Err(TokensError::BadName { name: name.to_owned() }),
    }
}

/// Seconds since the Unix epoch.
pub(super) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("tokens.json");
        (dir, path)
    }

    #[test]
    fn tokens_are_made_rotated_and_revoked_and_only_hashes_are_kept() {
        let (_dir, path) = scratch();
        let mut editor = TokensEditor::open(&path, true).expect("empty");
        let first = editor.create("ci", Scope::Spawn).expect("created");
        let other = editor.create("dash.board-2", Scope::Read).expect("created");
        assert!(first.len() == 70 && first.starts_with("forkd_") && first != other, "{first}");
        assert!(matches!(editor.create("ci", Scope::Read), Err(TokensError::Taken { .. })));
        drop(editor);
        let text = std::fs::read_to_string(&path).expect("written");
        assert!(!text.contains(&first[6..]) && text.contains("\"spawn\""), "{text}");
        assert_eq!(std::fs::metadata(&path).expect("there").mode() & 0o7777, 0o600);

        let second = TokensEditor::open(&path, false).expect("there").rotate("ci", 60).expect("rotated");
        let file = TokensFile::read(&path).expect("good");
        let ci = &file.tokens()[0];
        assert!(ci.hash == TokenHash::of(&second));
        assert!(ci.previous.as_ref().is_some_and(|old| old.hash == TokenHash::of(&first)), "{ci:?}");

        let mut editor = TokensEditor::open(&path, false).expect("there");
        editor.revoke("ci").expect("there");
        let error = editor.revoke("ci").expect_err("gone").to_string();
        assert!(error.contains("dash.board-2"), "{error}");
        assert_eq!(TokensFile::read(&path).expect("good").tokens().len(), 1);
        assert_eq!(path.parent().expect("dir").read_dir().expect("list").count(), 1, "nothing else is left");
    }

    #[test]
    fn a_file_that_others_may_read_is_refused() {
        let (_dir, path) = scratch();
        std::fs::write(&path, r#"{"version":1,"tokens":[]}"#).expect("write");
        for (mode, good) in [(0o644, false), (0o640, false), (0o602, false), (0o600, true), (0o400, true)] {
            std::fs::set_permissions(&path, Permissions::from_mode(mode)).expect("chmod");
            assert_eq!(TokensFile::read(&path).is_ok(), good, "{mode:o}");
        }
    }

    #[test]
    fn broken_files_are_refused_with_what_is_wrong() {
        let hash = TokenHash::of("x").0.to_hex().to_string();
        let one = |name: &str| format!(r#"{{"name":"{name}","scope":"read","hash":"{hash}","created_at_unix":1}}"#);
        let parse = |text: String| TokensFile::parse(text.as_bytes());
        let good = format!(r#"{{"version":1,"tokens":[{},{}],"later":0}}"#, one("a"), one("b"));
        assert_eq!(parse(good).expect("good").tokens().len(), 2);
        for (text, says) in [
            (String::new(), "EOF"),
            (r#"{"version":2,"tokens":[]}"#.to_owned(), "version 2"),
            (r#"{"version":1}"#.to_owned(), "tokens"),
            (format!(r#"{{"version":1,"tokens":[{},{}]}}"#, one("a"), one("a")), "two tokens"),
            (format!(r#"{{"version":1,"tokens":[{}]}}"#, one("a b")), "letters"),
            (format!(r#"{{"version":1,"tokens":[{}]}}"#, one("a").replace("read", "root")), "root"),
            (format!(r#"{{"version":1,"tokens":[{}]}}"#, one("a").replace(&hash, "12")), "hex"),
            (" ".repeat(FILE_LIMIT as usize + 1), "more than"),
        ] {
            let error = parse(text.clone()).expect_err(says).to_lowercase();
            assert!(error.contains(&says.to_lowercase()), "{error}");
        }
    }

    #[test]
    fn names_are_checked_at_their_edges() {
        for good in ["a", "A.b-c_9", &"x".repeat(64)] {
            check_name(good).expect(good);
        }
        for bad in ["", "a b", "a/b", "ä", "a\n", &"x".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }
}
