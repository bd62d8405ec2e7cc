//! What a person may write to name a pack or an index, and URLs without their secrets.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use url::Url;

/// What to pull.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// A file on a server.
    Url(Url),
    /// A package of an index.
    Package {
        /// `owner/name`.
        name: String,
        /// Which of its versions.
        version: String,
    },
}

/// Where an index is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Hub {
    /// On a server.
    Url(Url),
    /// On this host.
    File(PathBuf),
}

/// Where a pack is to be had, and what is known about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    /// Its address.
    pub(crate) url: Url,
    /// SHA-256 of the file, lower-case hex.
    pub(crate) sha256: Option<String>,
    /// Length of the file.
    pub(crate) size_bytes: Option<u64>,
}

/// Why a text names nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LocationError {
    /// It looks like a URL.
    #[error("{text:?} is not a URL: {reason}")]
    Url {
        /// The text, without secrets as far as they can be told.
        text: String,
        /// Why.
        reason: String,
    },
    /// It looks like nothing.
    #[error("{text:?} names no pack; write http://…, https://…, OWNER/NAME or OWNER/NAME@VERSION")]
    Target {
        /// The text.
        text: String,
    },
}

/// The version of a package unless another is asked for.
const LATEST: &str = "latest";

impl FromStr for Target {
    type Err = LocationError;

    fn from_str(text: &str) -> Result<Self, LocationError> {
        if let Some(url) = http_url(text)? {
            return Ok(Self::Url(url));
        }
        let (name, version) = text.split_once('@').unwrap_or((text, LATEST));
        let word = |text: &str| {
            let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
            // A word that begins with a dot is a path that was meant.
            !text.is_empty() && !text.starts_with('.') && text.bytes().all(legal)
        };
        match name.split_once('/') {
            Some((owner, package)) if word(owner) && word(package) && word(version) => {
                Ok(Self::Package { name: name.to_owned(), version: version.to_owned() })
            }
            _ => Err(LocationError::Target { text: text.to_owned() }),
        }
    }
}

impl FromStr for Hub {
    type Err = LocationError;

    fn from_str(text: &str) -> Result<Self, LocationError> {
        Ok(match http_url(text)? {
            Some(url) => Self::Url(url),
            None => Self::File(text.strip_prefix("file://").unwrap_or(text).into()),
        })
    }
}

impl fmt::Display for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url(url) => f.write_str(&shown(url)),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// The URL that `text` is; none when it does not begin like one.
fn http_url(text: &str) -> Result<Option<Url>, LocationError> {
    if !text.starts_with("http://") && !text.starts_with("https://") {
        return Ok(None);
    }
    let wrong = |reason: String| {
        let text = text.rsplit_once('@').map_or_else(|| text.to_owned(), |(_, rest)| format!("…@{rest}"));
        LocationError::Url { text, reason }
    };
    Url::parse(text).map(Some).map_err(|error| wrong(error.to_string()))
}

/// A URL as it may be printed: without user, password, query and fragment, where secrets are.
pub(crate) fn shown(url: &Url) -> String {
    let mut plain = url.clone();
    // Only URLs that cannot have any refuse this.
    let _ = plain.set_username("").and_then(|()| plain.set_password(None));
    let hidden = if url.query().is_some() { "?…" } else { "" };
    plain.set_query(None);
    plain.set_fragment(None);
    format!("{plain}{hidden}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_people_write() {
        let package = |name: &str, version: &str| Ok(Target::Package { name: name.into(), version: version.into() });
        assert_eq!("me/python-numpy".parse(), package("me/python-numpy", "latest"));
        assert_eq!("me/python@v1.2".parse(), package("me/python", "v1.2"));
        assert!(matches!("https://host/a.tar.zst".parse(), Ok(Target::Url(_))));
        for bad in ["", "python", "a/b/c", "/b", "a/", "a/b@", "a b/c", "ftp://host/x", "../x", "a/b@c@d"] {
            assert!(matches!(bad.parse::<Target>(), Err(LocationError::Target { .. })), "{bad}");
        }
        assert!(matches!("http://".parse::<Target>(), Err(LocationError::Url { .. })));
    }

    #[test]
    fn indexes_are_files_or_urls() {
        assert_eq!("/x/registry.json".parse(), Ok(Hub::File("/x/registry.json".into())));
        assert_eq!("file:///x".parse(), Ok(Hub::File("/x".into())));
        assert!(matches!("https://host/registry.json".parse(), Ok(Hub::Url(_))));
    }

    #[test]
    fn secrets_are_not_shown() {
        let shown = |text: &str| super::shown(&text.parse().expect("a URL"));
        assert_eq!(shown("https://me:secret@host:8443/a/b?token=secret#x"), "https://host:8443/a/b?…");
        assert_eq!(shown("http://host/a"), "http://host/a");
        let error = "https://me:secret@ho st/".parse::<Target>().expect_err("no host has a blank");
        assert!(!error.to_string().contains("secret"), "{error}");
    }
}
