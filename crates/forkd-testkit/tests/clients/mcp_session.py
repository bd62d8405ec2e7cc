"""A session over standard input and output with an MCP server: the 11 tools that clients know.

Arguments: the snapshot's tag, a kernel and a root disk on the daemon's host ("-": nothing is booted), and the server's
command line.
"""

import asyncio
import json
import os
import sys

from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

TAG, KERNEL, ROOTFS, *SERVER = sys.argv[1:]
TOOLS = {
    "list_snapshots",
    "create_snapshot",
    "spawn_sandboxes",
    "branch_sandbox",
    "wait_for_text",
    "list_sandboxes",
    "get_sandbox",
    "kill_sandbox",
    "exec_command",
    "eval_code",
    "ping_sandbox",
}
BRANCH, CREATED = "mcp-branch", "mcp-created"


def value(answer):
    """What a tool returned. Lists come wrapped, or as one text a member."""
    assert not answer.isError, answer
    wrapped = answer.structuredContent
    if wrapped is not None:
        return wrapped["result"] if set(wrapped) == {"result"} else wrapped
    texts = [json.loads(part.text) for part in answer.content]
    return texts[0] if len(texts) == 1 else texts


async def main():
    server = StdioServerParameters(command=SERVER[0], args=SERVER[1:], env=dict(os.environ))
    async with stdio_client(server) as streams, ClientSession(*streams) as session:
        await session.initialize()
        tools = {tool.name: tool for tool in (await session.list_tools()).tools}
        assert TOOLS <= set(tools), TOOLS - set(tools)

        async def call(tool, **arguments):
            called.add(tool)
            return value(await session.call_tool(tool, arguments))

        async def fails(tool, **arguments):
            answer = await session.call_tool(tool, arguments)
            assert answer.isError, answer
            return "".join(part.text for part in answer.content)

        called = set()
        snapshots = await call("list_snapshots")
        assert any(snapshot["tag"] == TAG and snapshot["bootable"] for snapshot in snapshots), snapshots
        (made,) = await call("spawn_sandboxes", snapshot_tag=TAG)
        sandbox = made["id"]
        assert made["memory_limit_mib"] == 256, made
        assert any(one["id"] == sandbox for one in await call("list_sandboxes"))
        assert (await call("get_sandbox", sandbox_id=sandbox))["snapshot_tag"] == TAG
        assert (await call("ping_sandbox", sandbox_id=sandbox))["pong"] is True
        ran = await call("exec_command", sandbox_id=sandbox, args=["sh", "-c", "echo READY > /root/log; echo out; exit 3"])
        assert (ran["stdout"], ran["exit_code"]) == ("out\n", 3), ran
        waited = await call("wait_for_text", sandbox_id=sandbox, path="/root/log", marker="READY", timeout_secs=60)
        assert waited["found"] is True and waited["last_excerpt"] == "READY\n", waited
        vain = await call("wait_for_text", sandbox_id=sandbox, path="/root/none", marker="x", timeout_secs=1)
        assert vain["found"] is False, vain
        evaluated = await call("eval_code", sandbox_id=sandbox, code="numpy.ones(2).tolist()")
        assert (evaluated["result"], evaluated["error"]) == ("[1.0, 1.0]", None), evaluated
        branch = await call("branch_sandbox", sandbox_id=sandbox, tag=BRANCH)
        assert (branch["tag"], branch["branched_from"]) == (BRANCH, sandbox), branch
        if KERNEL != "-":
            created = await call("create_snapshot", tag=CREATED, kernel=KERNEL, rootfs=ROOTFS, boot_wait_secs=30)
            assert (created["tag"], created["status"]) == (CREATED, "ready"), created
            (booted,) = await call("spawn_sandboxes", snapshot_tag=CREATED, memory_limit_mib=1024)
            ran = await call("exec_command", sandbox_id=booted["id"], args=["uname", "-s"])
            assert ran["stdout"] == "Linux\n", ran
            await call("kill_sandbox", sandbox_id=booted["id"])
        assert await call("kill_sandbox", sandbox_id=sandbox) == {"id": sandbox, "killed": True}
        assert "404" in await fails("get_sandbox", sandbox_id=sandbox)
        left = TOOLS - called
        assert left == ({"create_snapshot"} if KERNEL == "-" else set()), left

    print("the session worked")


asyncio.run(main())
