"""What happens on a daemon, as it happens."""

from __future__ import annotations

import http.client
import time
from typing import IO, TYPE_CHECKING, Iterator, Optional

from . import _calls, _streams
from ._calls import Call
from ._contexts import Context
from .errors import ControllerError
from .types import Event

if TYPE_CHECKING:
    from .controller import Controller

SILENCE = 60.0
"""A stream that says nothing for this long, in seconds, is dead: the daemon says something every 15."""

COMES_BACK = (429, 502, 503, 504)
"""Answers to the attempt to come again that say nothing for good."""


class Following:
    """Where a stream is in the order of events, and when it comes again."""

    def __init__(self, sandbox_id: Optional[str], after: Optional[int], patience: float) -> None:
        self._sandbox_id = sandbox_id
        self._patience = patience
        self._retry_secs = 1.0
        self.last_id = after
        """Id of the last event, with which a later stream goes on: ``events(after=…)``."""

    def _call(self) -> Call[None]:
        return _calls.events(self._sandbox_id, self.last_id)

    def _take(self, line: str) -> _streams.ServerLine:
        said = _streams.server_line(line)
        if said.last_id is not None:
            self.last_id = said.last_id
        if said.retry_secs is not None:
            self._retry_secs = said.retry_secs
        return said

    def _deadline(self) -> float:
        """When a daemon that went away now is not waited for any longer."""
        return time.monotonic() + self._patience


def is_final(error: Exception, deadline: float) -> bool:
    """Whether a stream whose attempt to come again ended in ``error`` ends with it."""
    for_good = isinstance(error, ControllerError) and error.status not in COMES_BACK
    return for_good or time.monotonic() > deadline


class EventStream(Following, Context, Iterator[Event]):
    """Events since it was made; see :meth:`Controller.events`.

    It comes again by itself when its connection breaks, and goes on after the last event it has given. A daemon that is
    away for longer than ``patience`` seconds ends it with an error.
    """

    def __init__(
        self, controller: Controller, sandbox_id: Optional[str], after: Optional[int], patience: float
    ) -> None:
        super().__init__(sandbox_id, after, patience)
        self._controller = controller
        self._closed = False
        self._lines: IO[bytes]
        self._connect()

    def __next__(self) -> Event:
        while not self._closed:
            line = self._line()
            if not line:
                self._come_again()
                continue
            said = self._take(line.decode())
            if said.event is not None:
                return said.event
        raise StopIteration

    def close(self) -> None:
        """Gives it up."""
        self._closed = True
        self._lines.close()

    def _leave(self) -> None:
        self.close()

    def _connect(self) -> None:
        self._lines = self._controller.open(self._call(), limit=SILENCE)
        # The greeting says where it is in the order of events, so that nothing is missed from here on, and ends in when
        # to come again.
        while True:
            line = self._line()
            if not line or self._take(line.decode()).retry_secs is not None:
                return

    def _line(self) -> bytes:
        """The next line; empty when the connection broke or fell silent."""
        try:
            return self._lines.readline()
        except (OSError, http.client.HTTPException):
            return b""

    def _come_again(self) -> None:
        self._lines.close()
        deadline = self._deadline()
        while True:
            time.sleep(self._retry_secs)
            try:
                self._connect()
                return
            except (ControllerError, OSError, http.client.HTTPException) as error:
                if is_final(error, deadline):
                    self._closed = True
                    raise
