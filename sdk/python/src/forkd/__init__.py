"""Fork warmed Linux microVMs, run things in them, branch and rewind them.

:class:`Sandbox` is one running copy of a snapshot, :class:`Controller` the daemon that runs them. :class:`AsyncSandbox`
and :class:`AsyncController` are the same as coroutines (``pip install 'forkd[async]'``).
"""

from __future__ import annotations

from ._aio_process import AsyncProcess
from .aio import AsyncController, AsyncEventStream, AsyncSandbox
from .commands import CommandResult
from .controller import Controller
from .errors import ControllerError, DaemonUnreachable, EvalError, MissingExtra, NotOverRest, StreamError
from .events import EventStream
from .process import Process
from .sandbox import Sandbox
from .types import (
    BranchMode,
    CheckpointInfo,
    EvalAnswer,
    Event,
    EventKind,
    ExecAnswer,
    Family,
    FamilyMember,
    FileChange,
    FileInfo,
    OnTimeout,
    SandboxInfo,
    SandboxMemory,
    SandboxUsage,
    SnapshotInfo,
    WorkspaceInfo,
)

__version__ = "0.6.0"
__all__ = [
    "AsyncController",
    "AsyncEventStream",
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
    "Event",
    "EventKind",
    "EventStream",
    "ExecAnswer",
    "Family",
    "FamilyMember",
    "FileChange",
    "FileInfo",
    "MissingExtra",
    "NotOverRest",
    "OnTimeout",
    "Process",
    "StreamError",
    "Sandbox",
    "SandboxInfo",
    "SandboxMemory",
    "SandboxUsage",
    "SnapshotInfo",
    "WorkspaceInfo",
]
