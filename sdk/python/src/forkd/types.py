"""The JSON objects that the daemon answers with. All of them are plain dictionaries."""

from __future__ import annotations

from typing import Any, Dict, List, Literal, Optional, TypedDict

BranchMode = Literal["full", "diff", "live"]
"""How a branch was once asked to copy memory. The source stands still equally little in all of them."""


OnTimeout = Literal["kill", "suspend"]
"""How a sandbox ends when its lifetime is over."""


class _SandboxInfo(TypedDict):
    id: str
    snapshot_tag: str
    netns: Optional[str]
    guest_addr: str
    created_at_unix: int
    pid: Optional[int]
    memory_limit_mib: Optional[int]
    has_branched: bool
    last_branch_memory_path: Optional[str]
    branch_count: int


class SandboxInfo(_SandboxInfo, total=False):
    """One sandbox. The later keys are there only when they have something to say."""

    stopped: str
    forked_from: str
    expires_at_unix: int


class _SnapshotInfo(TypedDict):
    tag: str
    dir: str
    created_at_unix: int
    status: Literal["ready", "writing", "failed"]
    bootable: bool


class SnapshotInfo(_SnapshotInfo, total=False):
    """One snapshot."""

    branched_from: str
    pause_ms: int
    diff_ms: int
    diff_physical_bytes: int
    diff_logical_bytes: int
    stages: List[Dict[str, Any]]
    parent_tag: str
    warning: str
    memory_bytes: int
    stored_bytes: int


class _CheckpointInfo(TypedDict):
    name: str
    created_at_unix: int
    pause_us: int
    place: Literal["memory", "disk"]
    automatic: bool


class CheckpointInfo(_CheckpointInfo, total=False):
    """One checkpoint of a sandbox."""

    private_bytes: int
    stored_bytes: int


class _ExecAnswer(TypedDict):
    stdout: str
    stderr: str
    exit_code: int


class ExecAnswer(_ExecAnswer, total=False):
    """What a program said and how it ended."""

    timed_out: bool


class _EvalAnswer(TypedDict):
    result: Optional[str]
    error: Optional[str]
    exit_code: int


class EvalAnswer(_EvalAnswer, total=False):
    """What source text evaluated to: its ``repr`` (Python) or its JSON text (Node)."""

    stdout: str


class _FileInfo(TypedDict):
    name: str
    path: str
    type: Literal["file", "directory", "symlink", "other"]
    size: int
    mode: str
    uid: int
    gid: int
    modified_unix: int


class FileInfo(_FileInfo, total=False):
    """One file of a guest. ``mode`` is in octal; ``target`` is a symbolic link's."""

    target: str


# A key of it is a word of the language, so that it has no class.
FileChange = TypedDict(
    "FileChange",
    {
        "type": Literal["created", "modified", "written", "attributes", "removed", "moved", "missed", "other"],
        "path": str,
        "from": str,
        "directory": bool,
    },
    total=False,
)
"""What happened to a file. ``from`` is where one that was moved had been before."""


class SandboxMemory(TypedDict):
    """What a sandbox costs its host."""

    pss_bytes: int
    private_bytes: int
    page_table_bytes: int
    guest_dirty_bytes: int


class _SandboxUsage(TypedDict):
    id: str
    snapshot_tag: str
    created_at_unix: int


class SandboxUsage(_SandboxUsage, total=False):
    """What one sandbox uses now. The later keys are left out where they do not apply."""

    stopped: str
    expires_at_unix: int
    private_bytes: int
    cpu_ms: int
    uptime_secs: int


class _FamilyMember(TypedDict):
    kind: Literal["snapshot", "sandbox", "checkpoint"]
    name: str
    children: List[FamilyMember]


# A word of the language.
_From = TypedDict("_From", {"from": str}, total=False)


class FamilyMember(_FamilyMember, _From, total=False):
    """A snapshot, sandbox or checkpoint, and what came from it. What it is has the key that ``kind`` names. ``from`` is
    there on roots that are roots only because their tree would be too deep: it names what they came from."""

    snapshot: SnapshotInfo
    sandbox: SandboxInfo
    private_bytes: int
    checkpoint: CheckpointInfo


class Family(TypedDict):
    """Everything, each under what it came from."""

    roots: List[FamilyMember]


class _WorkspaceInfo(TypedDict):
    id: str
    name: str
    source_snapshot_tag: str
    status: Literal["running", "suspended", "stale"]
    created_at_unix: int
    last_active_unix: int


class WorkspaceInfo(_WorkspaceInfo, total=False):
    """One workspace. ``live_sandbox_id`` is its sandbox while it has one."""

    current_state_tag: str
    live_sandbox_id: str
    last_branch_memory_path: str
    idle_suspend_secs: int


EventKind = Literal[
    "sandbox.created",
    "sandbox.stopped",
    "sandbox.ended",
    "sandbox.rewound",
    "sandbox.suspended",
    "sandbox.suspend_failed",
    "sandbox.timeout_changed",
    "snapshot.writing",
    "snapshot.ready",
    "snapshot.failed",
    "snapshot.removed",
    "checkpoint.created",
    "checkpoint.moved",
    "checkpoint.removed",
    "workspace.created",
    "workspace.suspended",
    "workspace.resumed",
    "workspace.stale",
    "workspace.deleted",
    "events.lost",
]
"""What happened. After ``events.lost``, what is known from earlier events may be wrong."""


class _Event(TypedDict):
    id: int
    at_unix: int
    event: EventKind


class Event(_Event, total=False):
    """One thing that happened, and to what."""

    sandbox: str
    snapshot: str
    checkpoint: str
    workspace: str
    reason: str
    code: str
