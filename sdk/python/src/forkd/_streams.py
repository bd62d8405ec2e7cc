"""What streams carry: programs' output, and changes of files."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any, Dict, Iterator, Mapping, Optional, Sequence, Tuple, Union, cast

from ._calls import present, whole_seconds
from .errors import StreamError
from .types import Event, FileChange

STDIN = b"\x00"
"""First byte of a message of standard input; alone it ends the input."""

_PIECE = 1 << 20
"""What a message of standard input holds at most; the daemon takes four times as much."""

_STREAMS = {1: "stdout", 2: "stderr"}


@dataclass(frozen=True)
class ExecEvent:
    """One event of a program: it started, wrote to a stream, or ended."""

    stream: Optional[str] = None
    data: bytes = b""
    pid: Optional[int] = None
    exit_code: Optional[int] = None
    timed_out: bool = False


def exec_event(event: Mapping[str, Any]) -> ExecEvent:
    """A program's event from its JSON. One that tells of a failure raises."""
    kind = event.get("type")
    if kind in ("stdout", "stderr"):
        return ExecEvent(stream=kind, data=base64.b64decode(event["data"]))
    if kind == "started":
        return ExecEvent(pid=event["pid"])
    if kind == "exit":
        return ExecEvent(exit_code=event["code"], timed_out=event["timed_out"])
    if kind == "error":
        raise StreamError(event["error"], event.get("code"))
    return ExecEvent()


def exec_message(message: Union[str, bytes]) -> ExecEvent:
    """A program's event from a WebSocket message."""
    if isinstance(message, str):
        return exec_event(json.loads(message))
    return ExecEvent(stream=_STREAMS.get(message[0]), data=bytes(message[1:])) if message else ExecEvent()


def start_message(
    args: Sequence[str],
    timeout: Optional[float],
    env: Optional[Mapping[str, str]],
    cwd: Optional[str],
    user: Optional[str],
    terminal: Optional[Tuple[int, int]],
    stdin: bool = True,
) -> Dict[str, Any]:
    """What a program's stream begins with."""
    message: Dict[str, Any] = {"args": list(args), "stdin": stdin}
    message.update(
        present(
            timeout_secs=None if timeout is None else whole_seconds(timeout),
            env=None if env is None else [[name, value] for name, value in env.items()],
            cwd=cwd,
            user=user,
            pty=None if terminal is None else size(*terminal),
        )
    )
    return message


def size(rows: int, columns: int) -> Dict[str, int]:
    """A terminal's size."""
    return {"rows": rows, "cols": columns}


def stdin_messages(data: Union[str, bytes]) -> Iterator[bytes]:
    """The messages that write ``data`` to standard input."""
    raw = data.encode() if isinstance(data, str) else data
    for start in range(0, len(raw), _PIECE):
        yield STDIN + raw[start : start + _PIECE]


def signal_message(signal: Union[int, str]) -> str:
    """Asks for a signal."""
    return json.dumps({"type": "signal", "signal": signal})


def resize_message(rows: int, columns: int) -> str:
    """Asks for another size of the terminal."""
    return json.dumps({"type": "resize", **size(rows, columns)})


@dataclass(frozen=True)
class ServerLine:
    """What one line of a stream of server-sent events says."""

    last_id: Optional[int] = None
    """The id to come again with."""
    retry_secs: Optional[float] = None
    """When to come again."""
    event: Optional[Event] = None


def server_line(line: str) -> ServerLine:
    """A line of the daemon's events. Each event is one line of data; what is not known says nothing."""
    field, _, value = line.rstrip("\r\n").partition(":")
    value = value[1:] if value.startswith(" ") else value
    if field == "data":
        event = cast(Event, json.loads(value))
        return ServerLine(last_id=event["id"], event=event)
    if field in ("id", "retry") and value.isdigit():
        return ServerLine(last_id=int(value)) if field == "id" else ServerLine(retry_secs=int(value) / 1000)
    return ServerLine()


def file_change(line: str) -> Optional[FileChange]:
    """The change that a line of a stream of server-sent events tells of, if it is one that does."""
    if not line.startswith("data:"):
        return None
    data = json.loads(line[len("data:") :])
    if "type" not in data:
        raise StreamError(data["error"], data.get("code"))
    return cast(FileChange, data)
