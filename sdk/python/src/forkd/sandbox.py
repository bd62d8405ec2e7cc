"""One sandbox as an object."""

from __future__ import annotations

import json
import os
from typing import Any, ClassVar, Dict, List, Optional, Type, TypeVar

from . import _calls
from ._agent_link import ForegroundFork, ask
from ._contexts import Context
from .commands import CommandResult, Commands
from .controller import Controller
from .errors import ControllerError, EvalError, NotOverRest
from .files import Files
from .process import Process
from .types import BranchMode, CheckpointInfo, OnTimeout, SandboxInfo, SnapshotInfo

__all__ = ["CommandResult", "Sandbox"]

S = TypeVar("S", bound="Sandbox")


class Sandbox(Context):
    """A running copy of a snapshot.

    :meth:`spawn` makes one through the daemon, and all methods work on it::

        with Sandbox.spawn("quickstart") as sandbox:
            sandbox.commands.run("echo hi").stdout

    ``Sandbox(tag)`` runs a ``forkd fork`` in the background and talks to the guest's agent directly, at ``target``;
    ``Sandbox(target=…, spawn=False)`` attaches to an agent that runs. These have ``commands.run``, ``eval``, ``ping``
    and ``kill``.
    """

    DEFAULT_TAG: ClassVar[str] = os.environ.get("FORKD_TAG", "pyagent")
    DEFAULT_TARGET: ClassVar[str] = os.environ.get("FORKD_TARGET", "10.42.0.2:8888")

    tag: str
    target: str
    timeout: float
    _fork: Optional[ForegroundFork]
    _controller: Optional[Controller]
    _info: Optional[SandboxInfo]

    def __init__(
        self,
        tag: Optional[str] = None,
        target: Optional[str] = None,
        timeout: int = 30,
        *,
        spawn: bool = True,
    ) -> None:
        self._prepare(tag or self.DEFAULT_TAG, target or self.DEFAULT_TARGET, timeout)
        if spawn:
            fork = ForegroundFork(self.tag)
            self._fork = fork
            fork.wait_for(self.target, self.timeout + 5)

    def _prepare(self, tag: str, target: str, timeout: float) -> None:
        self.tag, self.target, self.timeout = tag, target, timeout
        self._fork = self._controller = self._info = None
        self.commands = Commands(self)
        self.files = Files(self)

    # Making and finding them.

    @classmethod
    def create(cls: Type[S], *args: Any, **kwargs: Any) -> S:
        """The constructor by another name."""
        return cls(*args, **kwargs)

    @classmethod
    def spawn(cls: Type[S], tag: Optional[str] = None, *, controller: Optional[Controller] = None, **options: Any) -> S:
        """Forks one child of a snapshot.

        ``options`` are those of :meth:`Controller.spawn_sandboxes`: ``memory_limit_mib``, ``hugepages``, ….
        """
        return cls.spawn_many(1, tag, controller=controller, **options)[0]

    @classmethod
    def spawn_many(
        cls: Type[S], n: int, tag: Optional[str] = None, *, controller: Optional[Controller] = None, **options: Any
    ) -> List[S]:
        """Forks ``n`` children of a snapshot in one request."""
        client = controller or Controller()
        return [cls.of(client, info) for info in client.spawn_sandboxes(tag or cls.DEFAULT_TAG, n=n, **options)]

    @classmethod
    def connect(cls: Type[S], sandbox_id: str, *, controller: Optional[Controller] = None) -> S:
        """A sandbox that runs, by its id."""
        client = controller or Controller()
        return cls.of(client, client.get_sandbox(sandbox_id))

    @classmethod
    def of(cls: Type[S], controller: Controller, info: SandboxInfo) -> S:
        """The sandbox that ``info`` is about."""
        sandbox = cls.__new__(cls)
        sandbox._prepare(info["snapshot_tag"], info["guest_addr"], controller.timeout)
        sandbox._controller = controller
        sandbox._info = info
        return sandbox

    # What it is.

    @property
    def controller(self) -> Controller:
        """The daemon that runs it."""
        if self._controller is None:
            raise NotOverRest("this")
        return self._controller

    @property
    def info(self) -> SandboxInfo:
        """What the daemon last said about it."""
        if self._info is None:
            raise NotOverRest("info")
        return self._info

    @property
    def id(self) -> str:
        """Its id."""
        return self.info["id"]

    def __repr__(self) -> str:
        return f"<Sandbox {self._info['id'] if self._info else self.target} of {self.tag}>"

    # Running things.

    def eval(self, code: str, *, language: Optional[str] = None, timeout: Optional[float] = None) -> Any:
        """Evaluates source text in the sandbox's warm interpreter.

        The value is the ``repr`` of what Python evaluates to. Node's is decoded, where it is known to be Node's: with
        ``language="node"``, or from an agent that says so. An exception in the guest raises :class:`EvalError`.
        """
        if self._controller is None:
            answer = self._ask({"action": "eval", "code": code})
            if "error" in answer:
                raise EvalError(str(answer["error"]))
            return json.loads(answer["result_json"]) if "result_json" in answer else answer.get("result")
        said = self.controller.eval_code(self.id, code, language=language, timeout_secs=timeout)
        error, result = said["error"], said["result"]
        if error is not None:
            raise EvalError(error)
        return json.loads(result) if language == "node" and result else result

    def ping(self) -> Dict[str, Any]:
        """Asks its agent whether it is there."""
        if self._controller is None:
            return self._ask({"action": "ping"})
        return self.controller.ping_sandbox(self.id)

    def pty(
        self, command: Optional[_calls.Command] = None, *, rows: int = 24, columns: int = 80, **options: Any
    ) -> Process:
        """A program on a terminal, a shell unless another is given; ``options`` as for ``commands.start``."""
        return self.commands.start(command or ["/bin/sh"], terminal=(rows, columns), **options)

    def port_url(self, port: int, path: str = "/") -> str:
        """Where a TCP port of the guest is served. Requests need the daemon's token, as all do."""
        address = self.controller.address
        base = f"unix:{address.socket}:" if address.socket else address.base
        return base + _calls.port_path(self.id, port, path)

    # Copies.

    def fork(self: S, **options: Any) -> S:
        """A running copy of it as it is now; ``options`` as for :meth:`Controller.fork_sandbox`."""
        return self.fork_many(1, **options)[0]

    def fork_many(self: S, n: int, **options: Any) -> List[S]:
        """``n`` running copies, all of one instant."""
        copies = self.controller.fork_sandbox(self.id, n, **options)
        return [type(self).of(self.controller, info) for info in copies]

    def branch(
        self,
        tag: Optional[str] = None,
        *,
        mode: Optional[BranchMode] = None,
        wait: bool = True,
        diff: bool = False,
        measure_diff: bool = False,
        parent_tag: Optional[str] = None,
    ) -> SnapshotInfo:
        """Takes a snapshot of it, to spawn from; see :meth:`Controller.branch_sandbox`."""
        return self.controller.branch_sandbox(self.id, tag, diff, measure_diff, mode, wait, parent_tag=parent_tag)

    def checkpoint(self, name: Optional[str] = None, *, disk: bool = False) -> CheckpointInfo:
        """Freezes it as it is now, to come back to."""
        return self.controller.checkpoint_sandbox(self.id, name, disk=disk)

    def checkpoints(self) -> List[CheckpointInfo]:
        """Its checkpoints, oldest first."""
        return self.controller.list_checkpoints(self.id)

    def rewind(self, name: Optional[str] = None, *, back: Optional[int] = None) -> CheckpointInfo:
        """Brings it back to a checkpoint; without a name to the newest, or to the one that many back."""
        return self.controller.rewind_sandbox(self.id, name, back=back)

    # Its end.

    def set_timeout(self, timeout_secs: Optional[float], on_timeout: Optional[OnTimeout] = None) -> None:
        """Lets it end this long after now; with ``None`` it lives until it is ended."""
        self._info = self.controller.set_timeout(self.id, timeout_secs, on_timeout)

    def suspend(self) -> SnapshotInfo:
        """Puts it on disk as a snapshot, and ends it."""
        return self.controller.suspend_sandbox(self.id)

    def kill(self) -> None:
        """Ends it. Ending one that has ended already is no error."""
        if self._fork is not None:
            fork, self._fork = self._fork, None
            fork.end()
        elif self._controller is not None:
            try:
                self._controller.kill_sandbox(self.id)
            except ControllerError as error:
                if error.status != 404:
                    raise

    def _leave(self) -> None:
        self.kill()

    def _ask(self, message: Dict[str, Any]) -> Dict[str, Any]:
        return ask(self.target, message, self.timeout + 5)
