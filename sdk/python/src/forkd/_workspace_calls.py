"""What is sent for each call about workspaces."""

from __future__ import annotations

from typing import List, Optional

from ._calls import Call, make, present, segment, whole_seconds
from .types import WorkspaceInfo


def workspace(name: str, tail: str = "") -> str:
    """The path of a workspace, or below it."""
    return f"/v1/workspaces/{segment(name)}{tail}"


def list_workspaces() -> Call[List[WorkspaceInfo]]:
    return Call("GET", "/v1/workspaces")


def create_workspace(
    name: str,
    snapshot_tag: str,
    per_child_netns: bool,
    memory_limit_mib: Optional[int],
    hugepages: bool,
    idle_suspend_secs: Optional[float],
    key: Optional[str],
) -> Call[WorkspaceInfo]:
    options = present(
        per_child_netns=per_child_netns or None,
        memory_limit_mib=memory_limit_mib,
        hugepages=hugepages or None,
        idle_suspend_secs=None if idle_suspend_secs is None else whole_seconds(idle_suspend_secs),
    )
    return make("/v1/workspaces", {"name": name, "snapshot_tag": snapshot_tag, **options}, key)


def get_workspace(name: str) -> Call[WorkspaceInfo]:
    return Call("GET", workspace(name))


def delete_workspace(name: str) -> Call[None]:
    return Call("DELETE", workspace(name))


def suspend_workspace(name: str, key: Optional[str]) -> Call[WorkspaceInfo]:
    return make(workspace(name, "/suspend"), {}, key)


def resume_workspace(name: str, key: Optional[str]) -> Call[WorkspaceInfo]:
    return Call("POST", workspace(name, "/resume"), makes=True, key=key)
