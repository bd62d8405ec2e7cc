//! Fetching a large file that may take several attempts, in this run or the next.
//!
//! ```text
//!  <cache>/packs/<hash of the URL>.part     what has come so far
//!                                 .json     what the server said that it is part of
//! ```
//!
//! What is there is continued with `Range` and `If-Range`: the server sends the rest of the same file, or all of
//! another. Where it names nothing to tell one from the other, or knows no ranges, it begins anew.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use http::header::{CONTENT_RANGE, ETAG, IF_RANGE, LAST_MODIFIED, RANGE};
use reqwest::{Response, StatusCode};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::location::{Source, shown};
use super::transport::{Transport, TransportError};
use crate::failure::advised;
use crate::pack_file::hex;
use crate::progress::{Progress, Step};

/// Attempts in a row that bring nothing.
const ATTEMPTS: u32 = 5;
/// How long is waited after the first of them; twice as long after each further one.
const PAUSE: Duration = Duration::from_millis(500);
/// The longest that a server may ask to wait.
const PAUSE_LIMIT: Duration = Duration::from_secs(30);

/// What the server said about the file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    /// What tells this file from another at the same URL: a strong `ETag`, or else `Last-Modified`.
    validator: Option<String>,
    /// Its length.
    bytes: Option<u64>,
}

/// A file on its way, or here. It stays in the cache until [`Download::discard`].
#[derive(Debug)]
pub(crate) struct Download {
    source: Source,
    part: PathBuf,
    note_path: PathBuf,
    note: Note,
    /// Locked: two programs would write into each other's.
    file: File,
    bytes: u64,
}

impl Download {
    /// Takes up what is in `cache` of `source`, or begins.
    pub(crate) fn open(source: &Source, cache: &Path) -> anyhow::Result<Self> {
        let key = blake3::hash(source.url.as_str().as_bytes()).to_hex();
        let part = cache.join(format!("{key}.part"));
        let note_path = cache.join(format!("{key}.json"));
        let failed = || format!("could not open {}", part.display());
        fs::create_dir_all(cache).with_context(|| format!("could not create {}", cache.display()))?;
        let file = OpenOptions::new().read(true).append(true).create(true).open(&part).with_context(failed)?;
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let error = anyhow::anyhow!("another forkd is downloading {}", shown(&source.url));
            return Err(advised(error, "wait for it, or stop it"));
        }
        let bytes = file.metadata().with_context(failed)?.len();
        let note = fs::read(&note_path).ok().and_then(|json| serde_json::from_slice(&json).ok()).unwrap_or_default();
        Ok(Self { source: source.clone(), part, note_path, note, file, bytes })
    }

    /// Fetches what is missing and checks the whole.
    pub(crate) async fn finish(&mut self, transport: &Transport, progress: &Progress) -> anyhow::Result<()> {
        let step = progress.step(format!("Downloading {}", shown(&self.source.url)));
        let mut failures = 0;
        while !self.is_whole() {
            let before = self.bytes;
            match self.attempt(transport, &step).await {
                Ok(()) => break,
                Err(Failure::Here(error)) => return Err(error),
                Err(Failure::There(error)) => {
                    failures = if self.bytes > before { 1 } else { failures + 1 };
                    if !error.is_transient() || failures >= ATTEMPTS {
                        return Err(self.explain(error));
                    }
                    let pause = error.retry_after().unwrap_or(PAUSE * 2u32.pow(failures - 1)).min(PAUSE_LIMIT);
                    step.wait_for("the connection failed; trying again");
                    tokio::time::sleep(pause).await;
                }
            }
        }
        let checked = self.check(&step).await;
        if checked.is_err() {
            self.clear();
        } else {
            step.done(format_args!("Downloaded {}, {}", shown(&self.source.url), forkd_types::ByteSize(self.bytes)));
        }
        checked
    }

    /// The file, from its beginning.
    pub(crate) fn open_file(&self) -> anyhow::Result<File> {
        File::open(&self.part).with_context(|| format!("could not read {}", self.part.display()))
    }

    /// Its length so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Removes it from the cache.
    pub(crate) fn discard(self) {
        // What stays is written over by the next one of the same URL.
        let _ = fs::remove_file(&self.part);
        let _ = fs::remove_file(&self.note_path);
    }

    fn is_whole(&self) -> bool {
        self.note.validator.is_some() && self.note.bytes == Some(self.bytes) && self.bytes > 0
    }

    /// One request, as far as it comes.
    async fn attempt(&mut self, transport: &Transport, step: &Step) -> Result<(), Failure> {
        if self.bytes > 0 && self.note.validator.is_none() {
            self.clear();
        }
        let mut request = transport.get(&self.source.url);
        if let Some(validator) = self.note.validator.as_ref().filter(|_| self.bytes > 0) {
            request = request.header(RANGE, format!("bytes={}-", self.bytes)).header(IF_RANGE, validator);
        }
        let mut response = match transport.send(&self.source.url, request).await {
            // There is nothing behind what is here: it was of another file.
            Err(TransportError::Status { status: StatusCode::RANGE_NOT_SATISFIABLE, .. }) if self.bytes > 0 => {
                self.clear();
                transport.send(&self.source.url, transport.get(&self.source.url)).await?
            }
            other => other?,
        };
        self.begin(&response)?;
        if let Some(bytes) = self.note.bytes {
            step.set_bytes(bytes);
        }
        loop {
            step.set_position(self.bytes);
            if self.note.bytes.is_none() {
                step.detail(forkd_types::ByteSize(self.bytes).to_string());
            }
            let piece =
                response.chunk().await.map_err(|source| TransportError::connection(&self.source.url, source))?;
            let Some(piece) = piece else { break };
            let written =
                self.file.write_all(&piece).with_context(|| format!("could not write {}", self.part.display()));
            written.map_err(Failure::Here)?;
            self.bytes += piece.len() as u64;
        }
        // How long a file is that nobody announced is known at its end.
        self.note.bytes = Some(self.bytes);
        self.save()
    }

    /// Takes note of what an answer is: the rest of what is here, or all of it.
    fn begin(&mut self, response: &Response) -> Result<(), Failure> {
        let headers = response.headers();
        let text = |name| headers.get(name).and_then(|value: &http::HeaderValue| value.to_str().ok());
        let validator = text(ETAG).filter(|etag| !etag.starts_with("W/")).or_else(|| text(LAST_MODIFIED));
        if response.status() == StatusCode::PARTIAL_CONTENT {
            let range = text(CONTENT_RANGE).and_then(parse_range);
            let same = validator.is_none_or(|validator| Some(validator) == self.note.validator.as_deref());
            match range {
                Some((start, total)) if start == self.bytes && same => {
                    self.note.bytes = total.or(self.note.bytes);
                    return self.save();
                }
                _ => {
                    // A server that sends something else than what was asked for is asked for all of it.
                    self.clear();
                    let range = text(CONTENT_RANGE).unwrap_or("none").to_owned();
                    let error =
                        anyhow::anyhow!("{} sent another part than was asked for: {range}", shown(&self.source.url));
                    return Err(Failure::Here(advised(error, "the same again, from the beginning")));
                }
            }
        }
        self.clear();
        self.note = Note { validator: validator.map(str::to_owned), bytes: response.content_length() };
        self.save()
    }

    /// Forgets what has come.
    fn clear(&mut self) {
        // What cannot be cut is found to be wrong at the end.
        let _ = self.file.set_len(0);
        self.note = Note::default();
        self.bytes = 0;
    }

    fn save(&self) -> Result<(), Failure> {
        let json = serde_json::to_vec(&self.note).expect("plain data");
        fs::write(&self.note_path, json)
            .with_context(|| format!("could not write {}", self.note_path.display()))
            .map_err(Failure::Here)
    }

    async fn check(&mut self, step: &Step) -> anyhow::Result<()> {
        let url = shown(&self.source.url);
        if let Some(expected) = self.source.size_bytes {
            let bytes = self.bytes;
            ensure!(bytes == expected, "{url} has {bytes} bytes, the index says {expected}; it was not unpacked");
        }
        let Some(expected) = self.source.sha256.clone() else { return Ok(()) };
        step.wait_for("computing its SHA-256");
        let mut file = self.file.try_clone()?;
        let actual = tokio::task::spawn_blocking(move || sha256(&mut file)).await??;
        ensure!(actual == expected, "{url} has SHA-256 {actual}, the index says {expected}; it was not unpacked");
        Ok(())
    }

    fn explain(&self, error: TransportError) -> anyhow::Error {
        let kept = self.bytes > 0 && self.note.validator.is_some();
        let error = anyhow::Error::from(error).context(format!("could not download {}", shown(&self.source.url)));
        if kept { advised(error, "the same again; it goes on where it stopped") } else { error }
    }
}

/// Why an attempt failed.
enum Failure {
    There(TransportError),
    Here(anyhow::Error),
}

impl From<TransportError> for Failure {
    fn from(error: TransportError) -> Self {
        Self::There(error)
    }
}

/// Start and total of `bytes START-END/TOTAL`; the total may be `*`.
fn parse_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (start, end) = range.split_once('-')?;
    let (start, end): (u64, u64) = (start.parse().ok()?, end.parse().ok()?);
    let total = if total == "*" { None } else { Some(total.parse().ok()?) };
    (start <= end && total.is_none_or(|total| end < total)).then_some((start, total))
}

fn sha256(file: &mut File) -> io::Result<String> {
    file.seek(SeekFrom::Start(0))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hasher.finalize())),
            len => hasher.update(&buffer[..len]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_servers_send() {
        assert_eq!(parse_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(parse_range("bytes 5-9/*"), Some((5, None)));
        for bad in ["", "bytes */10", "bytes 9-5/10", "bytes 5-10/10", "items 5-9/10", "bytes 5-9", "bytes -5-9/10"] {
            assert_eq!(parse_range(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_as_a_range_without_panic(text: String) {
            let _ = parse_range(&text);
        }
    }
}
