"""The daemon's API as coroutines. Needs the extra ``forkd[async]``."""

from __future__ import annotations

import json
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    AsyncIterator,
    Dict,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Type,
    TypeVar,
    cast,
)

from . import _calls, _streams
from ._address import Address, resolve_token
from ._aio_process import AsyncProcess
from ._calls import Call, Command
from .commands import CommandResult, Output, Receiver
from .errors import ControllerError, DaemonUnreachable, EvalError, MissingExtra, answer
from .types import (
    BranchMode,
    CheckpointInfo,
    EvalAnswer,
    ExecAnswer,
    FileChange,
    FileInfo,
    SandboxInfo,
    SandboxMemory,
    SnapshotInfo,
)

if TYPE_CHECKING:
    import httpx

__all__ = ["AsyncController", "AsyncSandbox"]

T = TypeVar("T")
S = TypeVar("S", bound="AsyncSandbox")


class AsyncController:
    """A forkd daemon; what :class:`forkd.Controller` has, as coroutines.

    It keeps connections, which :meth:`aclose` or the end of an ``async with`` gives back.
    """

    def __init__(self, base_url: Optional[str] = None, token: Optional[str] = None, timeout: float = 60.0) -> None:
        try:
            import httpx
        except ImportError as error:
            raise MissingExtra("AsyncController", "httpx", "async") from error
        self.address = Address.resolve(base_url)
        self.base_url = self.address.text
        self.token = resolve_token(token)
        self.timeout = timeout
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        transport = httpx.AsyncHTTPTransport(uds=self.address.socket) if self.address.socket else None
        self._http: httpx.AsyncClient = httpx.AsyncClient(
            base_url=self.address.base, headers=headers, transport=transport, timeout=timeout
        )

    async def aclose(self) -> None:
        """Closes its connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncController:
        return self

    async def __aexit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
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

    async def compact_snapshot(self, tag: str, to: str) -> SnapshotInfo:
        """Writes a layered snapshot anew as ``to``, which depends on no other."""
        return await self.call(_calls.compact_snapshot(tag, to))

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
        **more: Any,
    ) -> List[SandboxInfo]:
        """Forks ``n`` children of a snapshot."""
        flags = {"prewarm": prewarm, "live_fork": live_fork, "hugepages": hugepages}
        return await self.call(_calls.spawn(snapshot_tag, n, per_child_netns, memory_limit_mib, flags, more))

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
        self, sandbox_id: str, n: int = 1, memory_limit_mib: Optional[int] = None
    ) -> List[SandboxInfo]:
        """Makes ``n`` running copies of a running sandbox, all of one instant."""
        return await self.call(_calls.fork(sandbox_id, n, memory_limit_mib))

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
    ) -> SnapshotInfo:
        """Takes a snapshot of a running sandbox."""
        return await self.call(_calls.branch(sandbox_id, tag, diff, measure_diff, mode, wait, parent_tag))

    async def checkpoint_sandbox(
        self, sandbox_id: str, name: Optional[str] = None, *, disk: bool = False
    ) -> CheckpointInfo:
        """Freezes a sandbox as it is now, to come back to."""
        return await self.call(_calls.checkpoint(sandbox_id, name, disk))

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
        """Sends a request and returns its answer as it is."""
        import httpx

        try:
            response = await self._http.send(self._request(call))
        except httpx.ConnectError as error:
            raise DaemonUnreachable(self.address.text, error) from error
        if not response.is_success:
            answer(response.status_code, response.content, str(response.url))
        return response.content

    async def lines(self, call: Call[Any]) -> AsyncIterator[str]:
        """Sends a request and yields the lines of its answer as they come, however long that takes."""
        import httpx

        request = self._request(call)
        request.extensions["timeout"]["read"] = None
        try:
            response = await self._http.send(request, stream=True)
        except httpx.ConnectError as error:
            raise DaemonUnreachable(self.address.text, error) from error
        try:
            if not response.is_success:
                answer(response.status_code, await response.aread(), str(response.url))
            async for line in response.aiter_lines():
                if line.strip():
                    yield line
        finally:
            await response.aclose()

    def _request(self, call: Call[Any]) -> httpx.Request:
        headers = {"Content-Type": call.content_type} if call.content_type else {}
        return self._http.build_request(
            call.method, call.path, content=call.body, headers=headers, timeout=call.timeout(self.timeout)
        )


class AsyncSandbox:
    """A running copy of a snapshot; what :class:`forkd.Sandbox` has, as coroutines.

    ::

        async with await AsyncSandbox.spawn("quickstart") as sandbox:
            await sandbox.eval("1 + 1")
    """

    def __init__(self, controller: AsyncController, info: SandboxInfo, *, owns_controller: bool = False) -> None:
        self.controller = controller
        self.info = info
        self.id = info["id"]
        self.tag = info["snapshot_tag"]
        self._owns_controller = owns_controller
        self.commands = AsyncCommands(self)
        self.files = AsyncFiles(self)

    def __repr__(self) -> str:
        return f"<AsyncSandbox {self.id} of {self.tag}>"

    @classmethod
    async def spawn(cls: Type[S], tag: str, *, controller: Optional[AsyncController] = None, **options: Any) -> S:
        """Forks one child of a snapshot; ``options`` as for :meth:`AsyncController.spawn_sandboxes`."""
        client = controller or AsyncController()
        try:
            info = (await client.spawn_sandboxes(tag, n=1, **options))[0]
        except BaseException:
            if controller is None:
                await client.aclose()
            raise
        return cls(client, info, owns_controller=controller is None)

    @classmethod
    async def spawn_many(cls: Type[S], n: int, tag: str, *, controller: AsyncController, **options: Any) -> List[S]:
        """Forks ``n`` children of a snapshot in one request."""
        return [cls(controller, info) for info in await controller.spawn_sandboxes(tag, n=n, **options)]

    @classmethod
    async def connect(cls: Type[S], sandbox_id: str, *, controller: AsyncController) -> S:
        """A sandbox that runs, by its id."""
        return cls(controller, await controller.get_sandbox(sandbox_id))

    async def eval(self, code: str, *, language: Optional[str] = None, timeout: Optional[float] = None) -> Any:
        """Evaluates source text in the sandbox's warm interpreter; see :meth:`forkd.Sandbox.eval`."""
        said = await self.controller.eval_code(self.id, code, language=language, timeout_secs=timeout)
        error, result = said["error"], said["result"]
        if error is not None:
            raise EvalError(error)
        return json.loads(result) if language == "node" and result else result

    async def ping(self) -> Dict[str, Any]:
        """Asks its agent whether it is there."""
        return await self.controller.ping_sandbox(self.id)

    async def pty(
        self, command: Optional[Command] = None, *, rows: int = 24, columns: int = 80, **options: Any
    ) -> AsyncProcess:
        """A program on a terminal, a shell unless another is given."""
        return await self.commands.start(command or ["/bin/sh"], terminal=(rows, columns), **options)

    async def fork(self: S, *, memory_limit_mib: Optional[int] = None) -> S:
        """A running copy of it as it is now."""
        return (await self.fork_many(1, memory_limit_mib=memory_limit_mib))[0]

    async def fork_many(self: S, n: int, *, memory_limit_mib: Optional[int] = None) -> List[S]:
        """``n`` running copies, all of one instant."""
        copies = await self.controller.fork_sandbox(self.id, n, memory_limit_mib)
        return [type(self)(self.controller, info) for info in copies]

    async def branch(
        self,
        tag: Optional[str] = None,
        *,
        mode: Optional[BranchMode] = None,
        wait: bool = True,
        parent_tag: Optional[str] = None,
    ) -> SnapshotInfo:
        """Takes a snapshot of it, to spawn from."""
        return await self.controller.branch_sandbox(self.id, tag, mode=mode, wait=wait, parent_tag=parent_tag)

    async def checkpoint(self, name: Optional[str] = None, *, disk: bool = False) -> CheckpointInfo:
        """Freezes it as it is now, to come back to."""
        return await self.controller.checkpoint_sandbox(self.id, name, disk=disk)

    async def checkpoints(self) -> List[CheckpointInfo]:
        """Its checkpoints, oldest first."""
        return await self.controller.list_checkpoints(self.id)

    async def rewind(self, name: Optional[str] = None, *, back: Optional[int] = None) -> CheckpointInfo:
        """Brings it back to a checkpoint; without a name to the newest, or to the one that many back."""
        return await self.controller.rewind_sandbox(self.id, name, back=back)

    async def kill(self) -> None:
        """Ends it. Ending one that has ended already is no error."""
        try:
            await self.controller.kill_sandbox(self.id)
        except ControllerError as error:
            if error.status != 404:
                raise
        finally:
            if self._owns_controller:
                await self.controller.aclose()

    async def __aenter__(self: S) -> S:
        return self

    async def __aexit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        await self.kill()


class AsyncCommands:
    """Programs in a sandbox."""

    def __init__(self, sandbox: AsyncSandbox) -> None:
        self._sandbox = sandbox

    async def run(
        self,
        cmd: Command,
        timeout: float = 30,
        *,
        env: Optional[Mapping[str, str]] = None,
        cwd: Optional[str] = None,
        user: Optional[str] = None,
        stdin: Optional[str] = None,
        on_stdout: Optional[Receiver] = None,
        on_stderr: Optional[Receiver] = None,
    ) -> CommandResult:
        """Runs a program to its end; see :meth:`forkd.commands.Commands.run`."""
        args = _calls.argv(cmd)
        controller, sandbox_id = self._sandbox.controller, self._sandbox.id
        if on_stdout is None and on_stderr is None:
            body = _calls.program(args, timeout, env, cwd, user, stdin)
            return CommandResult.of(await controller.call(_calls.execute(sandbox_id, body)))
        output = Output(on_stdout, on_stderr)
        if stdin is not None:
            async with await self.start(args, timeout=timeout, env=env, cwd=cwd, user=user) as process:
                await process.write(stdin)
                await process.close_stdin()
                async for stream, data in process:
                    output.take(_streams.ExecEvent(stream=stream, data=data))
                output.take(_streams.ExecEvent(exit_code=process.exit_code))
            return output.result()
        message = _streams.start_message(args, timeout, env, cwd, user, None, stdin=False)
        async for line in controller.lines(_calls.execute_streaming(sandbox_id, message)):
            output.take(_streams.exec_event(json.loads(line)))
        return output.result()

    async def start(
        self,
        cmd: Command,
        *,
        timeout: Optional[float] = None,
        env: Optional[Mapping[str, str]] = None,
        cwd: Optional[str] = None,
        user: Optional[str] = None,
        terminal: Optional[Tuple[int, int]] = None,
    ) -> AsyncProcess:
        """Starts a program and returns at once; see :meth:`forkd.commands.Commands.start`."""
        message = _streams.start_message(_calls.argv(cmd), timeout, env, cwd, user, terminal)
        return await AsyncProcess.start(self._sandbox.controller, self._sandbox.id, message)


class AsyncFiles:
    """Files of a sandbox; see :class:`forkd.files.Files`."""

    def __init__(self, sandbox: AsyncSandbox) -> None:
        self._sandbox = sandbox

    async def read(self, path: str) -> bytes:
        """A file's content."""
        return await self._sandbox.controller.fetch(_calls.read_file(self._sandbox.id, path))

    async def read_text(self, path: str, encoding: str = "utf-8") -> str:
        """A file's content as text."""
        return (await self.read(path)).decode(encoding)

    async def write(self, path: str, content: _calls.Content, *, mode: Optional[int] = None) -> None:
        """Creates or replaces a file, with the directories it needs."""
        await self._call(_calls.write_file(self._sandbox.id, path, content, mode))

    async def list(self, path: str) -> List[FileInfo]:
        """What is in a directory, by name."""
        return await self._call(_calls.list_files(self._sandbox.id, path))

    async def stat(self, path: str) -> FileInfo:
        """One file, a final symbolic link not followed."""
        return await self._call(_calls.stat_file(self._sandbox.id, path))

    async def exists(self, path: str) -> bool:
        """Whether there is anything at ``path``."""
        try:
            await self.stat(path)
        except ControllerError as error:
            if error.status == 404:
                return False
            raise
        return True

    async def mkdir(self, path: str) -> None:
        """Makes a directory and those above it."""
        await self._call(_calls.make_directory(self._sandbox.id, path))

    async def move(self, source: str, target: str) -> None:
        """Gives a file or directory another name."""
        await self._call(_calls.move_file(self._sandbox.id, source, target))

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Removes a file, or with ``recursive`` a directory with all that is in it."""
        await self._call(_calls.remove_file(self._sandbox.id, path, recursive))

    async def watch(self, path: str, *, recursive: bool = False) -> AsyncIterator[FileChange]:
        """Yields changes as they happen, until the iteration is given up."""
        async for line in self._sandbox.controller.lines(_calls.watch_files(self._sandbox.id, path, recursive)):
            change = _streams.file_change(line)
            if change is not None:
                yield change

    async def _call(self, call: Call[T]) -> T:
        return await self._sandbox.controller.call(call)
