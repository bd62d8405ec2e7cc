//! The two sides of a copy, as they are written.

use std::path::PathBuf;
use std::str::FromStr;

use forkd_types::SandboxId;

/// One side of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// A path in a sandbox, absolute.
    Guest(SandboxId, String),
    /// A path of this host.
    Here(PathBuf),
    /// Standard input or output.
    Stream,
}

impl FromStr for Place {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "-" {
            return Ok(Self::Stream);
        }
        // A path of this host that has a colon can be written ./a:b.
        if text.starts_with(['/', '.']) {
            return Ok(Self::Here(text.into()));
        }
        match text.split_once(':') {
            Some((_, "")) => Err("there is no path after the sandbox's colon"),
            Some((sandbox, path)) => match sandbox.parse() {
                Ok(sandbox) => Ok(Self::Guest(sandbox, absolute(path))),
                Err(_) => Ok(Self::Here(text.into())),
            },
            None if text.is_empty() => Err("the path is empty"),
            None => Ok(Self::Here(text.into())),
        }
    }
}

/// A guest's path from its root, where relative ones start too.
fn absolute(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
}

/// Whether a path asks for the contents of a directory rather than for itself.
pub(super) fn is_contents(path: &str) -> bool {
    path == "." || path.ends_with("/.")
}

/// The last part of a guest's path; none for the root.
pub(super) fn name_of(path: &str) -> Option<&str> {
    path.trim_end_matches("/.").trim_end_matches('/').rsplit('/').next().filter(|name| !name.is_empty())
}

/// The directory that a guest's path is in.
pub(super) fn parent_of(path: &str) -> &str {
    match path.trim_end_matches('/').rsplit_once('/') {
        Some(("", _)) | None => "/",
        Some((parent, _)) => parent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_told_apart() {
        let guest = |path: &str| Place::Guest("sb-1-0000".parse().expect("legal"), path.to_owned());
        let place = |text: &str| text.parse::<Place>();
        assert_eq!(place("sb-1-0000:/etc"), Ok(guest("/etc")));
        assert_eq!(place("sb-1-0000:etc/hosts"), Ok(guest("/etc/hosts")));
        assert_eq!(place("-"), Ok(Place::Stream));
        for here in ["./a:b", "/a:b", "a", "..", "not a sandbox:/x"] {
            assert_eq!(place(here), Ok(Place::Here(here.into())), "{here}");
        }
        assert!(place("").is_err() && place("sb-1-0000:").is_err());
    }

    #[test]
    fn paths_have_names_and_parents() {
        for (path, name, parent) in [
            ("/", None, "/"),
            ("/a", Some("a"), "/"),
            ("/a/b/", Some("b"), "/a"),
            ("/a/b/.", Some("b"), "/a/b"),
            ("/.", None, "/"),
        ] {
            assert_eq!((name_of(path), parent_of(path)), (name, parent), "{path}");
        }
        assert!(is_contents("/a/.") && !is_contents("/a/..") && !is_contents("/a/.b"));
    }
}
