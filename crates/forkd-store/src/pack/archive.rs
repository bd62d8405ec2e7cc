//! The bytes of a pack, decompressed, block by block.
//!
//! Decompression runs on a thread of its own, so that it and hashing and writing overlap.

use std::io::{self, Cursor, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::Scope;

use super::error::PackError;
use super::member::{self, BLOCK, Block, SparseHead, padded};
use super::sparse_map::SparseMap;

/// The first bytes of a zstd frame.
const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// The most memory that decompression takes, as a power of two: what zstd itself allows unless told otherwise.
const WINDOW_LOG: u32 = 27;
/// How much is decompressed at a time.
const CHUNK: usize = 1 << 20;
/// How many chunks wait.
const QUEUE: usize = 4;

/// What the decompressing thread hands over.
type Chunk = io::Result<Vec<u8>>;

/// The content of a pack, front to back.
pub(super) struct Archive {
    chunks: Receiver<Chunk>,
    current: Vec<u8>,
    at: usize,
    /// Bytes of content that went by.
    position: u64,
    /// Which member is being read, for messages.
    within: String,
}

/// The head of a sparse member and its map.
pub(super) struct SparseContent {
    pub(super) map: SparseMap,
    pub(super) map_text: Vec<u8>,
}

impl Archive {
    /// Begins to decompress `pack`.
    ///
    /// # Errors
    /// [`PackError::NotZstd`].
    pub(super) fn open<'scope>(
        scope: &'scope Scope<'scope, '_>,
        mut pack: impl Read + Send + 'scope,
    ) -> Result<Self, PackError> {
        let mut first = Vec::new();
        let cannot_read = |source| PackError::Undecodable { at: 0, source };
        (&mut pack).take(MAGIC.len() as u64).read_to_end(&mut first).map_err(cannot_read)?;
        if first != MAGIC {
            return Err(PackError::NotZstd { first });
        }
        let (sender, chunks) = sync_channel(QUEUE);
        scope.spawn(move || decompress(Cursor::new(first).chain(pack), &sender));
        Ok(Self { chunks, current: Vec::new(), at: 0, position: 0, within: super::manifest::MANIFEST_JSON.to_owned() })
    }

    /// Says which member comes next, for messages.
    pub(super) fn enter(&mut self, path: &str) {
        path.clone_into(&mut self.within);
    }

    /// The next bytes, at most `limit` and at least one.
    pub(super) fn piece(&mut self, limit: u64) -> Result<&[u8], PackError> {
        if self.at == self.current.len() && !self.next_chunk()? {
            return Err(PackError::Truncated { within: self.within.clone() });
        }
        let from = self.at;
        let len = limit.min((self.current.len() - from) as u64);
        self.at += len as usize;
        self.position += len;
        Ok(&self.current[from..self.at])
    }

    /// Fills `buffer`.
    pub(super) fn fill(&mut self, buffer: &mut [u8]) -> Result<(), PackError> {
        let mut filled = 0;
        while filled < buffer.len() {
            let piece = self.piece((buffer.len() - filled) as u64)?;
            buffer[filled..filled + piece.len()].copy_from_slice(piece);
            filled += piece.len();
        }
        Ok(())
    }

    /// The next block.
    pub(super) fn block(&mut self) -> Result<Block, PackError> {
        let mut block = [0; BLOCK];
        self.fill(&mut block)?;
        Ok(block)
    }

    /// The next block, which stays to be read.
    pub(super) fn peek_block(&mut self) -> Result<Block, PackError> {
        let block = self.block()?;
        let rest = self.current.split_off(self.at);
        self.current = [block.as_slice(), &rest].concat();
        self.at = 0;
        self.position -= BLOCK as u64;
        Ok(block)
    }

    /// Passes over the padding behind `len` bytes of content, which must be zeros.
    pub(super) fn padding(&mut self, len: u64) -> Result<(), PackError> {
        let mut padding = [0; BLOCK];
        let padding = &mut padding[..(padded(len) - len) as usize];
        self.fill(padding)?;
        if padding.iter().any(|&byte| byte != 0) {
            return Err(PackError::member(&self.within, "is padded with something else than zeros"));
        }
        Ok(())
    }

    /// Reads the head and map of the sparse member at `path`; `header` is the block that was read already.
    pub(super) fn sparse_head(
        &mut self,
        path: &str,
        header: &Block,
        bytes: u64,
        data_bytes: u64,
    ) -> Result<SparseContent, PackError> {
        let unlike = || PackError::member(path, "has a header unlike what the manifest declares");
        // Only the size of the content, which the map is part of, is not known beforehand.
        let head = SparseHead::new(path, bytes, 0)?;
        if header != head.extended() {
            return Err(unlike());
        }
        let mut records = vec![0; head.records().len()];
        self.fill(&mut records)?;
        self.padding(records.len() as u64)?;
        let content = self.block()?;
        let stored_bytes = member::size_of(&content).ok_or_else(unlike)?;
        let head = SparseHead::new(path, bytes, stored_bytes)?;
        if records != head.records() || content != *head.content() {
            return Err(unlike());
        }
        let (map, map_text) =
            SparseMap::read::<MapError>(bytes, data_bytes, || self.block().map_err(MapError::Archive))
                .map_err(|error| error.of(path))?;
        if map_text.len() as u64 + data_bytes != stored_bytes {
            return Err(unlike());
        }
        Ok(SparseContent { map, map_text })
    }

    /// Reads the rest, which must be nothing.
    pub(super) fn end(&mut self) -> Result<(), PackError> {
        if self.at < self.current.len() {
            return Err(PackError::TrailingBytes);
        }
        match self.next_chunk() {
            Ok(false) => Ok(()),
            // What follows is no frame, or another one.
            Ok(true) | Err(PackError::Undecodable { .. }) => Err(PackError::TrailingBytes),
            Err(error) => Err(error),
        }
    }

    fn next_chunk(&mut self) -> Result<bool, PackError> {
        match self.chunks.recv() {
            // The thread ends without an error at the end of the last frame.
            Err(_) => Ok(false),
            Ok(Ok(chunk)) => {
                (self.current, self.at) = (chunk, 0);
                Ok(true)
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(PackError::Truncated { within: self.within.clone() })
            }
            Ok(Err(source)) => Err(PackError::Undecodable { at: self.position, source }),
        }
    }
}

/// Why a map could not be read.
enum MapError {
    Archive(PackError),
    Map(String),
}

impl From<String> for MapError {
    fn from(reason: String) -> Self {
        Self::Map(reason)
    }
}

impl MapError {
    fn of(self, path: &str) -> PackError {
        match self {
            Self::Archive(error) => error,
            Self::Map(reason) => PackError::member(path, reason),
        }
    }
}

/// Hands over the content of `pack` until its end, an error, or until nobody takes it any more.
fn decompress(pack: impl Read, chunks: &SyncSender<Chunk>) {
    let run = || -> io::Result<()> {
        let mut decoder = zstd::Decoder::new(pack)?;
        decoder.window_log_max(WINDOW_LOG)?;
        loop {
            let mut chunk = Vec::with_capacity(CHUNK);
            let failed = (&mut decoder).take(CHUNK as u64).read_to_end(&mut chunk).err();
            let end = chunk.len() < CHUNK;
            if !chunk.is_empty() && chunks.send(Ok(chunk)).is_err() {
                return Ok(());
            }
            match failed {
                Some(error) => return Err(error),
                None if end => return Ok(()),
                None => {}
            }
        }
    };
    if let Err(error) = run() {
        // Nobody left to tell is fine.
        let _ = chunks.send(Err(error));
    }
}
