"""Files of a sandbox, as coroutines."""

from __future__ import annotations

import asyncio
from typing import IO, TYPE_CHECKING, AsyncIterator, List, Optional, TypeVar, Union

from . import _archive, _calls, _streams
from ._calls import Call
from .errors import ControllerError
from .types import FileChange, FileInfo

if TYPE_CHECKING:
    from ._aio_sandbox import AsyncSandbox

T = TypeVar("T")


class AsyncFiles:
    """Files of a sandbox; see :class:`forkd.files.Files`."""

    def __init__(self, sandbox: AsyncSandbox) -> None:
        self._sandbox = sandbox

    async def read(self, path: str) -> bytes:
        """A file's content."""
        return await self._sandbox.controller.fetch(_calls.read_file(self._sandbox.id, path))

    async def read_text(self, path: str, encoding: str = "utf-8") -> str:
        """A file's content as text."""
        return (await self.read(path)).decode(encoding)

    async def write(self, path: str, content: _calls.Content, *, mode: Optional[int] = None) -> None:
        """Creates or replaces a file, with the directories it needs."""
        await self._call(_calls.write_file(self._sandbox.id, path, content, mode))

    async def list(self, path: str) -> List[FileInfo]:
        """What is in a directory, by name."""
        return await self._call(_calls.list_files(self._sandbox.id, path))

    async def stat(self, path: str) -> FileInfo:
        """One file, a final symbolic link not followed."""
        return await self._call(_calls.stat_file(self._sandbox.id, path))

    async def exists(self, path: str) -> bool:
        """Whether there is anything at ``path``."""
        try:
            await self.stat(path)
        except ControllerError as error:
            if error.status == 404:
                return False
            raise
        return True

    async def mkdir(self, path: str) -> None:
        """Makes a directory and those above it."""
        await self._call(_calls.make_directory(self._sandbox.id, path))

    async def move(self, source: str, target: str) -> None:
        """Gives a file or directory another name."""
        await self._call(_calls.move_file(self._sandbox.id, source, target))

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Removes a file, or with ``recursive`` a directory with all that is in it."""
        await self._call(_calls.remove_file(self._sandbox.id, path, recursive))

    async def upload(self, source: _archive.LocalPath, directory: str) -> None:
        """Copies a file or folder of this host into a directory of the guest; see :meth:`forkd.files.Files.upload`."""
        with await asyncio.to_thread(_archive.pack, source) as stream:
            await self.write_archive(directory, stream)

    async def download(self, path: str, directory: _archive.LocalPath) -> None:
        """Copies a file or folder of the guest into a directory of this host; see
        :meth:`forkd.files.Files.download`."""
        with await self.read_archive(path) as stream:
            await asyncio.to_thread(_archive.unpack, stream, directory)

    async def read_archive(self, path: str) -> IO[bytes]:
        """A file or folder as a tar stream, whose entries start with its name."""
        kept = _archive.spool()
        response = await self._sandbox.controller.open(_calls.read_archive(self._sandbox.id, path))
        try:
            async for piece in response.aiter_bytes(_archive.PIECE):
                await asyncio.to_thread(kept.write, piece)
        finally:
            await response.aclose()
        kept.seek(0)
        return kept

    async def write_archive(self, directory: str, tar: Union[bytes, IO[bytes]], *, owners: bool = False) -> None:
        """Unpacks a tar stream into a directory, which is made if need be."""
        await self.mkdir(directory)
        await self._call(_calls.write_archive(self._sandbox.id, directory, tar, owners))

    async def watch(self, path: str, *, recursive: bool = False) -> AsyncIterator[FileChange]:
        """Yields changes as they happen, until the iteration is given up."""
        async for line in self._sandbox.controller.lines(_calls.watch_files(self._sandbox.id, path, recursive)):
            change = _streams.file_change(line)
            if change is not None:
                yield change

    async def _call(self, call: Call[T]) -> T:
        return await self._sandbox.controller.call(call)
