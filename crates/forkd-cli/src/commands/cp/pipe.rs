//! Bytes between a connection and the tar library, which reads and writes on a thread that may block.

use std::io::{self, Read, Write};

use tokio::sync::mpsc::{self, Receiver, Sender};

/// Pieces on their way.
const QUEUE: usize = 16;

/// Bytes gathered before they are handed on.
const PIECE: usize = 64 << 10;

/// Both ends of a pipe from a writer that blocks.
pub(super) fn from_writer() -> (PieceWriter, Receiver<Vec<u8>>) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    (PieceWriter { sender, pending: Vec::with_capacity(PIECE) }, receiver)
}

/// Both ends of a pipe to a reader that blocks.
pub(super) fn to_reader() -> (Sender<io::Result<Vec<u8>>>, PieceReader) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    (sender, PieceReader { receiver, current: Vec::new(), at: 0 })
}

/// Writes into the pipe; fails when the other end is gone. What is left is handed on by `flush`.
pub(super) struct PieceWriter {
    sender: Sender<Vec<u8>>,
    pending: Vec<u8>,
}

impl Write for PieceWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(PIECE - self.pending.len());
        self.pending.extend_from_slice(&bytes[..taken]);
        if self.pending.len() == PIECE {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let piece = std::mem::replace(&mut self.pending, Vec::with_capacity(PIECE));
        self.sender.blocking_send(piece).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

/// Reads from the pipe. One that ends without a word is at its end, one that breaks off says so first.
pub(super) struct PieceReader {
    receiver: Receiver<io::Result<Vec<u8>>>,
    current: Vec<u8>,
    at: usize,
}

impl Read for PieceReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.current.len() {
            match self.receiver.blocking_recv() {
                Some(piece) => (self.current, self.at) = (piece?, 0),
                None => return Ok(0),
            }
        }
        let taken = buffer.len().min(self.current.len() - self.at);
        buffer[..taken].copy_from_slice(&self.current[self.at..self.at + taken]);
        self.at += taken;
        Ok(taken)
    }
}
