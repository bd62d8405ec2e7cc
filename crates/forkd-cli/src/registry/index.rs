//! `registry.json`: which packages there are, in which versions, and where.

use std::collections::BTreeMap;

use serde::Deserialize;
use url::Url;

use super::location::{Hub, Source, shown};
use super::transport::{Transport, TransportError};

/// The version of the index that is read.
const SCHEMA: u64 = 1;
/// The largest index that is read.
const INDEX_LIMIT: u64 = 16 << 20;

/// The contents of an index. Fields that are not known are ignored.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Index {
    packages: BTreeMap<String, Package>,
}

#[derive(Clone, Debug, Deserialize)]
struct Package {
    versions: BTreeMap<String, Version>,
}

#[derive(Clone, Debug, Deserialize)]
struct Version {
    url: String,
    sha256: Option<String>,
    size_bytes: Option<u64>,
}

/// Why an index is of no use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IndexError {
    /// It cannot be fetched.
    #[error("could not fetch the index")]
    Fetch(#[from] TransportError),
    /// It cannot be read.
    #[error("could not read the index {hub}")]
    Unreadable {
        /// Where it is.
        hub: String,
        /// Why.
        source: std::io::Error,
    },
    /// It makes no sense.
    #[error("the index {hub} makes no sense: {reason}")]
    Malformed {
        /// Where it is.
        hub: String,
        /// What is wrong.
        reason: String,
    },
    /// There is no such package.
    #[error("the index {hub} has no package {name}; it has {}", list(.there))]
    NoPackage {
        /// Where it is.
        hub: String,
        /// What was asked for.
        name: String,
        /// What there is.
        there: Vec<String>,
    },
    /// There is no such version.
    #[error("package {name} has no version {version}; it has {}", list(.there))]
    NoVersion {
        /// The package.
        name: String,
        /// What was asked for.
        version: String,
        /// What there is.
        there: Vec<String>,
    },
}

fn list(names: &[String]) -> String {
    const SHOWN: usize = 10;
    match names {
        [] => "none".to_owned(),
        names if names.len() <= SHOWN => names.join(", "),
        names => format!("{} and {} more", names[..SHOWN].join(", "), names.len() - SHOWN),
    }
}

impl Index {
    /// Reads the index at `hub`.
    pub(crate) async fn read(hub: &Hub, transport: &Transport) -> Result<Self, IndexError> {
        let json = match hub {
            Hub::Url(url) => transport.get_small(url, INDEX_LIMIT).await?,
            Hub::File(path) => {
                tokio::fs::read(path).await.map_err(|source| IndexError::Unreadable { hub: hub.to_string(), source })?
            }
        };
        Self::parse(&json).map_err(|reason| IndexError::Malformed { hub: hub.to_string(), reason })
    }

    fn parse(json: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Versioned {
            schema_version: u64,
        }
        let Versioned { schema_version } = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        if schema_version != SCHEMA {
            return Err(format!("its schema_version is {schema_version}, this program reads {SCHEMA}"));
        }
        serde_json::from_slice(json).map_err(|error| error.to_string())
    }

    /// Where a version of a package is to be had. Its address may be relative to that of the index.
    pub(crate) fn find(&self, name: &str, version: &str, hub: &Hub) -> Result<Source, IndexError> {
        let malformed = |reason: String| IndexError::Malformed { hub: hub.to_string(), reason };
        let package = self.packages.get(name).ok_or_else(|| IndexError::NoPackage {
            hub: hub.to_string(),
            name: name.to_owned(),
            there: self.packages.keys().cloned().collect(),
        })?;
        let found = package.versions.get(version).ok_or_else(|| IndexError::NoVersion {
            name: name.to_owned(),
            version: version.to_owned(),
            there: package.versions.keys().cloned().collect(),
        })?;
        let url = match (Url::parse(&found.url), hub) {
            (Ok(url), _) => url,
            (Err(url::ParseError::RelativeUrlWithoutBase), Hub::Url(base)) => {
                base.join(&found.url).map_err(|error| malformed(format!("the url of {name}@{version}: {error}")))?
            }
            (Err(error), _) => return Err(malformed(format!("the url of {name}@{version}: {error}"))),
        };
        if !matches!(url.scheme(), "http" | "https") {
            return Err(malformed(format!("{} of {name}@{version} is neither http nor https", shown(&url))));
        }
        let sha256 = found.sha256.as_ref().map(|digits| digits.to_ascii_lowercase());
        if let Some(digits) =
            sha256.as_ref().filter(|text| text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()))
        {
            return Err(malformed(format!("the sha256 of {name}@{version} is {digits:?}, which is none")));
        }
        Ok(Source { url, sha256, size_bytes: found.size_bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: &str = r#"{
        "_comment": "any", "schema_version": 1,
        "packages": {
            "me/python": {"description": "x", "versions": {
                "latest": {"url": "https://host/python.tar.zst", "sha256": "AB", "size_bytes": 7},
                "v1": {"url": "packs/python.tar.zst", "memory_mib": 512},
                "v0": {"url": "ftp://host/x"}
            }},
            "me/other": {"versions": {}}
        }
    }"#;

    fn find(index: &str, name: &str, version: &str, hub: &str) -> Result<Source, String> {
        let hub: Hub = hub.parse().expect("a hub");
        let index = Index::parse(index.as_bytes()).expect("an index");
        index.find(name, version, &hub).map_err(|error| error.to_string())
    }

    #[test]
    fn packages_are_found_with_what_is_known_about_them() {
        let good = INDEX.replace("\"AB\"", &format!("\"{}\"", "AB".repeat(32)));
        let source = find(&good, "me/python", "latest", "/x").expect("there");
        assert_eq!(source.url.as_str(), "https://host/python.tar.zst");
        assert_eq!((source.sha256, source.size_bytes), (Some("ab".repeat(32)), Some(7)));
        let source = find(&good, "me/python", "v1", "https://hub/a/registry.json").expect("there");
        assert_eq!((source.url.as_str(), source.sha256), ("https://hub/a/packs/python.tar.zst", None));
    }

    #[test]
    fn what_is_not_there_is_said_with_what_is() {
        let error = |name, version, hub| find(INDEX, name, version, hub).expect_err("not there");
        assert!(error("me/none", "latest", "/x").contains("it has me/other, me/python"));
        assert!(error("me/python", "v9", "/x").contains("it has latest, v0, v1"));
        assert!(error("me/other", "latest", "/x").contains("it has none"));
        assert!(error("me/python", "latest", "/x").contains("which is none"));
        assert!(error("me/python", "v1", "/x").contains("relative URL without a base"));
        assert!(error("me/python", "v0", "/x").contains("neither http nor https"));
    }

    #[test]
    fn indexes_that_make_no_sense() {
        for (json, says) in [
            ("", "EOF"),
            ("[]", "invalid"),
            (r#"{"packages": {}}"#, "schema_version"),
            (r#"{"schema_version": 2, "packages": []}"#, "schema_version is 2"),
            (r#"{"schema_version": 1, "packages": {"a/b": {"versions": {"v": {}}}}}"#, "url"),
        ] {
            let error = Index::parse(json.as_bytes()).expect_err("no index");
            assert!(error.contains(says), "{json}: {error}");
        }
    }
}
