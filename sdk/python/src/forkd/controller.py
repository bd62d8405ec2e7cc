"""The daemon's REST API as blocking calls."""

from __future__ import annotations

import http.client
import time
from types import TracebackType
from typing import IO, Any, Dict, List, Literal, Mapping, Optional, Sequence, Type, TypeVar, cast

from . import _calls, _retries, _workspace_calls
from ._address import Address, resolve_token
from ._calls import Call
from ._transport import Transport
from .errors import ControllerError, answer
from .events import EventStream
from .types import (
    BranchMode,
    CheckpointInfo,
    EvalAnswer,
    ExecAnswer,
    Family,
    OnTimeout,
    SandboxInfo,
    SandboxMemory,
    SandboxUsage,
    SnapshotInfo,
    WorkspaceInfo,
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

    A request whose connection breaks, or that the daemon asks to send again, is sent again up to ``retries`` times if
    that cannot do more than sending it once: if it only reads, or makes something under an idempotency key. Requests
    that make something get a key of their own unless ``retries`` is 0 or ``idempotency_key`` says another. A key means
    the same request for a day, also to a daemon that was restarted.
    """

    def __init__(
        self,
        base_url: Optional[str] = None,
        token: Optional[str] = None,
        timeout: float = 60.0,
        *,
        retries: int = 3,
    ) -> None:
        self.address = Address.resolve(base_url)
        self.base_url = self.address.text
        self.token = resolve_token(token)
        self.timeout = timeout
        self.retries = retries
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

    def create_snapshot(
        self,
        tag: str,
        kernel: str,
        rootfs: str,
        *,
        boot_wait_secs: Optional[int] = None,
        idempotency_key: Optional[str] = None,
    ) -> SnapshotInfo:
        """Boots a kernel and a root disk, files of the daemon's host, and takes a snapshot when the agent answers."""
        return self.call(_calls.create_snapshot(tag, kernel, rootfs, boot_wait_secs, idempotency_key))

    def compact_snapshot(self, tag: str, to: str, *, idempotency_key: Optional[str] = None) -> SnapshotInfo:
        """Writes a layered snapshot anew as ``to``, which depends on no other."""
        return self.call(_calls.compact_snapshot(tag, to, idempotency_key))

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
        *,
        auto_checkpoint: Optional[Literal["exec"]] = None,
        timeout_secs: Optional[float] = None,
        on_timeout: Optional[OnTimeout] = None,
        idempotency_key: Optional[str] = None,
        **more: Any,
    ) -> List[SandboxInfo]:
        """Forks ``n`` children of a snapshot.

        They end by themselves after ``timeout_secs``, as ``on_timeout`` says: ``kill``, or ``suspend``, which leaves
        the snapshot ``suspended-ID``. ``auto_checkpoint="exec"`` takes a checkpoint before each program that is run.
        ``more`` are further fields of the request, as the API has them.
        """
        flags = {"prewarm": prewarm, "live_fork": live_fork, "hugepages": hugepages}
        more.update(_calls.lifetime(timeout_secs, on_timeout), **_calls.present(auto_checkpoint=auto_checkpoint))
        call = _calls.spawn(snapshot_tag, n, per_child_netns, memory_limit_mib, flags, more, idempotency_key)
        return self.call(call)

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

    def fork_sandbox(
        self,
        sandbox_id: str,
        n: int = 1,
        memory_limit_mib: Optional[int] = None,
        *,
        timeout_secs: Optional[float] = None,
        on_timeout: Optional[OnTimeout] = None,
        idempotency_key: Optional[str] = None,
    ) -> List[SandboxInfo]:
        """Makes ``n`` running copies of a running sandbox, all of one instant."""
        call = _calls.fork(sandbox_id, n, memory_limit_mib, timeout_secs, on_timeout, idempotency_key)
        return self.call(call)

    def set_timeout(
        self, sandbox_id: str, timeout_secs: Optional[float], on_timeout: Optional[OnTimeout] = None
    ) -> SandboxInfo:
        """Lets a sandbox end this long after now, whatever was said before; with ``None`` it lives until it is ended.

        ``on_timeout`` is how: ``kill``, or ``suspend``, which leaves the snapshot ``suspended-ID``.
        """
        return self.call(_calls.set_timeout(sandbox_id, timeout_secs, on_timeout))

    def suspend_sandbox(self, sandbox_id: str, *, idempotency_key: Optional[str] = None) -> SnapshotInfo:
        """Puts a sandbox on disk as a snapshot, and ends it."""
        return self.call(_calls.suspend(sandbox_id, idempotency_key))

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
        idempotency_key: Optional[str] = None,
    ) -> SnapshotInfo:
        """Takes a snapshot of a running sandbox, named ``tag`` or by the daemon.

        ``wait=False`` (with ``mode="live"``) returns when the source runs again; the snapshot is listed as
        ``writing`` until it is ``ready``. ``parent_tag`` keeps it as a layer over the sandbox's own snapshot
        (``mode="diff"``).
        """
        call = _calls.branch(sandbox_id, tag, diff, measure_diff, mode, wait, parent_tag, idempotency_key)
        return self.call(call)

    def checkpoint_sandbox(
        self,
        sandbox_id: str,
        name: Optional[str] = None,
        *,
        disk: bool = False,
        idempotency_key: Optional[str] = None,
    ) -> CheckpointInfo:
        """Freezes a sandbox as it is now, to come back to; ``disk`` puts it where it outlives the host's memory."""
        return self.call(_calls.checkpoint(sandbox_id, name, disk, idempotency_key))

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

    # Workspaces.

    def list_workspaces(self) -> List[WorkspaceInfo]:
        """All workspaces, by name."""
        return self.call(_workspace_calls.list_workspaces())

    def create_workspace(
        self,
        name: str,
        snapshot_tag: str,
        *,
        per_child_netns: bool = False,
        memory_limit_mib: Optional[int] = None,
        hugepages: bool = False,
        idle_suspend_secs: Optional[float] = None,
        idempotency_key: Optional[str] = None,
    ) -> WorkspaceInfo:
        """Makes a sandbox with a name, that can be put on disk and brought back.

        It is put on disk by itself when nothing was run in it for ``idle_suspend_secs``; the daemon's default when
        absent, 0 for never.
        """
        call = _workspace_calls.create_workspace(
            name, snapshot_tag, per_child_netns, memory_limit_mib, hugepages, idle_suspend_secs, idempotency_key
        )
        return self.call(call)

    def get_workspace(self, name: str) -> WorkspaceInfo:
        """One workspace."""
        return self.call(_workspace_calls.get_workspace(name))

    def suspend_workspace(self, name: str, *, idempotency_key: Optional[str] = None) -> WorkspaceInfo:
        """Puts a workspace on disk."""
        return self.call(_workspace_calls.suspend_workspace(name, idempotency_key))

    def resume_workspace(self, name: str, *, idempotency_key: Optional[str] = None) -> WorkspaceInfo:
        """Brings a workspace back; its sandbox is ``live_sandbox_id``."""
        return self.call(_workspace_calls.resume_workspace(name, idempotency_key))

    def delete_workspace(self, name: str) -> None:
        """Ends a workspace and forgets its state."""
        self.call(_workspace_calls.delete_workspace(name))

    # The whole.

    def usage(self) -> List[SandboxUsage]:
        """What each sandbox uses now."""
        return self.call(_calls.usage())

    def tree(self) -> Family:
        """Snapshots, sandboxes and checkpoints, each under what it came from."""
        return self.call(_calls.tree())

    def events(
        self, *, sandbox_id: Optional[str] = None, after: Optional[int] = None, patience: float = 60.0
    ) -> EventStream:
        """What happens from now on, or since the event with the id ``after``; only to a sandbox, if one is named.

        The stream comes again by itself when its connection breaks and misses nothing that the daemon still keeps;
        where that is not all, it gives ``events.lost``. A daemon that is away for ``patience`` seconds ends it.
        """
        return EventStream(self, sandbox_id, after, patience)

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
        return cast(T, answer(200, self.fetch(call), call.path))

    def fetch(self, call: Call[Any]) -> bytes:
        """Sends a request, more than once if need be, and returns its answer as it is."""
        call, attempt = call.keyed() if self.retries > 0 else call, 0
        while True:
            try:
                with self.open(call) as stream:
                    return stream.read()
            except (ControllerError, OSError, http.client.HTTPException) as error:
                pause = _retries.pause(call, error, attempt, self.retries)
                if pause is None:
                    raise
            time.sleep(pause)
            attempt += 1

    def open(self, call: Call[Any], *, unlimited: bool = False, limit: Optional[float] = None) -> IO[bytes]:
        """Sends a request and returns the answer's body as it comes: ``unlimited`` however long that takes, with
        ``limit`` as long as it never says nothing for that long."""
        timeout = None if unlimited else limit or call.timeout(self.timeout)
        return self._transport.open(call.method, call.path, call.body, call.headers(), timeout)
