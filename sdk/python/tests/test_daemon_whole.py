"""What concerns more than one sandbox, against a daemon at FORKD_URL with the snapshot "quickstart"."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
import unittest
import uuid
from pathlib import Path

from forkd import AsyncController, AsyncSandbox, Controller, ControllerError, Event, EventStream, Sandbox

TAG = os.environ.get("FORKD_TEST_TAG", "quickstart")


def until(events: EventStream, kind: str) -> Event:
    """The next event of a kind."""
    return next(event for event in events if event["event"] == kind)


@unittest.skipUnless(os.environ.get("FORKD_URL"), "FORKD_URL names no daemon")
class Whole(unittest.TestCase):
    def setUp(self) -> None:
        self.controller = Controller()

    def test_a_key_makes_one_sandbox_whose_life_is_told(self) -> None:
        key = str(uuid.uuid4())
        events = self.controller.events()
        self.addCleanup(events.close)
        before = events.last_id
        self.assertIsNotNone(before)
        first, again = (self.controller.spawn_sandboxes(TAG, idempotency_key=key)[0] for _ in range(2))
        self.assertEqual(first["id"], again["id"])
        with self.assertRaises(ControllerError) as caught:
            self.controller.spawn_sandboxes(TAG, n=2, idempotency_key=key)
        self.assertEqual(caught.exception.code, "idempotency_key_reused")

        sandbox = Sandbox.connect(first["id"])
        sandbox.set_timeout(3600, "suspend")
        self.assertGreater(sandbox.info["expires_at_unix"], time.time() + 3000)
        sandbox.set_timeout(None)
        self.assertNotIn("expires_at_unix", sandbox.info)
        used = next(used for used in self.controller.usage() if used["id"] == first["id"])
        self.assertGreater(used["private_bytes"], 0)
        source = next(root for root in self.controller.tree()["roots"] if root["name"] == TAG)
        self.assertIn(first["id"], [child["name"] for child in source["children"]])
        sandbox.set_timeout(1, "kill")
        with self.controller.events(sandbox_id=first["id"], after=before) as own:
            ended = until(own, "sandbox.ended")
        self.assertEqual(ended["sandbox"], first["id"])
        # Another stream, from the same point on, was told of everything before it too.
        told = []
        for event in events:
            if event.get("sandbox") == first["id"]:
                told.append(event["event"])
            if event["id"] == ended["id"]:
                break
        self.assertEqual((told[0], told[-1], told.count("sandbox.created")), ("sandbox.created", "sandbox.ended", 1))
        self.assertIn("sandbox.timeout_changed", told)

    def test_a_workspace_comes_back_as_it_was(self) -> None:
        name = f"python-{uuid.uuid4().hex[:8]}"
        made = self.controller.create_workspace(name, TAG, idle_suspend_secs=900)
        self.addCleanup(self.controller.delete_workspace, name)
        self.assertEqual((made["status"], made["idle_suspend_secs"]), ("running", 900))
        sandbox = Sandbox.connect(made["live_sandbox_id"])
        sandbox.eval("kept = 6 * 7")
        self.assertEqual(self.controller.suspend_workspace(name)["status"], "suspended")
        self.assertNotIn("live_sandbox_id", self.controller.get_workspace(name))
        back = self.controller.resume_workspace(name)
        self.assertEqual(Sandbox.connect(back["live_sandbox_id"]).eval("kept"), "42")
        self.assertIn(name, [found["name"] for found in self.controller.list_workspaces()])

    def test_folders_go_there_and_back(self) -> None:
        async def drive(local: Path) -> None:
            async with AsyncController() as controller, await AsyncSandbox.spawn(TAG, controller=controller) as sandbox:
                await sandbox.files.upload(local / "project", "/root/async")
                await sandbox.files.download("/root/async/project", local / "back-async")

        with tempfile.TemporaryDirectory() as scratch, Sandbox.spawn(TAG) as sandbox:
            local = Path(scratch)
            (local / "project/bin").mkdir(parents=True)
            (local / "project/bin/run").write_bytes(os.urandom(1 << 20))
            (local / "project/bin/run").chmod(0o750)
            (local / "project/link").symlink_to("bin/run")
            sandbox.files.upload(local / "project", "/root/new/place")
            self.assertEqual(sandbox.files.stat("/root/new/place/project/bin/run")["mode"], "0750")
            sandbox.files.download("/root/new/place/project", local / "back")
            asyncio.run(drive(local))
            for back in ("back", "back-async"):
                came = local / back / "project"
                self.assertEqual((came / "bin/run").read_bytes(), (local / "project/bin/run").read_bytes())
                self.assertEqual(os.readlink(came / "link"), "bin/run")
            # A link that leads out is not followed on this host.
            sandbox.files.mkdir("/root/evil")
            sandbox.commands.run("ln -s /etc/passwd /root/evil/link")
            with self.assertRaisesRegex(Exception, "absolute path"):
                sandbox.files.download("/root/evil", local / "evil")
            self.assertFalse((local / "evil/evil/link").is_symlink())
            with self.assertRaisesRegex(ControllerError, "/root/none"):
                sandbox.files.download("/root/none", local / "none")

    def test_what_cannot_be_booted_is_named(self) -> None:
        with self.assertRaisesRegex(ControllerError, "/nonexistent/vmlinux"):
            self.controller.create_snapshot("never", "/nonexistent/vmlinux", "/nonexistent/rootfs.ext4")

    def test_coroutines_do_the_same(self) -> None:
        async def drive() -> None:
            async with AsyncController() as controller:
                async with await controller.events() as events:
                    sandbox = await AsyncSandbox.spawn(TAG, controller=controller, timeout_secs=3600)
                    async for event in events:
                        if event.get("sandbox") == sandbox.id:
                            break
                    self.assertEqual(event["event"], "sandbox.created")
                await sandbox.set_timeout(None)
                self.assertNotIn("expires_at_unix", sandbox.info)
                self.assertIn(sandbox.id, [used["id"] for used in await controller.usage()])
                await sandbox.kill()
                with self.assertRaises(ControllerError) as caught:
                    await controller.get_workspace("none")
                self.assertEqual(caught.exception.status, 404)
                self.assertTrue((await controller.tree())["roots"])

        asyncio.run(drive())


if __name__ == "__main__":
    unittest.main()
