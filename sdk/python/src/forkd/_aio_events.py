"""What happens on a daemon, as coroutines."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import TYPE_CHECKING, AsyncIterator, Optional, Type

from . import _calls, _streams
from .errors import ControllerError
from .events import COMES_BACK, SILENCE
from .types import Event

if TYPE_CHECKING:
    import httpx

    from ._aio_controller import AsyncController


class AsyncEventStream(AsyncIterator[Event]):
    """What :class:`forkd.EventStream` is, as coroutines."""

    def __init__(
        self, controller: AsyncController, sandbox_id: Optional[str], after: Optional[int], patience: float
    ) -> None:
        self._controller = controller
        self._sandbox_id = sandbox_id
        self._patience = patience
        self._retry_secs = 1.0
        self._response: Optional[httpx.Response] = None
        self.last_id = after
        """Id of the last event, with which a later stream goes on: ``events(after=…)``."""

    async def connect(self) -> AsyncEventStream:
        """Begins to listen."""
        call = _calls.events(self._sandbox_id, self.last_id)
        self._response = await self._controller.open(call, silence=SILENCE)
        self._lines = self._response.aiter_lines()
        # The greeting, as in the blocking client.
        while True:
            line = await self._line()
            if line is None or self._take(line).retry_secs is not None:
                return self

    async def __anext__(self) -> Event:
        while self._response is not None:
            line = await self._line()
            if line is None:
                await self._come_again()
                continue
            said = self._take(line)
            if said.event is not None:
                return said.event
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Gives it up."""
        response, self._response = self._response, None
        if response is not None:
            await response.aclose()

    async def __aenter__(self) -> AsyncEventStream:
        return self

    async def __aexit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        await self.aclose()

    async def _line(self) -> Optional[str]:
        """The next line; nothing when the connection broke or fell silent."""
        import httpx

        try:
            return await self._lines.__anext__()
        except (StopAsyncIteration, httpx.TransportError):
            return None

    def _take(self, line: str) -> _streams.ServerLine:
        said = _streams.server_line(line)
        if said.last_id is not None:
            self.last_id = said.last_id
        if said.retry_secs is not None:
            self._retry_secs = said.retry_secs
        return said

    async def _come_again(self) -> None:
        import httpx

        await self.aclose()
        deadline = time.monotonic() + self._patience
        while True:
            await asyncio.sleep(self._retry_secs)
            try:
                await self.connect()
                return
            except (ControllerError, OSError, httpx.TransportError) as error:
                for_good = isinstance(error, ControllerError) and error.status not in COMES_BACK
                if for_good or time.monotonic() > deadline:
                    raise
