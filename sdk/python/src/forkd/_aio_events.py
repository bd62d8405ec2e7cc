"""What happens on a daemon, as coroutines."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, AsyncIterator, Optional

from ._contexts import AsyncContext
from .errors import ControllerError
from .events import SILENCE, Following, is_final
from .types import Event

if TYPE_CHECKING:
    import httpx

    from ._aio_controller import AsyncController


class AsyncEventStream(Following, AsyncContext, AsyncIterator[Event]):
    """What :class:`forkd.EventStream` is, as coroutines."""

    def __init__(
        self, controller: AsyncController, sandbox_id: Optional[str], after: Optional[int], patience: float
    ) -> None:
        super().__init__(sandbox_id, after, patience)
        self._controller = controller
        self._response: Optional[httpx.Response] = None

    async def connect(self) -> AsyncEventStream:
        """Begins to listen."""
        self._response = await self._controller.open(self._call(), silence=SILENCE)
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

    async def _leave(self) -> None:
        await self.aclose()

    async def _line(self) -> Optional[str]:
        """The next line; nothing when the connection broke or fell silent."""
        import httpx

        try:
            return await self._lines.__anext__()
        except (StopAsyncIteration, httpx.TransportError):
            return None

    async def _come_again(self) -> None:
        import httpx

        await self.aclose()
        deadline = self._deadline()
        while True:
            await asyncio.sleep(self._retry_secs)
            try:
                await self.connect()
                return
            except (ControllerError, OSError, httpx.TransportError) as error:
                if is_final(error, deadline):
                    raise
