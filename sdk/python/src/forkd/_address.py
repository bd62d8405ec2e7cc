"""Where the daemon is: ``http://HOST:PORT``, ``https://…`` or a unix socket, ``unix:///PATH`` or ``unix:/PATH``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Optional

USUAL = "http://127.0.0.1:8889"


@dataclass(frozen=True)
class Address:
    """A daemon's address. ``base`` is what paths are put behind; ``socket`` the unix socket, if it is one."""

    text: str
    base: str
    socket: Optional[str]

    @classmethod
    def parse(cls, text: str) -> Address:
        """Reads an address; trailing slashes are cut."""
        text = text.rstrip("/")
        if not text.startswith("unix:"):
            if not text.startswith(("http://", "https://")):
                raise ValueError(f"{text!r} is not a daemon's address; write http://HOST:PORT or unix:///PATH")
            return cls(text=text, base=text, socket=None)
        path = "/" + text[len("unix:") :].lstrip("/")
        if path == "/":
            raise ValueError(f"{text!r} names no socket; write unix:///PATH")
        return cls(text=text, base="http://localhost", socket=path)

    @classmethod
    def resolve(cls, base_url: Optional[str]) -> Address:
        """The given address, else ``FORKD_URL``, else the usual one."""
        return cls.parse(base_url or os.environ.get("FORKD_URL") or USUAL)


def resolve_token(token: Optional[str]) -> Optional[str]:
    """The given token, else ``FORKD_TOKEN``; an empty one is none."""
    found = token if token is not None else os.environ.get("FORKD_TOKEN")
    return (found or "").strip() or None
