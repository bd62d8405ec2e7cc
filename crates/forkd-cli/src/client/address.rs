//! Where a daemon listens: `http://HOST[:PORT]` or `unix:///PATH`.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

/// The port of a daemon whose URL names none.
const DEFAULT_PORT: u16 = 8889;

/// A daemon's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Address {
    /// A unix socket on this host.
    Unix(PathBuf),
    /// A TCP port, plain HTTP.
    Tcp {
        /// Host name or address, without the brackets of an IPv6 literal.
        host: String,
        /// Port.
        port: u16,
    },
}

/// Why a text is not a daemon's address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AddressError {
    /// TLS was asked for.
    #[error("{0:?} asks for TLS, which this client does not speak; use http:// to a loopback port or unix://")]
    Tls(String),
    /// Anything else.
    #[error("{0:?} is not a daemon address; write http://HOST:PORT or unix:///PATH")]
    Malformed(String),
}

/// A connected byte stream.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Address {
    /// The daemon's usual TCP address.
    pub(crate) fn usual() -> Self {
        Self::Tcp { host: "127.0.0.1".to_owned(), port: DEFAULT_PORT }
    }

    /// The daemon's port on this host's loopback interface.
    pub(crate) fn loopback(port: u16) -> Self {
        Self::Tcp { host: "127.0.0.1".to_owned(), port }
    }

    /// Connects.
    pub(crate) async fn connect(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match self {
            Self::Unix(path) => Box::new(UnixStream::connect(path).await?),
            Self::Tcp { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await?;
                stream.set_nodelay(true)?;
                Box::new(stream)
            }
        })
    }

    /// Whether bytes reach the daemon without crossing a network.
    pub(crate) fn is_unix(&self) -> bool {
        matches!(self, Self::Unix(_))
    }

    /// What to put into the `Host` header.
    pub(crate) fn authority(&self) -> String {
        match self {
            Self::Unix(_) => "localhost".to_owned(),
            Self::Tcp { host, port } if host.contains(':') => format!("[{host}]:{port}"),
            Self::Tcp { host, port } => format!("{host}:{port}"),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp { .. } => write!(f, "http://{}", self.authority()),
        }
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let malformed = || AddressError::Malformed(text.to_owned());
        if let Some(path) = text.strip_prefix("unix://") {
            return if path.starts_with('/') { Ok(Self::Unix(path.into())) } else { Err(malformed()) };
        }
        if text.starts_with("https://") {
            return Err(AddressError::Tls(text.to_owned()));
        }
        let authority = text.strip_prefix("http://").ok_or_else(malformed)?.trim_end_matches('/');
        let (host, port) = match authority.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or_else(malformed)?;
                (host, port.strip_prefix(':').or(port.is_empty().then_some("")).ok_or_else(malformed)?)
            }
            None => authority.split_once(':').unwrap_or((authority, "")),
        };
        let legal = |c: char| !c.is_whitespace() && !matches!(c, '/' | '@' | '?' | '#' | '[' | ']');
        if host.is_empty() || !host.chars().all(legal) {
            return Err(malformed());
        }
        let port = if port.is_empty() { DEFAULT_PORT } else { port.parse().map_err(|_| malformed())? };
        Ok(Self::Tcp { host: host.to_owned(), port })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_people_write() {
        let tcp = |host: &str, port| Ok(Address::Tcp { host: host.into(), port });
        assert_eq!("http://127.0.0.1:8889".parse(), tcp("127.0.0.1", 8889));
        assert_eq!("http://box/".parse(), tcp("box", 8889));
        assert_eq!("http://[::1]:80".parse(), tcp("::1", 80));
        assert_eq!("http://[::1]".parse(), tcp("::1", 8889));
        assert_eq!("unix:///run/forkd.sock".parse(), Ok(Address::Unix("/run/forkd.sock".into())));
    }

    #[test]
    fn addresses_that_are_none() {
        for bad in
            ["", "127.0.0.1:8889", "http://", "http://h:x", "http://h:99999", "unix://rel", "http://h/p", "http://[::1"]
        {
            assert!(matches!(bad.parse::<Address>(), Err(AddressError::Malformed(_))), "{bad}");
        }
        assert!(matches!("https://h".parse::<Address>(), Err(AddressError::Tls(_))));
    }

    #[test]
    fn addresses_print_as_they_are_written() {
        for text in ["http://127.0.0.1:8889", "http://[::1]:80", "unix:///run/forkd.sock"] {
            assert_eq!(text.parse::<Address>().expect("an address").to_string(), text);
        }
    }
}
