//! Volumes: disks of a guest besides its root disk, and what becomes of them when it is copied.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The most volumes of a guest, which finds them as `/dev/vdb` to `/dev/vdy`.
pub const VOLUME_LIMIT: usize = 24;

/// The longest mount point, in bytes.
const PATH_LIMIT: usize = 255;

/// Where the guest has file systems that are not on a disk; nothing can be mounted there or below.
const OF_THE_KERNEL: [&str; 4] = ["/dev", "/proc", "/run", "/sys"];

/// What a copy of a machine has of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case")]
pub enum VolumePolicy {
    /// What its source had of it at that instant; what either writes from then on is its own.
    #[default]
    Private,
    /// The same image as all others, which nobody can write.
    SharedRo,
}

/// Why a text is not a policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no policy of a volume: there are private (or rw) and shared-ro (or ro)")]
pub struct VolumePolicyError {
    text: String,
}

impl VolumePolicy {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Private => "private",
            Self::SharedRo => "shared-ro",
        }
    }

    /// Whether guests can write to the volume.
    pub fn is_writable(self) -> bool {
        self == Self::Private
    }
}

impl fmt::Display for VolumePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for VolumePolicy {
    type Err = VolumePolicyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "private" | "rw" => Ok(Self::Private),
            "shared-ro" | "ro" => Ok(Self::SharedRo),
            _ => Err(VolumePolicyError { text: text.to_owned() }),
        }
    }
}

/// Where a guest has a volume: an absolute path other than `/`, as it is written shortest.
///
/// It is part of the guest's kernel command line, and so of printable ASCII without what separates words and volumes
/// there.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(value_type = String, pattern = "^/"))]
#[serde(try_from = "String", into = "String")]
pub struct MountPoint(String);

/// Why a text is not a mount point.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid mount point {text:?}: {rule}")]
pub struct MountPointError {
    text: String,
    rule: &'static str,
}

impl MountPoint {
    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for MountPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for MountPoint {
    type Err = MountPointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = |rule| Err(MountPointError { text: text.to_owned(), rule });
        let Some(relative) = text.strip_prefix('/') else {
            return wrong("it must be an absolute path");
        };
        if text.len() > PATH_LIMIT {
            return wrong("it may have 255 bytes at most");
        }
        if !text.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b',' | b':' | b'"' | b'\\')) {
            return wrong("it may hold printable ASCII but no space, comma, colon, quote or backslash");
        }
        let parts: Vec<&str> = relative.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
        if parts.is_empty() {
            return wrong("the root disk is there");
        }
        if parts.contains(&"..") {
            return wrong("it must not lead upwards");
        }
        let path = format!("/{}", parts.join("/"));
        if OF_THE_KERNEL.contains(&format!("/{}", parts[0]).as_str()) {
            return wrong("the guest has file systems of its kernel there");
        }
        Ok(Self(path))
    }
}

impl TryFrom<String> for MountPoint {
    type Error = MountPointError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<MountPoint> for String {
    fn from(point: MountPoint) -> Self {
        point.0
    }
}

/// Why volumes cannot be together in one guest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VolumesError {
    /// There are more than device names.
    #[error("{0} volumes were given, a guest can have {VOLUME_LIMIT}")]
    TooMany(usize),
    /// Two have one place.
    #[error("two volumes were given for {0}; give each a place of its own")]
    SamePlace(MountPoint),
}

/// Checks that a guest can have volumes in these places.
///
/// # Errors
/// They are too many, or two are the same.
pub fn check_places<'p>(places: impl IntoIterator<Item = &'p MountPoint>) -> Result<(), VolumesError> {
    let mut places: Vec<&MountPoint> = places.into_iter().collect();
    if places.len() > VOLUME_LIMIT {
        return Err(VolumesError::TooMany(places.len()));
    }
    places.sort();
    match places.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(VolumesError::SamePlace(pair[0].clone())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn point(text: &str) -> MountPoint {
        text.parse().expect("legal")
    }

    #[test]
    fn the_rule_at_its_edges() {
        for (text, path) in [
            ("/data", "/data"),
            ("/a/b", "/a/b"),
            ("/a//b/./c/", "/a/b/c"),
            ("/mnt/x@y=1", "/mnt/x@y=1"),
            ("/devices", "/devices"),
        ] {
            assert_eq!(text.parse::<MountPoint>().map(String::from), Ok(path.to_owned()));
        }
        for bad in [
            "",
            "/",
            "//",
            "/.",
            "data",
            "./data",
            "/a/../b",
            "/..",
            "/a b",
            "/a,b",
            "/a:b",
            "/a\nb",
            "/a\"",
            "/é",
            "/proc",
            "/dev/shm",
            "/sys//",
            "/run/x",
            &format!("/{}", "x".repeat(255)),
        ] {
            assert!(bad.parse::<MountPoint>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn policies_have_short_names_too() {
        for (text, policy) in [
            ("ro", VolumePolicy::SharedRo),
            ("shared-ro", VolumePolicy::SharedRo),
            ("rw", VolumePolicy::Private),
            ("private", VolumePolicy::Private),
        ] {
            assert_eq!(text.parse(), Ok(policy));
        }
        let error = "refuse".parse::<VolumePolicy>().expect_err("there is none").to_string();
        assert!(error.contains("\"refuse\"") && error.contains("shared-ro"), "{error}");
        assert_eq!(serde_json::to_string(&VolumePolicy::SharedRo).expect("plain data"), "\"shared-ro\"");
    }

    #[test]
    fn as_many_as_there_are_names_and_each_in_its_place() {
        let places: Vec<_> = (0..=VOLUME_LIMIT).map(|number| point(&format!("/v{number}"))).collect();
        assert_eq!(check_places(&places[1..]), Ok(()));
        assert_eq!(check_places(&places), Err(VolumesError::TooMany(VOLUME_LIMIT + 1)));
        let same = [point("/b"), point("/a"), point("/b/")];
        assert_eq!(check_places(&same), Err(VolumesError::SamePlace(point("/b"))));
    }

    proptest! {
        #[test]
        fn a_mount_point_is_one_word_of_a_command_line_below_the_root(text in "/[ -~]{0,12}|\\PC{0,20}") {
            if let Ok(point) = text.parse::<MountPoint>() {
                let path = point.as_str();
                prop_assert!(path.starts_with('/') && path.len() > 1 && !path.contains([' ', ',', ':']));
                prop_assert!(!path.contains("//") && !path.ends_with('/') && !path.split('/').any(|part| part == ".."));
                prop_assert_eq!(path.parse::<MountPoint>(), Ok(point.clone()));
            }
        }
    }
}
