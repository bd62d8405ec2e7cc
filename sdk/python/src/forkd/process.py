"""A program that runs: its streams, terminal and signals, over a WebSocket. Needs the extra ``forkd[pty]``."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Dict, Iterator, Mapping, Optional, Tuple, Union

from . import _calls, _streams
from ._contexts import Context
from .errors import MissingExtra, answer

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

    from .controller import Controller


class Process(Context):
    """A program that was started with ``commands.start`` or ``pty``.

    Iterating yields ``(stream, bytes)`` as output comes, ``stream`` being ``"stdout"`` or ``"stderr"``, until the
    program has ended; then :attr:`exit_code` is set. Closing it earlier kills the program.
    """

    def __init__(self, connection: ClientConnection, held: ExitStack) -> None:
        self._connection = connection
        self._held = held
        self.pid: Optional[int] = None
        self.exit_code: Optional[int] = None
        self.timed_out = False

    @classmethod
    def start(cls, controller: Controller, sandbox_id: str, message: Mapping[str, Any]) -> Process:
        """Starts the program that ``message`` describes."""
        try:
            from websockets.exceptions import InvalidStatus
            from websockets.sync.client import connect, unix_connect
        except ImportError as error:
            raise MissingExtra("an interactive program", "websockets", "pty") from error
        url = controller.address.base + _calls.sandbox(sandbox_id, "/exec/stream")
        address = "ws" + url[len("http") :]
        headers = {"Authorization": f"Bearer {controller.token}"} if controller.token else {}
        options: Dict[str, Any] = {"additional_headers": headers, "max_size": None, "compression": None}
        socket = controller.address.socket
        held = ExitStack()
        try:
            opening = unix_connect(socket, address, **options) if socket else connect(address, **options)
            connection = held.enter_context(opening)
        except InvalidStatus as error:
            answer(error.response.status_code, bytes(error.response.body or b""), url)
            raise
        process = cls(connection, held)
        connection.send(json.dumps(message))
        event = process._next(None)
        process.pid = event.pid
        return process

    def write(self, data: Union[str, bytes]) -> None:
        """Writes to its standard input, or types on its terminal."""
        for message in _streams.stdin_messages(data):
            self._connection.send(message)

    def close_stdin(self) -> None:
        """Ends its standard input."""
        self._connection.send(_streams.STDIN)

    def resize(self, rows: int, columns: int) -> None:
        """Gives its terminal another size."""
        self._connection.send(_streams.resize_message(rows, columns))

    def signal(self, signal: Union[int, str]) -> None:
        """Sends its process group a signal, by number or name."""
        self._connection.send(_streams.signal_message(signal))

    def kill(self) -> None:
        """Kills its process group."""
        self.signal("KILL")

    def read(self, timeout: Optional[float] = None) -> Optional[Tuple[str, bytes]]:
        """The next output and the stream it was written to; ``None`` when the program has ended.

        Raises ``TimeoutError`` when nothing comes for ``timeout`` seconds.
        """
        while self.exit_code is None:
            event = self._next(timeout)
            if event.exit_code is not None:
                self.exit_code, self.timed_out = event.exit_code, event.timed_out
                self.close()
            elif event.stream is not None:
                return event.stream, event.data
        return None

    def __iter__(self) -> Iterator[Tuple[str, bytes]]:
        while True:
            piece = self.read()
            if piece is None:
                return
            yield piece

    def read_until(self, marker: Union[str, bytes], timeout: float = 30) -> bytes:
        """All output until ``marker`` was in it. Raises ``EOFError`` when the program ends first."""
        wanted = marker.encode() if isinstance(marker, str) else marker
        seen = b""
        while wanted not in seen:
            piece = self.read(timeout)
            if piece is None:
                raise EOFError(f"the program ended with {self.exit_code} before it wrote {wanted!r}; it wrote {seen!r}")
            seen += piece[1]
        return seen

    def wait(self, timeout: Optional[float] = None) -> int:
        """Takes the rest of its output, and returns its exit code when it has ended."""
        while self.read(timeout) is not None:
            pass
        assert self.exit_code is not None
        return self.exit_code

    def close(self) -> None:
        """Gives it up; it is killed if it runs."""
        self._held.close()

    def _leave(self) -> None:
        self.close()

    def _next(self, timeout: Optional[float]) -> _streams.ExecEvent:
        from websockets.exceptions import ConnectionClosed

        try:
            return _streams.exec_message(self._connection.recv(timeout))
        except ConnectionClosed as error:
            raise ConnectionError("the daemon closed the connection before the program had ended") from error
