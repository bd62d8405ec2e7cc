"""Folders as tar streams, on this host. Needs no daemon."""

from __future__ import annotations

import asyncio
import io
import os
import tarfile
import tempfile
import unittest
from pathlib import Path
from typing import Any, Dict

from forkd import AsyncController, AsyncSandbox, Controller, Sandbox

from .http_server import Recorder
from .test_requests import INFO


def tar_of(*entries: tarfile.TarInfo) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for entry in entries:
            tar.addfile(entry, io.BytesIO(b"x" * entry.size))
    return stream.getvalue()


def entry(name: str, **fields: Any) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(made, field, value)
    return made


class Archives(unittest.TestCase):
    def setUp(self) -> None:
        self.server = Recorder().__enter__()
        self.addCleanup(self.server.__exit__)
        self.server.answer = (204, b"")
        self.sandbox = Sandbox.of(Controller(self.server.url), INFO)  # type: ignore[arg-type]
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.scratch = Path(scratch.name)

    def unpacked(self) -> Dict[str, bytes]:
        """What was sent last, by name."""
        with tarfile.open(fileobj=io.BytesIO(self.server.last()["body"])) as tar:
            files = ((member.name, tar.extractfile(member)) for member in tar.getmembers())
            return {name: file.read() for name, file in files if file is not None}

    def test_a_folder_goes_under_its_name(self) -> None:
        (self.scratch / "site/deep").mkdir(parents=True)
        (self.scratch / "site/deep/é").write_bytes(b"content")
        self.sandbox.files.upload(self.scratch / "site", "/srv")
        self.assertEqual(self.server.requests[-2]["path"], "/v1/sandboxes/sb-1-0000/files/mkdir")
        last = self.server.last()
        self.assertEqual((last["method"], last["path"]), ("PUT", "/v1/sandboxes/sb-1-0000/files/archive?path=%2Fsrv"))
        self.assertEqual(self.unpacked(), {"site/deep/é": b"content"})

        async def drive() -> None:
            async with AsyncController(self.server.url) as controller:
                await AsyncSandbox(controller, INFO).files.upload(self.scratch / "site/deep", "/srv")  # type: ignore[arg-type]

        asyncio.run(drive())
        self.assertEqual(self.unpacked(), {"deep/é": b"content"})

    def test_what_comes_back_stays_in_its_folder(self) -> None:
        self.server.answer = (200, tar_of(entry("data/file", size=3, mode=0o640)))
        self.sandbox.files.download("/data", self.scratch / "new/folder")
        self.assertEqual((self.scratch / "new/folder/data/file").read_bytes(), b"xxx")
        for evil in (
            tar_of(entry("../outside", size=1)),
            tar_of(entry("link", type=tarfile.SYMTYPE, linkname="/etc"), entry("link/passwd", size=1)),
            tar_of(entry("hard", type=tarfile.LNKTYPE, linkname="../../etc/passwd")),
            tar_of(entry("device", type=tarfile.CHRTYPE)),
        ):
            self.server.answer = (200, evil)
            with self.assertRaises(tarfile.FilterError):
                self.sandbox.files.download("/data", self.scratch / "target")
        self.assertEqual(os.listdir(self.scratch / "target"), [])
        self.assertFalse((self.scratch / "outside").exists())


if __name__ == "__main__":
    unittest.main()
