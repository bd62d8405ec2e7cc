//! The certificate, and its replacement while the server runs.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The certificates cannot be read.
    #[error("cannot read certificates from {}; it must hold them in PEM, the server's own first", path.display())]
    Certificates {
        /// The file.
        path: PathBuf,
        /// Why.
        source: pem::Error,
    },
    /// The file has none.
    #[error("there is no certificate in {}; it must hold them in PEM, the server's own first", path.display())]
    NoCertificate {
        /// The file.
        path: PathBuf,
    },
    /// The key cannot be read.
    #[error("cannot read a private key from {}; it must hold one in PEM, without a passphrase", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Why.
        source: pem::Error,
    },
    /// They do not fit.
    #[error("the key in {} cannot be used with the certificate in {}", key.display(), certificates.display())]
    Unfit {
        /// The file of certificates.
        certificates: PathBuf,
        /// The file of the key.
        key: PathBuf,
        /// Why.
        source: rustls::Error,
    },
}

/// The certificate that a server shows. Clones share it.
#[derive(Clone)]
pub struct Tls {
    acceptor: TlsAcceptor,
    shown: Arc<Shown>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.shown.fmt(f)
    }
}

/// Where the certificate and its key are kept, and those in use.
struct Shown {
    certificates: PathBuf,
    key: PathBuf,
    provider: Arc<CryptoProvider>,
    current: RwLock<Arc<CertifiedKey>>,
}

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("certificates", &self.certificates).finish_non_exhaustive()
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

impl Tls {
    /// Reads the chain of certificates and its key.
    pub fn open(certificates: &Path, key: &Path) -> Result<Self, TlsError> {
        let provider = Arc::new(default_provider());
        let current = load(certificates, key, &provider)?;
        let shown = Arc::new(Shown {
            certificates: certificates.to_owned(),
            key: key.to_owned(),
            provider: Arc::clone(&provider),
            current: RwLock::new(Arc::new(current)),
        });
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("ring has the cipher suites of TLS 1.2 and 1.3")
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&shown) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { acceptor: TlsAcceptor::from(Arc::new(config)), shown })
    }

    /// The files that it was read from.
    pub fn paths(&self) -> [&Path; 2] {
        [&self.shown.certificates, &self.shown.key]
    }

    /// Reads both anew. When they are not good or do not fit, those in use stay.
    pub fn reload(&self) -> Result<(), TlsError> {
        let shown = &self.shown;
        let fresh = load(&shown.certificates, &shown.key, &shown.provider)?;
        *shown.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(fresh);
        Ok(())
    }

    pub(super) async fn shake_hands<S>(&self, socket: S) -> io::Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        self.acceptor.accept(socket).await
    }
}

fn load(certificates: &Path, key: &Path, provider: &CryptoProvider) -> Result<CertifiedKey, TlsError> {
    let bad_chain = |source| TlsError::Certificates { path: certificates.to_owned(), source };
    let chain = CertificateDer::pem_file_iter(certificates)
        .map_err(bad_chain)?
        .collect::<Result<Vec<_>, _>>()
        .map_err(bad_chain)?;
    if chain.is_empty() {
        return Err(TlsError::NoCertificate { path: certificates.to_owned() });
    }
    let private = PrivateKeyDer::from_pem_file(key).map_err(|source| TlsError::Key { path: key.to_owned(), source })?;
    CertifiedKey::from_der(chain, private, provider).map_err(|source| TlsError::Unfit {
        certificates: certificates.to_owned(),
        key: key.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Files {
        _dir: tempfile::TempDir,
        certificates: PathBuf,
        key: PathBuf,
    }

    fn files() -> Files {
        let dir = tempfile::tempdir().expect("tempdir");
        let (certificates, key) = (dir.path().join("tls.crt"), dir.path().join("tls.key"));
        Files { _dir: dir, certificates, key }
    }

    impl Files {
        fn write(&self, pair: &(String, String)) {
            std::fs::write(&self.certificates, &pair.0).expect("write");
            std::fs::write(&self.key, &pair.1).expect("write");
        }
    }

    fn pair() -> (String, String) {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
        (made.cert.pem(), made.signing_key.serialize_pem())
    }

    #[test]
    fn what_cannot_be_shown_is_refused_with_its_file() {
        let files = files();
        let open = || Tls::open(&files.certificates, &files.key).map(drop).expect_err("refused").to_string();
        assert!(open().contains("tls.crt"));
        let (good, other) = (pair(), pair());
        files.write(&(String::new(), good.1.clone()));
        assert!(open().contains("no certificate"));
        files.write(&(good.0.clone(), String::new()));
        assert!(open().contains("tls.key"));
        files.write(&(good.0.clone(), other.1));
        assert!(open().contains("cannot be used"));
        files.write(&good);
        Tls::open(&files.certificates, &files.key).expect("good");
    }

    #[test]
    fn new_files_replace_old_ones_only_when_they_are_good() {
        let (files, first, second) = (files(), pair(), pair());
        files.write(&first);
        let tls = Tls::open(&files.certificates, &files.key).expect("good");
        let shown = || tls.shown.current.read().expect("no panic").cert[0].clone();
        let before = shown();
        std::fs::write(&files.certificates, &second.0).expect("write");
        tls.reload().expect_err("half of it is old");
        assert_eq!(shown(), before);
        std::fs::write(&files.key, &second.1).expect("write");
        tls.reload().expect("good");
        assert_ne!(shown(), before);
    }
}
