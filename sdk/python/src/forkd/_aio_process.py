"""A program that runs, for asynchronous callers. Needs the extra ``forkd[pty]``."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, AsyncIterator, Dict, Mapping, Optional, Tuple, Union

from . import _calls, _streams
from ._contexts import AsyncContext
from .errors import MissingExtra, answer

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

    from ._aio_controller import AsyncController


class AsyncProcess(AsyncContext):
    """What :class:`forkd.Process` is, as coroutines."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self.pid: Optional[int] = None
        self.exit_code: Optional[int] = None
        self.timed_out = False

    @classmethod
    async def start(cls, controller: AsyncController, sandbox_id: str, message: Mapping[str, Any]) -> AsyncProcess:
        """Starts the program that ``message`` describes."""
        try:
            from websockets.asyncio.client import connect, unix_connect
            from websockets.exceptions import InvalidStatus
        except ImportError as error:
            raise MissingExtra("an interactive program", "websockets", "pty") from error
        url = controller.address.base + _calls.sandbox(sandbox_id, "/exec/stream")
        address = "ws" + url[len("http") :]
        headers = {"Authorization": f"Bearer {controller.token}"} if controller.token else {}
        options: Dict[str, Any] = {"additional_headers": headers, "max_size": None, "compression": None}
        socket = controller.address.socket
        try:
            if socket is not None:
                connection = await unix_connect(socket, address, **options)
            else:
                connection = await connect(address, **options)
        except InvalidStatus as error:
            answer(error.response.status_code, bytes(error.response.body or b""), url)
            raise
        process = cls(connection)
        await connection.send(json.dumps(message))
        process.pid = (await process._next(None)).pid
        return process

    async def write(self, data: Union[str, bytes]) -> None:
        """Writes to its standard input, or types on its terminal."""
        for message in _streams.stdin_messages(data):
            await self._connection.send(message)

    async def close_stdin(self) -> None:
        """Ends its standard input."""
        await self._connection.send(_streams.STDIN)

    async def resize(self, rows: int, columns: int) -> None:
        """Gives its terminal another size."""
        await self._connection.send(_streams.resize_message(rows, columns))

    async def signal(self, signal: Union[int, str]) -> None:
        """Sends its process group a signal, by number or name."""
        await self._connection.send(_streams.signal_message(signal))

    async def kill(self) -> None:
        """Kills its process group."""
        await self.signal("KILL")

    async def read(self, timeout: Optional[float] = None) -> Optional[Tuple[str, bytes]]:
        """The next output and the stream it was written to; ``None`` when the program has ended."""
        while self.exit_code is None:
            event = await self._next(timeout)
            if event.exit_code is not None:
                self.exit_code, self.timed_out = event.exit_code, event.timed_out
                await self.close()
            elif event.stream is not None:
                return event.stream, event.data
        return None

    async def __aiter__(self) -> AsyncIterator[Tuple[str, bytes]]:
        while True:
            piece = await self.read()
            if piece is None:
                return
            yield piece

    async def wait(self, timeout: Optional[float] = None) -> int:
        """Takes the rest of its output, and returns its exit code when it has ended."""
        while await self.read(timeout) is not None:
            pass
        assert self.exit_code is not None
        return self.exit_code

    async def close(self) -> None:
        """Gives it up; it is killed if it runs."""
        await self._connection.close()

    async def _leave(self) -> None:
        await self.close()

    async def _next(self, timeout: Optional[float]) -> _streams.ExecEvent:
        from websockets.exceptions import ConnectionClosed

        try:
            return _streams.exec_message(await asyncio.wait_for(self._connection.recv(), timeout))
        except asyncio.TimeoutError as error:
            raise TimeoutError(f"the program wrote nothing for {timeout} s") from error
        except ConnectionClosed as error:
            raise ConnectionError("the daemon closed the connection before the program had ended") from error
