//! What a root disk is made from, as people write it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::debian;
use crate::{ImageError, Result};

/// What a root disk is made from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RootDiskSource {
    /// `debian:SUITE?include=PKG,PKG`: a minimal Debian with packages.
    Debian {
        /// Code name or alias of the release.
        suite: String,
        /// Packages, sorted, each once.
        include: Vec<String>,
    },
    /// `dir:PATH`: a directory that holds a root file system.
    Directory(PathBuf),
    /// `tar:PATH`: an archive of one, plain or compressed with gzip, zstd or xz.
    Archive(PathBuf),
}

impl RootDiskSource {
    /// Reads what people write; the same as [`str::parse`].
    pub fn parse(text: &str) -> Result<Self> {
        text.parse()
    }
}

impl FromStr for RootDiskSource {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |reason: String| ImageError::Source { text: text.to_owned(), reason };
        let (kind, rest) =
            text.split_once(':').ok_or_else(|| wrong("it does not say of what kind it is".to_owned()))?;
        match kind {
            "dir" | "tar" if rest.is_empty() => Err(wrong("the path is empty".to_owned())),
            "dir" => Ok(Self::Directory(rest.into())),
            "tar" => Ok(Self::Archive(rest.into())),
            "debian" => parse_debian(rest).map_err(wrong),
            _ => Err(wrong(format!("sources of kind {kind:?} are not known"))),
        }
    }
}

fn parse_debian(text: &str) -> Result<RootDiskSource, String> {
    let (suite, query) = text.split_once('?').unwrap_or((text, ""));
    if !debian::is_suite_name(suite) {
        return Err(format!("{suite:?} is not the name of a suite: lower-case letters, digits and dashes"));
    }
    let mut include = Vec::new();
    for option in query.split('&').filter(|option| !option.is_empty()) {
        let (key, value) = option.split_once('=').unwrap_or((option, ""));
        if key != "include" {
            return Err(format!("the option {key:?} is not known, only include is"));
        }
        for package in value.split(',').map(str::trim).filter(|package| !package.is_empty()) {
            if !debian::is_package_name(package) {
                return Err(format!("{package:?} is not the name of a package"));
            }
            include.push(package.to_owned());
        }
    }
    include.sort();
    include.dedup();
    Ok(RootDiskSource::Debian { suite: suite.to_owned(), include })
}

impl fmt::Display for RootDiskSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Debian { suite, include } if include.is_empty() => write!(f, "debian:{suite}"),
            Self::Debian { suite, include } => write!(f, "debian:{suite}?include={}", include.join(",")),
            Self::Directory(path) => write!(f, "dir:{}", path.display()),
            Self::Archive(path) => write!(f, "tar:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_read_as_people_write_them() {
        let debian = |suite: &str, include: &[&str]| RootDiskSource::Debian {
            suite: suite.into(),
            include: include.iter().map(|&package| package.into()).collect(),
        };
        for (text, source) in [
            ("debian:bookworm", debian("bookworm", &[])),
            ("debian:trixie?include=", debian("trixie", &[])),
            (
                "debian:bookworm?include=python3-numpy,curl,curl&include=g++",
                debian("bookworm", &["curl", "g++", "python3-numpy"]),
            ),
            ("dir:/a:b", RootDiskSource::Directory("/a:b".into())),
            ("tar:x.tar.gz", RootDiskSource::Archive("x.tar.gz".into())),
        ] {
            let parsed: RootDiskSource = text.parse().expect(text);
            assert_eq!(parsed, source, "{text}");
            assert_eq!(parsed.to_string().parse::<RootDiskSource>().expect("round trip"), source);
        }
    }

    #[test]
    fn what_is_no_source_says_why() {
        for (text, word) in [
            ("", "kind"),
            ("ubuntu", "kind"),
            ("ubuntu:24.04", "\"ubuntu\""),
            ("dir:", "empty"),
            ("debian:", "suite"),
            ("debian:--help", "suite"),
            ("debian:Book worm", "suite"),
            ("debian:../x", "suite"),
            ("debian:bookworm?include=--customize-hook=x", "package"),
            ("debian:bookworm?include=a/b", "package"),
            ("debian:bookworm?arch=arm64", "\"arch\""),
        ] {
            let error = text.parse::<RootDiskSource>().expect_err(text).to_string();
            assert!(error.contains(word) && error.contains("debian:SUITE"), "{error}");
        }
    }
}
