"""The daemon's REST API as coroutines."""

from __future__ import annotations

import asyncio
from typing import (
    IO,
    TYPE_CHECKING,
    Any,
    AsyncIterator,
    Dict,
    List,
    Literal,
    Mapping,
    Optional,
    Sequence,
    TypeVar,
    cast,
)

from . import _calls, _retries, _workspace_calls
from ._address import Address, resolve_token
from ._aio_events import AsyncEventStream
from ._calls import Call
from ._contexts import AsyncContext
from .errors import ControllerError, DaemonUnreachable, MissingExtra, answer
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

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")


class AsyncController(AsyncContext):
    """A forkd daemon; what :class:`forkd.Controller` has, as coroutines.

    It keeps connections, which :meth:`aclose` or the end of an ``async with`` gives back.
    """

    def __init__(
        self,
        base_url: Optional[str] = None,
        token: Optional[str] = None,
        timeout: float = 60.0,
        *,
        retries: int = 3,
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise MissingExtra("AsyncController", "httpx", "async") from error
        self.address = Address.resolve(base_url)
        self.base_url = self.address.text
        self.token = resolve_token(token)
        self.timeout = timeout
        self.retries = retries
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        transport = httpx.AsyncHTTPTransport(uds=self.address.socket) if self.address.socket else None
        self._http: httpx.AsyncClient = httpx.AsyncClient(
            base_url=self.address.base, headers=headers, transport=transport, timeout=timeout
        )

    async def aclose(self) -> None:
        """Closes its connections."""
        await self._http.aclose()

    async def _leave(self) -> None:
        await self.aclose()

    # Snapshots.

    async def list_snapshots(self) -> List[SnapshotInfo]:
        """All snapshots, by tag."""
        return await self.call(_calls.list_snapshots())

    async def delete_snapshot(self, tag: str, *, cascade: bool = False, force: bool = False) -> None:
        """Deletes a snapshot. One that others are layers over needs ``cascade`` or ``force``."""
        await self.call(_calls.delete_snapshot(tag, cascade, force))

    async def snapshot_info(self, tag: str) -> Dict[str, Any]:
        """Everything the daemon tells about one snapshot."""
        return await self.call(_calls.snapshot_info(tag))

    async def create_snapshot(
        self,
        tag: str,
        kernel: str,
        rootfs: str,
        *,
        boot_wait_secs: Optional[int] = None,
        idempotency_key: Optional[str] = None,
    ) -> SnapshotInfo:
        """Boots a kernel and a root disk, files of the daemon's host, and takes a snapshot when the agent answers."""
        return await self.call(_calls.create_snapshot(tag, kernel, rootfs, boot_wait_secs, idempotency_key))

    async def compact_snapshot(self, tag: str, to: str, *, idempotency_key: Optional[str] = None) -> SnapshotInfo:
        """Writes a layered snapshot anew as ``to``, which depends on no other."""
        return await self.call(_calls.compact_snapshot(tag, to, idempotency_key))

    # Sandboxes.

    async def spawn_sandboxes(
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
        """Forks ``n`` children of a snapshot; see :meth:`forkd.Controller.spawn_sandboxes`."""
        flags = {"prewarm": prewarm, "live_fork": live_fork, "hugepages": hugepages}
        more.update(_calls.lifetime(timeout_secs, on_timeout), **_calls.present(auto_checkpoint=auto_checkpoint))
        call = _calls.spawn(snapshot_tag, n, per_child_netns, memory_limit_mib, flags, more, idempotency_key)
        return await self.call(call)

    async def list_sandboxes(self) -> List[SandboxInfo]:
        """All sandboxes, by id."""
        return await self.call(_calls.list_sandboxes())

    async def get_sandbox(self, sandbox_id: str) -> SandboxInfo:
        """One sandbox."""
        return await self.call(_calls.get_sandbox(sandbox_id))

    async def kill_sandbox(self, sandbox_id: str) -> None:
        """Ends a sandbox at once."""
        await self.call(_calls.kill_sandbox(sandbox_id))

    async def sandbox_memory(self, sandbox_id: str) -> SandboxMemory:
        """What a sandbox costs its host."""
        return await self.call(_calls.memory(sandbox_id))

    async def fork_sandbox(
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
        return await self.call(call)

    async def set_timeout(
        self, sandbox_id: str, timeout_secs: Optional[float], on_timeout: Optional[OnTimeout] = None
    ) -> SandboxInfo:
        """Lets a sandbox end this long after now, whatever was said before; with ``None`` it lives until it is ended.

        ``on_timeout`` is how: ``kill``, or ``suspend``, which leaves the snapshot ``suspended-ID``.
        """
        return await self.call(_calls.set_timeout(sandbox_id, timeout_secs, on_timeout))

    async def suspend_sandbox(self, sandbox_id: str, *, idempotency_key: Optional[str] = None) -> SnapshotInfo:
        """Puts a sandbox on disk as a snapshot, and ends it."""
        return await self.call(_calls.suspend(sandbox_id, idempotency_key))

    async def branch_sandbox(
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
        """Takes a snapshot of a running sandbox."""
        call = _calls.branch(sandbox_id, tag, diff, measure_diff, mode, wait, parent_tag, idempotency_key)
        return await self.call(call)

    async def checkpoint_sandbox(
        self,
        sandbox_id: str,
        name: Optional[str] = None,
        *,
        disk: bool = False,
        idempotency_key: Optional[str] = None,
    ) -> CheckpointInfo:
        """Freezes a sandbox as it is now, to come back to."""
        return await self.call(_calls.checkpoint(sandbox_id, name, disk, idempotency_key))

    async def list_checkpoints(self, sandbox_id: str) -> List[CheckpointInfo]:
        """A sandbox's checkpoints, oldest first."""
        return await self.call(_calls.checkpoints(sandbox_id))

    async def delete_checkpoint(self, sandbox_id: str, name: str) -> None:
        """Removes a checkpoint."""
        await self.call(_calls.remove_checkpoint(sandbox_id, name))

    async def rewind_sandbox(
        self, sandbox_id: str, name: Optional[str] = None, *, back: Optional[int] = None
    ) -> CheckpointInfo:
        """Brings a sandbox back to a checkpoint."""
        return await self.call(_calls.rewind(sandbox_id, name, back))

    # Workspaces.

    async def list_workspaces(self) -> List[WorkspaceInfo]:
        """All workspaces, by name."""
        return await self.call(_workspace_calls.list_workspaces())

    async def create_workspace(
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
        return await self.call(call)

    async def get_workspace(self, name: str) -> WorkspaceInfo:
        """One workspace."""
        return await self.call(_workspace_calls.get_workspace(name))

    async def suspend_workspace(self, name: str, *, idempotency_key: Optional[str] = None) -> WorkspaceInfo:
        """Puts a workspace on disk."""
        return await self.call(_workspace_calls.suspend_workspace(name, idempotency_key))

    async def resume_workspace(self, name: str, *, idempotency_key: Optional[str] = None) -> WorkspaceInfo:
        """Brings a workspace back; its sandbox is ``live_sandbox_id``."""
        return await self.call(_workspace_calls.resume_workspace(name, idempotency_key))

    async def delete_workspace(self, name: str) -> None:
        """Ends a workspace and forgets its state."""
        await self.call(_workspace_calls.delete_workspace(name))

    # The whole.

    async def usage(self) -> List[SandboxUsage]:
        """What each sandbox uses now."""
        return await self.call(_calls.usage())

    async def tree(self) -> Family:
        """Snapshots, sandboxes and checkpoints, each under what it came from."""
        return await self.call(_calls.tree())

    async def events(
        self, *, sandbox_id: Optional[str] = None, after: Optional[int] = None, patience: float = 60.0
    ) -> AsyncEventStream:
        """What happens from now on, or since the event with the id ``after``; only to a sandbox, if one is named.

        The stream comes again by itself when its connection breaks and misses nothing that the daemon still keeps;
        where that is not all, it gives ``events.lost``. A daemon that is away for ``patience`` seconds ends it.
        """
        return await AsyncEventStream(self, sandbox_id, after, patience).connect()

    # In a sandbox.

    async def exec_command(
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
        return await self.call(_calls.execute(sandbox_id, body))

    async def eval_code(
        self,
        sandbox_id: str,
        code: str,
        *,
        language: Optional[str] = None,
        timeout_secs: Optional[float] = None,
    ) -> EvalAnswer:
        """Evaluates source text in a warm interpreter."""
        return await self.call(_calls.evaluate(sandbox_id, code, language, timeout_secs))

    async def ping_sandbox(self, sandbox_id: str) -> Dict[str, Any]:
        """Asks a sandbox's agent whether it is there."""
        return await self.call(_calls.ping(sandbox_id))

    # Underneath.

    async def call(self, call: Call[T]) -> T:
        """Sends a request and returns its parsed answer."""
        return cast(T, answer(200, await self.fetch(call), call.path))

    async def fetch(self, call: Call[Any]) -> bytes:
        """Sends a request, more than once if need be, and returns its answer as it is."""
        import httpx

        call, attempt = call.keyed() if self.retries > 0 else call, 0
        while True:
            try:
                response = await self.open(call)
                try:
                    return await response.aread()
                finally:
                    await response.aclose()
            except (ControllerError, DaemonUnreachable) as error:
                pause = _retries.pause(call, error, attempt, self.retries)
                if pause is None:
                    raise
            except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
                pause = _retries.pause(call, ConnectionError(str(error)), attempt, self.retries)
                if pause is None:
                    raise
            await asyncio.sleep(pause)
            attempt += 1

    async def lines(self, call: Call[Any]) -> AsyncIterator[str]:
        """Sends a request and yields the lines of its answer as they come, however long that takes."""
        response = await self.open(call, unlimited=True)
        try:
            async for line in response.aiter_lines():
                if line.strip():
                    yield line
        finally:
            await response.aclose()

    async def open(
        self, call: Call[Any], *, unlimited: bool = False, silence: Optional[float] = None
    ) -> httpx.Response:
        """Sends a request; the answer's body is still to be read: ``unlimited`` however long that takes, with
        ``silence`` as long as it never says nothing for that long."""
        import httpx

        content = call.body if call.body is None or isinstance(call.body, bytes) else _pieces(call.body)
        timeout = silence or call.timeout(self.timeout)
        request = self._http.build_request(
            call.method, call.path, content=content, headers=call.headers(), timeout=timeout
        )
        if unlimited:
            request.extensions["timeout"]["read"] = None
        try:
            response = await self._http.send(request, stream=True)
        except httpx.ConnectError as error:
            raise DaemonUnreachable(self.address.text, error) from error
        if not response.is_success:
            try:
                said = await response.aread()
            finally:
                await response.aclose()
            answer(response.status_code, said, str(response.url), response.headers.get("Retry-After"))
        return response


async def _pieces(file: IO[bytes]) -> AsyncIterator[bytes]:
    """A file's content, without holding the others up while the disk is slow."""
    while True:
        piece = await asyncio.to_thread(file.read, 1 << 18)
        if not piece:
            return
        yield piece
