"""Programs in a sandbox."""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, Mapping, Optional, Tuple

from . import _calls, _streams
from ._calls import Command
from .errors import NotOverRest
from .process import Process
from .types import ExecAnswer

if TYPE_CHECKING:
    from .sandbox import Sandbox

Receiver = Callable[[str], None]
"""Is given pieces of output as they come."""


@dataclass
class CommandResult:
    """What a program said and how it ended. A negative exit code is the signal that killed it."""

    stdout: str
    stderr: str
    exit_code: int

    @classmethod
    def of(cls, answer: ExecAnswer) -> CommandResult:
        """The daemon's answer as a result."""
        return cls(stdout=answer["stdout"], stderr=answer["stderr"], exit_code=answer["exit_code"])


class Output:
    """Collects what a program says, and passes it on as it comes. Characters that pieces cut in two are kept whole."""

    def __init__(self, on_stdout: Optional[Receiver], on_stderr: Optional[Receiver]) -> None:
        self._receivers = {"stdout": on_stdout, "stderr": on_stderr}
        self._decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in self._receivers}
        self._text = {"stdout": "", "stderr": ""}
        self._exit_code: Optional[int] = None

    def take(self, event: _streams.ExecEvent) -> None:
        """Takes one event in."""
        if event.stream is not None:
            self._piece(event.stream, event.data, False)
        elif event.exit_code is not None:
            self._exit_code = event.exit_code
            for name in self._receivers:
                self._piece(name, b"", True)

    def result(self) -> CommandResult:
        """What came, when the stream has ended."""
        if self._exit_code is None:
            raise ConnectionError("the daemon closed the connection before the program had ended")
        return CommandResult(self._text["stdout"], self._text["stderr"], self._exit_code)

    def _piece(self, name: str, data: bytes, final: bool) -> None:
        text = self._decoders[name].decode(data, final)
        if not text:
            return
        self._text[name] += text
        receiver = self._receivers[name]
        if receiver is not None:
            receiver(text)


class Commands:
    """``sandbox.commands``."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def run(
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
        """Runs a program to its end, ``timeout`` seconds at most.

        A string is a shell's command line; a list is a program and its arguments. ``stdin`` is text for its standard
        input. ``on_stdout`` and ``on_stderr`` are called with pieces of output as they come; the result has all of it
        all the same. Both at once need the extra ``forkd[pty]``.
        """
        args = _calls.argv(cmd)
        if self._sandbox._controller is None:
            if any(option is not None for option in (env, cwd, user, stdin, on_stdout, on_stderr)):
                raise NotOverRest("an option other than timeout")
            return self._run_directly(args, timeout)
        controller, sandbox_id = self._sandbox.controller, self._sandbox.id
        if on_stdout is None and on_stderr is None:
            body = _calls.program(args, timeout, env, cwd, user, stdin)
            return CommandResult.of(controller.call(_calls.execute(sandbox_id, body)))
        output = Output(on_stdout, on_stderr)
        if stdin is not None:
            with self.start(args, timeout=timeout, env=env, cwd=cwd, user=user) as process:
                process.write(stdin)
                process.close_stdin()
                for stream, data in process:
                    output.take(_streams.ExecEvent(stream=stream, data=data))
                output.take(_streams.ExecEvent(exit_code=process.exit_code))
            return output.result()
        message = _streams.start_message(args, timeout, env, cwd, user, None, stdin=False)
        with controller.open(_calls.execute_streaming(sandbox_id, message)) as lines:
            for line in lines:
                if line.strip():
                    output.take(_streams.exec_event(json.loads(line)))
        return output.result()

    def start(
        self,
        cmd: Command,
        *,
        timeout: Optional[float] = None,
        env: Optional[Mapping[str, str]] = None,
        cwd: Optional[str] = None,
        user: Optional[str] = None,
        terminal: Optional[Tuple[int, int]] = None,
    ) -> Process:
        """Starts a program and returns at once; its standard input, output and signals are the :class:`Process`'s.

        With ``terminal``, rows and columns, it runs on a terminal of its own. Needs the extra ``forkd[pty]``.
        """
        return Process.start(
            self._sandbox.controller,
            self._sandbox.id,
            _streams.start_message(_calls.argv(cmd), timeout, env, cwd, user, terminal),
        )

    def _run_directly(self, args: list[str], timeout: float) -> CommandResult:
        answer = self._sandbox._ask({"action": "exec", "args": args, "timeout": timeout})
        if "error" in answer and "stdout" not in answer:
            return CommandResult(stdout="", stderr=str(answer["error"]), exit_code=1)
        return CommandResult(
            stdout=answer.get("stdout", ""),
            stderr=answer.get("stderr", ""),
            exit_code=int(answer.get("exit_code", -1)),
        )
