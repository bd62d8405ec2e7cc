//! Snapshot tags.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The longest tag, in bytes.
const LIMIT: usize = 64;

/// The name of a snapshot: 1 to 64 of `A-Z a-z 0-9 _ - .`, not starting with a dot.
///
/// A tag is one path segment and one URL segment; it never needs escaping and can never leave the
/// snapshot directory.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(value_type = String, pattern = "^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$"))]
#[serde(try_from = "String", into = "String")]
pub struct Tag(String);

/// Why a text is not a tag.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid tag {text:?}: a tag is 1 to 64 of A-Z a-z 0-9 _ - . and does not start with a dot")]
pub struct TagError {
    text: String,
}

impl Tag {
    /// The tag as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<std::path::Path> for Tag {
    fn as_ref(&self) -> &std::path::Path {
        self.0.as_ref()
    }
}

impl FromStr for Tag {
    type Err = TagError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let legal = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'-' | b'.');
        let sound = (1..=LIMIT).contains(&text.len()) && !text.starts_with('.') && text.bytes().all(legal);
        if sound { Ok(Self(text.to_owned())) } else { Err(TagError { text: text.to_owned() }) }
    }
}

impl TryFrom<String> for Tag {
    type Error = TagError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Tag> for String {
    fn from(tag: Tag) -> Self {
        tag.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::{Component, Path};

    proptest! {
        #[test]
        fn a_legal_tag_is_exactly_one_plain_path_component(text in "\\PC{0,70}") {
            if let Ok(tag) = text.parse::<Tag>() {
                let parts: Vec<_> = Path::new(tag.as_str()).components().collect();
                prop_assert_eq!(parts, vec![Component::Normal(text.as_ref())]);
            }
        }
    }

    #[test]
    fn the_rule_at_its_edges() {
        for good in ["a", "A.b", "-x", "_", "py3.12", &"x".repeat(64)] {
            assert!(good.parse::<Tag>().is_ok(), "{good}");
        }
        for bad in ["", ".", "..", ".hidden", "a/b", "a+b", "a b", "é", "a\0", &"x".repeat(65)] {
            assert!(bad.parse::<Tag>().is_err(), "{bad:?}");
        }
    }
}
