"""The daemon's API as values: what is sent for each call. Sending is the transports' business, so that the blocking
and the asynchronous client say the same."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, replace
from typing import IO, Any, Dict, Generic, List, Mapping, Optional, Sequence, Tuple, TypeVar, Union
from urllib.parse import quote, urlencode

from .types import (
    BranchMode,
    CheckpointInfo,
    EvalAnswer,
    ExecAnswer,
    Family,
    FileInfo,
    OnTimeout,
    SandboxInfo,
    SandboxMemory,
    SandboxUsage,
    SnapshotInfo,
)

T = TypeVar("T")

Command = Union[str, Sequence[str]]
"""A shell's command line, or a program and its arguments."""

Content = Union[str, bytes]
"""What is written to a file; text as UTF-8."""

BOOT_TIME = 300.0
"""How long the answer to a request that boots a machine may take at least, in seconds."""

GRACE = 10.0
"""How much longer than a program's own time limit its answer may take, in seconds."""


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request whose answer, parsed, is a ``T``."""

    method: str
    path: str
    body: Union[bytes, IO[bytes], None] = None
    content_type: Optional[str] = None
    least_timeout: Optional[float] = None
    """The answer may take at least this long, however short the client's own limit is."""
    makes: bool = False
    """Whether it makes something, so that the daemon does it once for each idempotency key."""
    key: Optional[str] = None
    """Its idempotency key."""
    last_event_id: Optional[int] = None
    """The event of a stream that was seen last."""

    @property
    def repeatable(self) -> bool:
        """Whether sending it twice does no more than sending it once."""
        return self.method == "GET" or self.key is not None

    def keyed(self) -> Call[T]:
        """Itself, with an idempotency key if that is what makes it repeatable."""
        return replace(self, key=str(uuid.uuid4())) if self.makes and self.key is None else self

    def headers(self) -> Dict[str, str]:
        """The headers that are its own."""
        headers = {
            "Content-Type": self.content_type,
            "Idempotency-Key": self.key,
            "Last-Event-ID": None if self.last_event_id is None else str(self.last_event_id),
        }
        return {name: value for name, value in headers.items() if value is not None}

    def timeout(self, own: Optional[float]) -> Optional[float]:
        """How long to wait, where the client would wait for ``own``."""
        if own is None or self.least_timeout is None:
            return own
        return max(own, self.least_timeout)


def segment(text: str) -> str:
    """``text`` as one segment of a path."""
    return quote(text, safe="")


def query(values: Mapping[str, Union[str, bool, int, None]]) -> str:
    """A query string with a question mark; empty when nothing is set."""
    words = {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in values.items()
        if value is not None
    }
    return f"?{urlencode(words, quote_via=quote)}" if words else ""


def post(path: str, body: Mapping[str, Any], least_timeout: Optional[float] = None) -> Call[Any]:
    """A request with a JSON body."""
    return Call("POST", path, json.dumps(body).encode(), "application/json", least_timeout)


def make(
    path: str, body: Mapping[str, Any], key: Optional[str], least_timeout: Optional[float] = None
) -> Call[Any]:
    """A request with a JSON body that makes something."""
    return replace(post(path, body, least_timeout), makes=True, key=key)


def argv(command: Command) -> List[str]:
    """The program and its arguments that ``command`` means."""
    return ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)


def present(**values: Any) -> Dict[str, Any]:
    """The values that are not ``None``."""
    return {name: value for name, value in values.items() if value is not None}


def list_snapshots() -> Call[List[SnapshotInfo]]:
    return Call("GET", "/v1/snapshots")


def delete_snapshot(tag: str, cascade: bool, force: bool) -> Call[None]:
    options = query({"cascade": cascade or None, "force": force or None})
    return Call("DELETE", f"/v1/snapshots/{segment(tag)}{options}")


def snapshot_info(tag: str) -> Call[Dict[str, Any]]:
    return Call("GET", f"/v1/snapshots/{segment(tag)}/info")


def create_snapshot(
    tag: str, kernel: str, rootfs: str, boot_wait_secs: Optional[int], key: Optional[str]
) -> Call[SnapshotInfo]:
    body = {"tag": tag, "kernel": kernel, "rootfs": rootfs, **present(boot_wait_secs=boot_wait_secs)}
    return make("/v1/snapshots", body, key, BOOT_TIME)


def compact_snapshot(tag: str, to: str, key: Optional[str]) -> Call[SnapshotInfo]:
    return make(f"/v1/snapshots/{segment(tag)}/compact", {"to": to}, key)


def usage() -> Call[List[SandboxUsage]]:
    return Call("GET", "/v1/usage")


def tree() -> Call[Family]:
    return Call("GET", "/v1/tree")


def events(sandbox_id: Optional[str], last_event_id: Optional[int]) -> Call[None]:
    return Call("GET", f"/v1/events{query({'sandbox': sandbox_id})}", last_event_id=last_event_id)


def spawn(
    snapshot_tag: str,
    n: int,
    per_child_netns: bool,
    memory_limit_mib: Optional[int],
    flags: Mapping[str, bool],
    more: Mapping[str, Any],
    key: Optional[str],
) -> Call[List[SandboxInfo]]:
    body: Dict[str, Any] = {"snapshot_tag": snapshot_tag, "n": n, "per_child_netns": per_child_netns}
    body.update(present(memory_limit_mib=memory_limit_mib))
    body.update({name: True for name, value in flags.items() if value})
    body.update(present(**more))
    return make("/v1/sandboxes", body, key)


def list_sandboxes() -> Call[List[SandboxInfo]]:
    return Call("GET", "/v1/sandboxes")


def sandbox(sandbox_id: str, tail: str = "") -> str:
    """The path of a sandbox, or below it."""
    return f"/v1/sandboxes/{segment(sandbox_id)}{tail}"


def get_sandbox(sandbox_id: str) -> Call[SandboxInfo]:
    return Call("GET", sandbox(sandbox_id))


def kill_sandbox(sandbox_id: str) -> Call[None]:
    return Call("DELETE", sandbox(sandbox_id))


def branch(
    sandbox_id: str,
    tag: Optional[str],
    diff: bool,
    measure_diff: bool,
    mode: Optional[BranchMode],
    wait: bool,
    parent_tag: Optional[str],
    key: Optional[str],
) -> Call[SnapshotInfo]:
    body = present(tag=tag, mode=mode, parent_tag=parent_tag)
    if mode is None and diff:
        body["diff"] = True
    if measure_diff:
        body["measure_diff"] = True
    if not wait:
        body["wait"] = False
    return make(sandbox(sandbox_id, "/branch"), body, key)


def fork(
    sandbox_id: str,
    n: int,
    memory_limit_mib: Optional[int],
    timeout_secs: Optional[float],
    on_timeout: Optional[OnTimeout],
    key: Optional[str],
) -> Call[List[SandboxInfo]]:
    more = present(memory_limit_mib=memory_limit_mib, **lifetime(timeout_secs, on_timeout))
    return make(sandbox(sandbox_id, "/fork"), {"n": n, **more}, key)


def lifetime(timeout_secs: Optional[float], on_timeout: Optional[OnTimeout]) -> Dict[str, Any]:
    """The fields that say when a sandbox ends by itself, and how."""
    return present(timeout_secs=None if timeout_secs is None else whole_seconds(timeout_secs), on_timeout=on_timeout)


def set_timeout(
    sandbox_id: str, timeout_secs: Optional[float], on_timeout: Optional[OnTimeout]
) -> Call[SandboxInfo]:
    # Null takes the lifetime away, so that it is written.
    body = {"timeout_secs": None, **lifetime(timeout_secs, on_timeout)}
    return post(sandbox(sandbox_id, "/timeout"), body)


def suspend(sandbox_id: str, key: Optional[str]) -> Call[SnapshotInfo]:
    return Call("POST", sandbox(sandbox_id, "/suspend"), makes=True, key=key)


def checkpoint(sandbox_id: str, name: Optional[str], disk: bool, key: Optional[str]) -> Call[CheckpointInfo]:
    return make(sandbox(sandbox_id, "/checkpoints"), present(name=name, disk=disk or None), key)


def checkpoints(sandbox_id: str) -> Call[List[CheckpointInfo]]:
    return Call("GET", sandbox(sandbox_id, "/checkpoints"))


def remove_checkpoint(sandbox_id: str, name: str) -> Call[None]:
    return Call("DELETE", sandbox(sandbox_id, f"/checkpoints/{segment(name)}"))


def rewind(sandbox_id: str, name: Optional[str], back: Optional[int]) -> Call[CheckpointInfo]:
    return post(sandbox(sandbox_id, "/rewind"), present(name=name, back=back))


def program(
    args: Sequence[str],
    timeout_secs: float,
    env: Optional[Mapping[str, str]],
    cwd: Optional[str],
    user: Optional[str],
    stdin: Optional[str],
) -> Dict[str, Any]:
    """The body of every request that runs a program."""
    pairs = None if env is None else [[name, value] for name, value in env.items()]
    body: Dict[str, Any] = {"args": list(args), "timeout_secs": whole_seconds(timeout_secs)}
    body.update(present(env=pairs, cwd=cwd, user=user, stdin=stdin))
    return body


def execute(sandbox_id: str, body: Mapping[str, Any]) -> Call[ExecAnswer]:
    return post(sandbox(sandbox_id, "/exec"), body, body["timeout_secs"] + GRACE)


def execute_streaming(sandbox_id: str, message: Mapping[str, Any]) -> Call[None]:
    limit = message.get("timeout_secs")
    return post(sandbox(sandbox_id, "/exec/stream"), message, None if limit is None else limit + GRACE)


def evaluate(
    sandbox_id: str, code: str, language: Optional[str] = None, timeout_secs: Optional[float] = None
) -> Call[EvalAnswer]:
    whole = None if timeout_secs is None else whole_seconds(timeout_secs)
    body = {"code": code, **present(language=language, timeout_secs=whole)}
    return post(sandbox(sandbox_id, "/eval"), body, None if whole is None else whole + GRACE)


def ping(sandbox_id: str) -> Call[Dict[str, Any]]:
    return Call("POST", sandbox(sandbox_id, "/ping"))


def memory(sandbox_id: str) -> Call[SandboxMemory]:
    return Call("GET", sandbox(sandbox_id, "/memory"))


def files(sandbox_id: str, tail: str, values: Mapping[str, Union[str, bool, None]]) -> str:
    """A path among those of a sandbox's files, with its query."""
    return sandbox(sandbox_id, f"/files{tail}{query(values)}")


def read_file(sandbox_id: str, path: str) -> Call[bytes]:
    return Call("GET", files(sandbox_id, "", {"path": path}))


def write_file(sandbox_id: str, path: str, content: Content, mode: Optional[int]) -> Call[None]:
    raw = content.encode() if isinstance(content, str) else content
    target = files(sandbox_id, "", {"path": path, "mode": None if mode is None else f"{mode:o}", "parents": True})
    return Call("PUT", target, raw, "application/octet-stream")


def list_files(sandbox_id: str, path: str) -> Call[List[FileInfo]]:
    return Call("GET", files(sandbox_id, "/list", {"path": path}))


def stat_file(sandbox_id: str, path: str) -> Call[FileInfo]:
    return Call("GET", files(sandbox_id, "/stat", {"path": path}))


def make_directory(sandbox_id: str, path: str) -> Call[None]:
    return post(sandbox(sandbox_id, "/files/mkdir"), {"path": path})


def move_file(sandbox_id: str, source: str, target: str) -> Call[None]:
    return post(sandbox(sandbox_id, "/files/move"), {"from": source, "to": target})


def remove_file(sandbox_id: str, path: str, recursive: bool) -> Call[None]:
    return Call("DELETE", files(sandbox_id, "", {"path": path, "recursive": recursive or None}))


def read_archive(sandbox_id: str, path: str) -> Call[bytes]:
    return Call("GET", files(sandbox_id, "/archive", {"path": path}))


def write_archive(sandbox_id: str, path: str, tar: Union[bytes, IO[bytes]], owners: bool) -> Call[None]:
    target = files(sandbox_id, "/archive", {"path": path, "owners": owners or None})
    return Call("PUT", target, tar, "application/octet-stream")


def watch_files(sandbox_id: str, path: str, recursive: bool) -> Call[None]:
    return Call("GET", files(sandbox_id, "/watch", {"path": path, "recursive": recursive or None}))


def port_path(sandbox_id: str, port: int, path: str) -> str:
    """Where a TCP port of the guest is served."""
    if not 1 <= port <= 65535:
        raise ValueError(f"{port} is not a TCP port; they are 1 to 65535")
    return sandbox(sandbox_id, f"/ports/{port}/{path.lstrip('/')}")


def host_port(target: str) -> Tuple[str, int]:
    """Splits ``HOST:PORT``; an IPv6 host is in brackets."""
    host, colon, port = target.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not bare or not port.isdigit() or (":" in bare and bare == host):
        raise ValueError(f"invalid forkd target {target!r}; expected host:port (10.42.0.2:8888 or [::1]:8888)")
    return bare, int(port)


def whole_seconds(seconds: float) -> int:
    """Whole seconds, rounded up: the daemon counts in them."""
    return -int(-seconds // 1)
