"""Files and folders of this host as tar streams."""

from __future__ import annotations

import os
import tarfile
import tempfile
from typing import IO, Union, cast

LocalPath = Union[str, "os.PathLike[str]"]
"""A path on this host."""

_SPOOL = 16 << 20
"""Larger streams are kept in a file."""

PIECE = 1 << 18


def spool() -> IO[bytes]:
    """Where a stream is kept."""
    return cast(IO[bytes], tempfile.SpooledTemporaryFile(max_size=_SPOOL))


def pack(source: LocalPath) -> IO[bytes]:
    """A file or folder as a tar stream whose entries start with its name."""
    absolute = os.path.abspath(source)
    stream = spool()
    try:
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
            tar.add(absolute, arcname=os.path.basename(absolute) or ".")
    except BaseException:
        stream.close()
        raise
    stream.seek(0)
    return stream


def unpack(stream: IO[bytes], directory: LocalPath) -> None:
    """Unpacks a tar stream into a folder, which is made if need be. Nothing of it gets outside of that folder: a guest
    is not to be trusted with the host's files."""
    if not hasattr(tarfile, "data_filter"):
        raise RuntimeError(
            "this Python's tarfile cannot unpack what is not to be trusted (no tarfile.data_filter); "
            "use 3.9.17, 3.10.12, 3.11.4 or later, or take the stream itself from files.read_archive"
        )
    os.makedirs(directory, exist_ok=True)
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        tar.extractall(directory, filter="data")
