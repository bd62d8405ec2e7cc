//! Signatures: ed25519 over the bytes of `manifest.json`, which hold the digests of all else.
//!
//! Keys are the PEM files that OpenSSL makes, and a signature is the plain 64 bytes that it checks:
//!
//! ```text
//! openssl genpkey -algorithm ed25519 -out key.pem
//! openssl pkey -in key.pem -pubout -out key.pub
//! tar -xf PACK manifest.json manifest.sig
//! openssl pkeyutl -verify -pubin -inkey key.pub -rawin -in manifest.json -sigfile manifest.sig
//! ```
//!
//! The manifest has a zstd frame of its own, so a pack is signed by putting a frame behind the first; nothing
//! is compressed again, and the key need not be where the snapshot is.

use std::fs;
use std::io::{self, BufRead, Read, Write};
use std::path::Path;

use ed25519_dalek::Signer;
use ed25519_dalek::pkcs8::{DecodePrivateKey, DecodePublicKey};

use super::error::{KeyError, PackError};
use super::manifest::{MANIFEST_JSON, MANIFEST_LIMIT, Manifest};
use super::member::{self, BLOCK, padded};
use super::packing::{frame, plain_member};

/// Second member of a signed pack.
pub(super) const MANIFEST_SIG: &str = "manifest.sig";
/// Length of a signature.
pub(super) const SIGNATURE_LEN: usize = ed25519_dalek::SIGNATURE_LENGTH;

/// A private key.
#[derive(Clone, Debug)]
pub struct SigningKey(ed25519_dalek::SigningKey);

/// A public key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VerifyingKey(ed25519_dalek::VerifyingKey);

impl SigningKey {
    /// Reads a PKCS#8 PEM file.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let how = "openssl genpkey -algorithm ed25519 -out key.pem";
        let key = ed25519_dalek::SigningKey::from_pkcs8_pem(&text(path, "private", how)?);
        key.map(Self).map_err(|error| not_a_key(path, "private", how, error))
    }

    /// The key that checks what this one signs.
    pub fn verifying_key(&self) -> VerifyingKey {
        VerifyingKey(self.0.verifying_key())
    }

    fn sign(&self, manifest_json: &[u8]) -> [u8; SIGNATURE_LEN] {
        self.0.sign(manifest_json).to_bytes()
    }
}

impl VerifyingKey {
    /// Reads a PEM file with a public key.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let how = "openssl pkey -in key.pem -pubout -out key.pub";
        let key = ed25519_dalek::VerifyingKey::from_public_key_pem(&text(path, "public", how)?);
        key.map(Self).map_err(|error| not_a_key(path, "public", how, error))
    }

    /// The key as 64 hex digits.
    pub fn to_hex(&self) -> String {
        self.0.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Reads what [`Self::to_hex`] wrote.
    pub fn from_hex(text: &str) -> Result<Self, KeyError> {
        let digest: Option<forkd_types::Digest> = format!("blake3:{text}").parse().ok();
        let key = digest.and_then(|bytes| ed25519_dalek::VerifyingKey::from_bytes(bytes.as_bytes()).ok());
        key.map(Self).ok_or_else(|| KeyError::NotHex { text: text.to_owned() })
    }

    pub(super) fn check(&self, manifest_json: &[u8], signature: &[u8; SIGNATURE_LEN]) -> Result<(), PackError> {
        let signature = ed25519_dalek::Signature::from_bytes(signature);
        self.0.verify_strict(manifest_json, &signature).map_err(|_| PackError::BadSignature)
    }
}

fn text(path: &Path, kind: &'static str, how: &'static str) -> Result<String, KeyError> {
    match fs::read(path) {
        Ok(bytes) => String::from_utf8(bytes).map_err(|_| not_a_key(path, kind, how, "it is not text")),
        Err(source) => Err(KeyError::Unreadable { path: path.to_owned(), source }),
    }
}

fn not_a_key(path: &Path, kind: &'static str, how: &'static str, reason: impl ToString) -> KeyError {
    KeyError::NotAKey { path: path.to_owned(), kind, reason: reason.to_string(), how }
}

/// Copies `pack` to `out` with a signature by `key`, in place of one that it may have. Returns its manifest.
///
/// # Errors
/// [`PackError::Output`]; else what is wrong with the manifest. The rest of the pack is not looked at.
pub fn sign(pack: impl BufRead, mut out: impl Write, key: &SigningKey) -> Result<Manifest, PackError> {
    let mut pack = Tee { source: pack, taken: Vec::new() };
    let json = first_member(&mut pack)?;
    let manifest = Manifest::parse(&json)?;
    let signature = frame(&plain_member(MANIFEST_SIG, &key.sign(&json))?, super::DEFAULT_LEVEL);
    pack.taken.extend_from_slice(&signature.map_err(PackError::Output)?);
    out.write_all(&pack.taken).map_err(PackError::Output)?;

    pack.taken.clear();
    if has_signature_next(&mut pack)? {
        pack.taken.clear();
    }
    out.write_all(&pack.taken).map_err(PackError::Output)?;
    io::copy(&mut pack.source, &mut out).map_err(PackError::Output)?;
    out.flush().map_err(PackError::Output)?;
    Ok(manifest)
}

impl Manifest {
    /// Reads the manifest from the beginning of a pack. What follows it is left unread.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn of_pack(pack: impl BufRead) -> Result<Self, PackError> {
        Self::parse(&first_member(&mut Tee { source: pack, taken: Vec::new() })?)
    }
}

/// The content of the first frame's only member, the manifest.
fn first_member(pack: &mut Tee<impl BufRead>) -> Result<Vec<u8>, PackError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::UnexpectedEof => PackError::Truncated { within: MANIFEST_JSON.to_owned() },
        _ => PackError::Undecodable { at: 0, source },
    };
    let mut frame = zstd::Decoder::with_buffer(pack).map_err(failed)?.single_frame();
    let mut header = [0; BLOCK];
    frame.read_exact(&mut header).map_err(failed)?;
    let path = member::path_of(&header);
    let len = member::size_of(&header).filter(|_| member::is_header(&header) && path == MANIFEST_JSON);
    let Some(len) = len.filter(|&len| len <= MANIFEST_LIMIT) else { return Err(PackError::NotAPack { found: path }) };
    let mut content = Vec::new();
    (&mut frame).take(padded(len) + 1).read_to_end(&mut content).map_err(failed)?;
    if content.len() as u64 != padded(len) {
        return Err(PackError::member(MANIFEST_JSON, "has not a zstd frame of its own"));
    }
    content.truncate(len as usize);
    Ok(content)
}

/// Whether the next frame holds a signature; all of it has been taken then.
fn has_signature_next(pack: &mut Tee<impl BufRead>) -> Result<bool, PackError> {
    let failed = |source| PackError::Undecodable { at: 0, source };
    let mut frame = zstd::Decoder::with_buffer(pack).map_err(failed)?.single_frame();
    let mut header = [0; BLOCK];
    frame.read_exact(&mut header).map_err(failed)?;
    if member::path_of(&header) != MANIFEST_SIG {
        return Ok(false);
    }
    let mut rest = Vec::new();
    (&mut frame).take(BLOCK as u64 + 1).read_to_end(&mut rest).map_err(failed)?;
    Ok(rest.len() == BLOCK)
}

/// Keeps what was read.
struct Tee<R> {
    source: R,
    taken: Vec<u8>,
}

impl<R: BufRead> Read for Tee<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.fill_buf()?.read(buffer)?;
        self.consume(len);
        Ok(len)
    }
}

impl<R: BufRead> BufRead for Tee<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.source.fill_buf()
    }

    fn consume(&mut self, len: usize) {
        // What is consumed is what the last call of `fill_buf` gave, which it gives again without reading.
        if let Ok(buffer) = self.source.fill_buf() {
            self.taken.extend_from_slice(&buffer[..len]);
        }
        self.source.consume(len);
    }
}
