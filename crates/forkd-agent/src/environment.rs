//! The environment that every program in the guest starts with.
//!
//! Built once, from fixed defaults and the image's own wishes in `/etc/forkd/environment`
//! (`KEY=VALUE` lines); taking on an identity adds `FORKD_SANDBOX_ID`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::RwLock;

use crate::poison;

/// Where an image says what its programs want in their environment.
pub const IMAGE_ENVIRONMENT: &str = "/etc/forkd/environment";

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The base environment.
#[derive(Debug)]
pub struct Environment(RwLock<BTreeMap<String, String>>);

impl Environment {
    /// The environment of a guest: nothing is taken over from the kernel's command line.
    pub fn of_guest() -> Self {
        let mut variables = BTreeMap::from([
            ("HOME".to_owned(), "/root".to_owned()),
            ("LANG".to_owned(), "C.UTF-8".to_owned()),
            ("PATH".to_owned(), DEFAULT_PATH.to_owned()),
        ]);
        if let Ok(text) = fs::read_to_string(IMAGE_ENVIRONMENT) {
            variables.extend(parse(&text));
        }
        Self(RwLock::new(variables))
    }

    /// The environment of this process, for an agent that is an ordinary program.
    pub fn inherited() -> Self {
        let mut variables: BTreeMap<_, _> = std::env::vars().collect();
        variables.entry("PATH".to_owned()).or_insert_with(|| DEFAULT_PATH.to_owned());
        Self(RwLock::new(variables))
    }

    /// Sets a variable for programs started from now on.
    pub fn set(&self, name: &str, value: &str) {
        poison::write(&self.0).insert(name.to_owned(), value.to_owned());
    }

    /// One variable.
    pub fn get(&self, name: &str) -> Option<String> {
        poison::read(&self.0).get(name).cloned()
    }

    /// All variables, with `additions` laid over them in order.
    pub fn with(&self, additions: &[(String, String)]) -> BTreeMap<String, String> {
        let mut variables = poison::read(&self.0).clone();
        variables.extend(additions.iter().cloned());
        variables
    }
}

/// Variables of a `KEY=VALUE` file: empty lines and `#` comments are skipped, one pair of matching
/// quotes around a value is taken off.
pub fn parse(text: &str) -> Vec<(String, String)> {
    text.lines()
        .filter_map(|line| {
            let line = line.trim();
            let (name, value) = line.split_once('=').filter(|_| !line.starts_with('#'))?;
            let name = name.trim().trim_start_matches("export ").trim();
            let value = value.trim();
            let unquoted =
                ['"', '\''].iter().find_map(|quote| value.strip_prefix(*quote)?.strip_suffix(*quote)).unwrap_or(value);
            (!name.is_empty()).then(|| (name.to_owned(), unquoted.to_owned()))
        })
        .collect()
}

/// Why a program cannot be started.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LookupError {
    /// Nothing of that name.
    #[error("no such program: {name:?} is in none of the directories of PATH ({path})")]
    NotInPath {
        /// What was looked for.
        name: String,
        /// Where.
        path: String,
    },
    /// A file is there but it is not executable.
    #[error("{} is not an executable file", .0.display())]
    NotExecutable(PathBuf),
    /// The program was named by its path and is not there.
    #[error("no such program: {} does not exist", .0.display())]
    Missing(PathBuf),
}

/// Finds the program that `name` means under `search_path`, as a shell would; a name with a slash is
/// a path, relative to `directory`.
pub fn find_program(name: &str, search_path: &str, directory: &Path) -> Result<PathBuf, LookupError> {
    if name.contains('/') {
        let path = directory.join(name);
        return match executable(&path) {
            Some(true) => Ok(path),
            Some(false) => Err(LookupError::NotExecutable(path)),
            None => Err(LookupError::Missing(path)),
        };
    }
    let mut refused = None;
    for entry in search_path.split(':') {
        let path = directory.join(entry).join(name);
        match executable(&path) {
            Some(true) => return Ok(path),
            Some(false) => refused = refused.or(Some(path)),
            None => {}
        }
    }
    Err(refused.map_or_else(
        || LookupError::NotInPath { name: name.to_owned(), path: search_path.to_owned() },
        LookupError::NotExecutable,
    ))
}

/// Whether a file may be executed; `None` when there is none.
fn executable(path: &Path) -> Option<bool> {
    use std::os::unix::fs::PermissionsExt;
    let metadata = fs::metadata(path).ok()?;
    Some(metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn environment_files_are_read_as_written() {
        let text = "# c\nA=1\n\n B = \"two words\" \nexport C='x=y'\nD=\nnonsense\n=v\n";
        let expected = [("A", "1"), ("B", "two words"), ("C", "x=y"), ("D", "")];
        assert_eq!(parse(text), expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
    }

    #[test]
    fn programs_are_found_in_path_order() {
        let root = tempfile::tempdir().expect("tempdir");
        let make = |name: &str, mode: u32| {
            use std::os::unix::fs::PermissionsExt;
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().expect("has a parent")).expect("mkdir");
            fs::write(&path, "").expect("write");
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
            path
        };
        let plain = make("a/tool", 0o644);
        let tool = make("b/tool", 0o755);
        make("c/tool", 0o755);
        let only_plain = make("a/data", 0o644);
        let search = ["a", "b", "c"].map(|d| root.path().join(d).display().to_string()).join(":");
        let find = |name: &str| find_program(name, &search, root.path());
        assert_eq!(find("tool"), Ok(tool.clone()));
        assert_eq!(find("data"), Err(LookupError::NotExecutable(only_plain)));
        assert!(matches!(find("absent"), Err(LookupError::NotInPath { .. })));
        assert_eq!(find("b/tool"), Ok(tool));
        assert_eq!(find("a/tool"), Err(LookupError::NotExecutable(plain)));
        assert_eq!(find("./z"), Err(LookupError::Missing(root.path().join("./z"))));
    }
}
