"""Fork warmed Linux microVMs, run things in them, branch and rewind them.

:class:`Sandbox` is one running copy of a snapshot, :class:`Controller` the daemon that runs them. :class:`AsyncSandbox`
and :class:`AsyncController` are the same as coroutines (``pip install 'forkd[async]'``).
"""

from __future__ import annotations

from ._aio_process import AsyncProcess
from .aio import AsyncController, AsyncSandbox
from .commands import CommandResult
from .controller import Controller
from .errors import ControllerError, DaemonUnreachable, EvalError, MissingExtra, NotOverRest, StreamError
from .process import Process
from .sandbox import Sandbox
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

__version__ = "0.6.0"
__all__ = [
    "AsyncController",
    "AsyncProcess",
    "AsyncSandbox",
    "BranchMode",
    "CheckpointInfo",
    "CommandResult",
    "Controller",
    "ControllerError",
    "DaemonUnreachable",
    "EvalAnswer",
    "EvalError",
    "ExecAnswer",
    "FileChange",
    "FileInfo",
    "MissingExtra",
    "NotOverRest",
    "Process",
    "StreamError",
    "Sandbox",
    "SandboxInfo",
    "SandboxMemory",
    "SnapshotInfo",
]
