//! One interpreter process and the two sockets that lead to it.
//!
//! Messages are a little-endian `u32` length and that many bytes of JSON.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::Language;
use crate::reaper::{ExitWatch, Reaper};
use crate::spawn::{self, Program, Streams};

/// The longest message that is believed to be one.
const MESSAGE_LIMIT: usize = 256 << 20;

/// What an interpreter answers to source text.
#[derive(Debug, Deserialize)]
pub(super) struct Reply {
    #[serde(default)]
    pub(super) result: Option<String>,
    #[serde(default)]
    pub(super) error: Option<String>,
    #[serde(default)]
    pub(super) numpy: Option<String>,
    /// The code left nothing that goes on running.
    #[serde(default)]
    pub(super) alone: bool,
}

/// A running interpreter.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) watch: ExitWatch,
    /// Standard output and error, until the code closes them.
    pub(super) streams: [Option<OwnedFd>; 2],
    /// Source text goes here, replies come back; non-blocking.
    pub(super) work: UnixStream,
    pub(super) received: MessageBuffer,
    /// For whoever reseeds, at any time.
    pub(super) control: Arc<Mutex<UnixStream>>,
}

impl Process {
    /// Starts `program` as the runner of `language`.
    pub(super) fn start(
        reaper: &Arc<Reaper>,
        language: Language,
        program: &Path,
        mut environment: BTreeMap<String, String>,
    ) -> io::Result<Self> {
        let (work, its_work) = UnixStream::pair()?;
        let (control, its_control) = UnixStream::pair()?;
        environment
            .insert("FORKD_RUNTIME_FDS".to_owned(), format!("{},{}", its_work.as_raw_fd(), its_control.as_raw_fd()));
        environment.insert("PYTHONIOENCODING".to_owned(), "utf-8".to_owned());
        let [flag, source] = language.arguments();
        let (watch, ends) = spawn::start(
            reaper,
            Program {
                path: program.to_owned(),
                args: vec![language.program().to_owned(), flag.to_owned(), source.to_owned()],
                environment,
                directory: "/".into(),
                credentials: None,
                streams: Streams::Pipes { input: false },
                keeps: vec![its_work.into(), its_control.into()],
            },
        )?;
        let output = ends.output.expect("pipes were asked for");
        let errors = ends.errors.expect("pipes were asked for");
        rustix::io::ioctl_fionbio(&output, true)?;
        rustix::io::ioctl_fionbio(&errors, true)?;
        work.set_nonblocking(true)?;
        Ok(Self {
            watch,
            streams: [Some(output), Some(errors)],
            work,
            received: MessageBuffer::default(),
            control: Arc::new(Mutex::new(control)),
        })
    }
}

/// A message's bytes.
pub(super) fn encode(message: &serde_json::Value) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message).expect("a JSON value is written to memory");
    let len = (bytes.len() - 4) as u32;
    bytes[..4].copy_from_slice(&len.to_le_bytes());
    bytes
}

/// Messages out of a stream that delivers bytes in pieces.
#[derive(Debug, Default)]
pub(super) struct MessageBuffer(Vec<u8>);

impl MessageBuffer {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(super) fn next<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        let Some((len, rest)) = self.0.split_first_chunk() else { return Ok(None) };
        let len = u32::from_le_bytes(*len) as usize;
        if len > MESSAGE_LIMIT {
            let text = format!("a message of {len} bytes exceeds the limit of {MESSAGE_LIMIT}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        let Some(payload) = rest.get(..len) else { return Ok(None) };
        let message = serde_json::from_slice(payload)?;
        self.0.drain(..4 + len);
        Ok(Some(message))
    }
}
