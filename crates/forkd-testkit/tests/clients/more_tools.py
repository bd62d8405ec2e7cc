"""The tools that this server has besides. Arguments: the snapshot's tag and the server's command line."""

import asyncio
import os
import sys

from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

TAG, *SERVER = sys.argv[1:]


async def main():
    server = StdioServerParameters(command=SERVER[0], args=SERVER[1:], env=dict(os.environ))
    async with stdio_client(server) as streams, ClientSession(*streams) as session:
        await session.initialize()

        async def call(tool, **arguments):
            answer = await session.call_tool(tool, arguments)
            assert not answer.isError, (tool, answer)
            value = answer.structuredContent
            if value is None:
                return answer.content[0].text
            return value["result"] if set(value) == {"result"} else value

        (made,) = await call("spawn_sandboxes", snapshot_tag=TAG)
        here = {"sandbox_id": made["id"]}
        written = await call("write_file", **here, path="/srv/new/plan.txt", content="before\n")
        assert written["size"] == 7, written
        assert (await call("checkpoint_sandbox", **here, name="before"))["name"] == "before"
        (copy,) = await call("fork_sandbox", **here)
        await call("write_file", **here, path="/srv/new/plan.txt", content="after\n")
        assert await call("read_file", sandbox_id=copy["id"], path="/srv/new/plan.txt") == "before\n"
        (entry,) = await call("list_files", **here, path="/srv/new")
        assert (entry["name"], entry["type"], entry["size"]) == ("plan.txt", "file", 6), entry
        assert [one["name"] for one in await call("list_checkpoints", **here)] == ["before"]
        await call("rewind_sandbox", **here, name="before")
        assert await call("read_file", **here, path="/srv/new/plan.txt") == "before\n"
        refused = await session.call_tool("read_file", {**here, "path": "/srv/none"})
        assert refused.isError and "/srv/none" in refused.content[0].text, refused
        for one in (made["id"], copy["id"]):
            await call("kill_sandbox", sandbox_id=one)
    print("the other tools worked")


asyncio.run(main())
