"""What can go wrong."""

from __future__ import annotations

import json
import urllib.error
from typing import Any, Optional


class ControllerError(RuntimeError):
    """The daemon refused a request.

    ``status`` is the HTTP status, ``body`` the parsed body (text when it was not JSON), ``code`` the daemon's stable
    code for the cause (for example ``sandbox_not_found``) and ``message`` its words. ``retry_after`` is when to come
    again, in seconds, if the daemon says so.
    """

    def __init__(self, status: int, body: Any, url: str, retry_after: Optional[float] = None) -> None:
        self.status = status
        self.retry_after = retry_after
        self.body = body
        self.url = url
        said = body if isinstance(body, dict) else {}
        self.code: Optional[str] = said.get("code")
        self.message: str = said.get("error") or (body if isinstance(body, str) else json.dumps(body))
        super().__init__(f"controller {url}: HTTP {status}: {self.message}")


class DaemonUnreachable(urllib.error.URLError):
    """Nobody answers at the daemon's address. It is an ``OSError``, as every transport error is."""

    def __init__(self, address: str, reason: object) -> None:
        super().__init__(str(reason))
        self.address = address

    def __str__(self) -> str:
        return (
            f"no forkd daemon answers at {self.address} ({self.reason}); "
            'eval "$(forkd env)" finds or starts one and sets FORKD_URL and FORKD_TOKEN'
        )


class EvalError(RuntimeError):
    """The code raised. ``traceback`` is what the guest said about it."""

    def __init__(self, traceback: str) -> None:
        self.traceback = traceback
        super().__init__(f"forkd eval: {traceback}")


class StreamError(RuntimeError):
    """A stream ended badly: a program was not started or its end is not known, a watched directory is gone.

    ``code`` is the daemon's stable code for the cause.
    """

    def __init__(self, message: str, code: Optional[str]) -> None:
        self.code = code
        super().__init__(message)


class NotOverRest(RuntimeError):
    """The sandbox is reached through its agent alone, and the call needs the daemon."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} needs the daemon, and this sandbox is reached through its agent alone; "
            "make it with Sandbox.spawn(tag) or reach it with Sandbox.connect(id)"
        )


class MissingExtra(ImportError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs the package {package}: pip install 'forkd[{extra}]'")


def answer(status: int, raw: bytes, url: str, retry_after: Optional[str] = None) -> Any:
    """The value of an answer: parsed JSON, ``None`` for an empty body; a status outside 2xx raises. ``retry_after`` is
    its header of that name."""
    if 200 <= status < 300:
        return json.loads(raw) if raw else None
    try:
        body: Any = json.loads(raw) if raw else {}
    except ValueError:
        body = raw.decode(errors="replace")
    seconds = float(retry_after) if retry_after is not None and retry_after.isdigit() else None
    raise ControllerError(status, body, url, seconds)
