"""One sandbox as an object, as coroutines."""

from __future__ import annotations

import json
from typing import Any, Dict, List, Mapping, Optional, Tuple, Type, TypeVar

from . import _calls, _streams
from ._aio_controller import AsyncController
from ._aio_files import AsyncFiles
from ._aio_process import AsyncProcess
from ._calls import Command
from ._contexts import AsyncContext
from .commands import CommandResult, Output, Receiver
from .errors import ControllerError, EvalError
from .types import BranchMode, CheckpointInfo, OnTimeout, SandboxInfo, SnapshotInfo

S = TypeVar("S", bound="AsyncSandbox")


class AsyncSandbox(AsyncContext):
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

    async def fork(self: S, **options: Any) -> S:
        """A running copy of it as it is now; ``options`` as for :meth:`AsyncController.fork_sandbox`."""
        return (await self.fork_many(1, **options))[0]

    async def fork_many(self: S, n: int, **options: Any) -> List[S]:
        """``n`` running copies, all of one instant."""
        copies = await self.controller.fork_sandbox(self.id, n, **options)
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

    async def set_timeout(self, timeout_secs: Optional[float], on_timeout: Optional[OnTimeout] = None) -> None:
        """Lets it end this long after now; with ``None`` it lives until it is ended."""
        self.info = await self.controller.set_timeout(self.id, timeout_secs, on_timeout)

    async def suspend(self) -> SnapshotInfo:
        """Puts it on disk as a snapshot, and ends it."""
        return await self.controller.suspend_sandbox(self.id)

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

    async def _leave(self) -> None:
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
