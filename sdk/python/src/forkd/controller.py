"""The daemon's REST API as blocking calls."""

from __future__ import annotations

from types import TracebackType
from typing import IO, Any, Dict, List, Mapping, Optional, Sequence, Type, TypeVar, cast

from . import _calls
from ._address import Address, resolve_token
from ._calls import Call
from ._transport import Transport
from .errors import ControllerError, answer
from .types import (
    BranchMode,
    CheckpointInfo,
    EvalAnswer,
    ExecAnswer,
    SandboxInfo,
    SandboxMemory,
    SnapshotInfo,
)

__all__ = ["BranchMode", "Controller", "ControllerError"]

T = TypeVar("T")


class Controller:
    """A forkd daemon.

    ``base_url`` is ``http://HOST:PORT`` or ``unix:///PATH``; without it ``FORKD_URL``, else ``http://127.0.0.1:8889``.
    ``token`` is its bearer token; without it ``FORKD_TOKEN``. ``timeout`` is how long an answer may take, in seconds; a
    program with a longer limit of its own is waited for longer.

    A refused request raises :class:`ControllerError`; a daemon that is not there :class:`DaemonUnreachable`, an
    ``OSError``. Every call is a connection of its own, so one object may be used from many threads.
    """

    def __init__(
        self,
        base_url: Optional[str] = None,
        token: Optional[str] = None,
        timeout: float = 60.0,
    ) -> None:
        self.address = Address.resolve(base_url)
        self.base_url = self.address.text
        self.token = resolve_token(token)
        self.timeout = timeout
        self._transport = Transport(self.address, self.token)

    def __enter__(self) -> Controller:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        pass

    # Snapshots.

    def list_snapshots(self) -> List[SnapshotInfo]:
        """All snapshots, by tag."""
        return self.call(_calls.list_snapshots())

    def delete_snapshot(self, tag: str, *, cascade: bool = False, force: bool = False) -> None:
        """Deletes a snapshot. One that others are layers over needs ``cascade`` (they go too) or ``force``."""
        self.call(_calls.delete_snapshot(tag, cascade, force))

    def snapshot_info(self, tag: str) -> Dict[str, Any]:
        """Everything the daemon tells about one snapshot."""
        return self.call(_calls.snapshot_info(tag))

    def compact_snapshot(self, tag: str, to: str) -> SnapshotInfo:
        """Writes a layered snapshot anew as ``to``, which depends on no other."""
        return self.call(_calls.compact_snapshot(tag, to))

    # Sandboxes.

    def spawn_sandboxes(
        self,
        snapshot_tag: str,
        n: int = 1,
        per_child_netns: bool = False,
        memory_limit_mib: Optional[int] = None,
        prewarm: bool = False,
        live_fork: bool = False,
        hugepages: bool = False,
        **more: Any,
    ) -> List[SandboxInfo]:
        """Forks ``n`` children of a snapshot. ``more`` are further fields of the request, as the API has them."""
        flags = {"prewarm": prewarm, "live_fork": live_fork, "hugepages": hugepages}
        return self.call(_calls.spawn(snapshot_tag, n, per_child_netns, memory_limit_mib, flags, more))

    def list_sandboxes(self) -> List[SandboxInfo]:
        """All sandboxes, by id."""
        return self.call(_calls.list_sandboxes())

    def get_sandbox(self, sandbox_id: str) -> SandboxInfo:
        """One sandbox."""
        return self.call(_calls.get_sandbox(sandbox_id))

    def kill_sandbox(self, sandbox_id: str) -> None:
        """Ends a sandbox at once."""
        self.call(_calls.kill_sandbox(sandbox_id))

    def sandbox_memory(self, sandbox_id: str) -> SandboxMemory:
        """What a sandbox costs its host."""
        return self.call(_calls.memory(sandbox_id))

    def fork_sandbox(self, sandbox_id: str, n: int = 1, memory_limit_mib: Optional[int] = None) -> List[SandboxInfo]:
        """Makes ``n`` running copies of a running sandbox, all of one instant."""
        return self.call(_calls.fork(sandbox_id, n, memory_limit_mib))

    def branch_sandbox(
        self,
        sandbox_id: str,
        tag: Optional[str] = None,
        diff: bool = False,
        measure_diff: bool = False,
        mode: Optional[BranchMode] = None,
        wait: bool = True,
        *,
        parent_tag: Optional[str] = None,
    ) -> SnapshotInfo:
        """Takes a snapshot of a running sandbox, named ``tag`` or by the daemon.

        ``wait=False`` (with ``mode="live"``) returns when the source runs again; the snapshot is listed as
        ``writing`` until it is ``ready``. ``parent_tag`` keeps it as a layer over the sandbox's own snapshot
        (``mode="diff"``).
        """
        return self.call(_calls.branch(sandbox_id, tag, diff, measure_diff, mode, wait, parent_tag))

    def checkpoint_sandbox(self, sandbox_id: str, name: Optional[str] = None, *, disk: bool = False) -> CheckpointInfo:
        """Freezes a sandbox as it is now, to come back to; ``disk`` puts it where it outlives the host's memory."""
        return self.call(_calls.checkpoint(sandbox_id, name, disk))

    def list_checkpoints(self, sandbox_id: str) -> List[CheckpointInfo]:
        """A sandbox's checkpoints, oldest first."""
        return self.call(_calls.checkpoints(sandbox_id))

    def delete_checkpoint(self, sandbox_id: str, name: str) -> None:
        """Removes a checkpoint."""
        self.call(_calls.remove_checkpoint(sandbox_id, name))

    def rewind_sandbox(
        self, sandbox_id: str, name: Optional[str] = None, *, back: Optional[int] = None
    ) -> CheckpointInfo:
        """Brings a sandbox back to a checkpoint, by name or that many back; without either to the newest."""
        return self.call(_calls.rewind(sandbox_id, name, back))

    # In a sandbox.

    def exec_command(
        self,
        sandbox_id: str,
        args: Sequence[str],
        timeout_secs: int = 30,
        *,
        env: Optional[Mapping[str, str]] = None,
        cwd: Optional[str] = None,
        user: Optional[str] = None,
        stdin: Optional[str] = None,
    ) -> ExecAnswer:
        """Runs a program to its end."""
        body = _calls.program(args, timeout_secs, env, cwd, user, stdin)
        return self.call(_calls.execute(sandbox_id, body))

    def eval_code(
        self,
        sandbox_id: str,
        code: str,
        *,
        language: Optional[str] = None,
        timeout_secs: Optional[float] = None,
    ) -> EvalAnswer:
        """Evaluates source text in a warm interpreter, ``python`` or ``node``."""
        return self.call(_calls.evaluate(sandbox_id, code, language, timeout_secs))

    def ping_sandbox(self, sandbox_id: str) -> Dict[str, Any]:
        """Asks a sandbox's agent whether it is there."""
        return self.call(_calls.ping(sandbox_id))

    # Underneath.

    def call(self, call: Call[T]) -> T:
        """Sends a request and returns its parsed answer."""
        with self.open(call) as stream:
            raw = stream.read()
        return cast(T, answer(200, raw, call.path))

    def open(self, call: Call[Any], *, unlimited: bool = False) -> IO[bytes]:
        """Sends a request and returns the answer's body as it comes, ``unlimited`` however long that takes."""
        timeout = None if unlimited else call.timeout(self.timeout)
        return self._transport.open(call.method, call.path, call.body, call.content_type, timeout)
