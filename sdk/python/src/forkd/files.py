"""Files of a sandbox."""

from __future__ import annotations

import shutil
from typing import IO, TYPE_CHECKING, Iterator, List, Optional, TypeVar, Union

from . import _archive, _calls, _streams
from ._calls import Call, Content
from .errors import ControllerError
from .types import FileChange, FileInfo

if TYPE_CHECKING:
    from .sandbox import Sandbox

T = TypeVar("T")


class Files:
    """``sandbox.files``. Paths are absolute paths in the guest."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def read(self, path: str) -> bytes:
        """A file's content."""
        sandbox = self._sandbox
        return sandbox.controller.fetch(_calls.read_file(sandbox.id, path))

    def read_text(self, path: str, encoding: str = "utf-8") -> str:
        """A file's content as text."""
        return self.read(path).decode(encoding)

    def write(self, path: str, content: Content, *, mode: Optional[int] = None) -> None:
        """Creates or replaces a file, with the directories it needs; ``mode`` is its permissions."""
        self._call(_calls.write_file(self._sandbox.id, path, content, mode))

    def list(self, path: str) -> List[FileInfo]:
        """What is in a directory, by name."""
        return self._call(_calls.list_files(self._sandbox.id, path))

    def stat(self, path: str) -> FileInfo:
        """One file, a final symbolic link not followed."""
        return self._call(_calls.stat_file(self._sandbox.id, path))

    def exists(self, path: str) -> bool:
        """Whether there is anything at ``path``."""
        try:
            self.stat(path)
        except ControllerError as error:
            if error.status == 404:
                return False
            raise
        return True

    def mkdir(self, path: str) -> None:
        """Makes a directory and those above it."""
        self._call(_calls.make_directory(self._sandbox.id, path))

    def move(self, source: str, target: str) -> None:
        """Gives a file or directory another name."""
        self._call(_calls.move_file(self._sandbox.id, source, target))

    def remove(self, path: str, *, recursive: bool = False) -> None:
        """Removes a file, or with ``recursive`` a directory with all that is in it."""
        self._call(_calls.remove_file(self._sandbox.id, path, recursive))

    def upload(self, source: _archive.LocalPath, directory: str) -> None:
        """Copies a file or folder of this host into a directory of the guest, which is made if need be: ``site`` into
        ``/srv`` is ``/srv/site`` there. Permissions and times stay, owners do not."""
        with _archive.pack(source) as stream:
            self.write_archive(directory, stream)

    def download(self, path: str, directory: _archive.LocalPath) -> None:
        """Copies a file or folder of the guest into a directory of this host, which is made if need be. Links that lead
        outside of it and special files raise ``tarfile.FilterError``."""
        with self.read_archive(path) as stream:
            _archive.unpack(stream, directory)

    def read_archive(self, path: str) -> IO[bytes]:
        """A file or folder as a tar stream, whose entries start with its name."""
        sandbox = self._sandbox
        kept = _archive.spool()
        with sandbox.controller.open(_calls.read_archive(sandbox.id, path)) as stream:
            shutil.copyfileobj(stream, kept, _archive.PIECE)
        kept.seek(0)
        return kept

    def write_archive(self, directory: str, tar: Union[bytes, IO[bytes]], *, owners: bool = False) -> None:
        """Unpacks a tar stream into a directory, which is made if need be; ``owners`` gives files the owners that the
        stream names."""
        self.mkdir(directory)
        self._call(_calls.write_archive(self._sandbox.id, directory, tar, owners))

    def watch(self, path: str, *, recursive: bool = False) -> Iterator[FileChange]:
        """Yields changes as they happen, until the iteration is given up."""
        sandbox = self._sandbox
        with sandbox.controller.open(_calls.watch_files(sandbox.id, path, recursive), unlimited=True) as lines:
            for line in lines:
                change = _streams.file_change(line.decode())
                if change is not None:
                    yield change

    def _call(self, call: Call[T]) -> T:
        return self._sandbox.controller.call(call)
