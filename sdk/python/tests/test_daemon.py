"""Against a daemon at FORKD_URL with the snapshot "quickstart"."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import unittest
import urllib.request
from typing import List, Tuple

from forkd import AsyncController, AsyncSandbox, Controller, ControllerError, FileChange, Sandbox, StreamError

TAG = os.environ.get("FORKD_TEST_TAG", "quickstart")


@unittest.skipUnless(os.environ.get("FORKD_URL"), "FORKD_URL names no daemon")
class Daemon(unittest.TestCase):
    sandbox: Sandbox

    @classmethod
    def setUpClass(cls) -> None:
        cls.sandbox = Sandbox.spawn(TAG)

    @classmethod
    def tearDownClass(cls) -> None:
        cls.sandbox.kill()

    def test_output_comes_while_the_program_runs(self) -> None:
        came: List[Tuple[float, str]] = []
        ended = self.sandbox.commands.run(
            "echo first; sleep 2; echo second; exit 7",
            timeout=60,
            on_stdout=lambda text: came.append((time.monotonic(), text)),
        )
        self.assertEqual((ended.stdout, ended.exit_code), ("first\nsecond\n", 7))
        self.assertGreater(came[-1][0] - came[0][0], 1.0)

    def test_the_options_of_a_program(self) -> None:
        ran = self.sandbox.commands.run("echo $GREETING; pwd; id -u", env={"GREETING": "hi"}, cwd="/usr", user="nobody")
        self.assertEqual(ran.stdout, "hi\n/usr\n65534\n")
        told = self.sandbox.commands.run(["wc", "-c"], stdin="12345", on_stdout=lambda _: None)
        self.assertEqual(told.stdout.strip(), "5")

    def test_what_cannot_be_run_says_so(self) -> None:
        self.assertIn("no-such-program", self.sandbox.commands.run(["no-such-program"]).stderr)
        with self.assertRaisesRegex((ControllerError, StreamError), "no-such-program"):  # type: ignore[arg-type]
            self.sandbox.commands.run(["no-such-program"], on_stdout=lambda _: None)

    def test_signals_reach_a_program(self) -> None:
        script = "trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 0.1; done"
        with self.sandbox.commands.start(script) as process:
            self.assertIsNotNone(process.pid)
            process.read_until("ready\n")
            process.signal("TERM")
            process.read_until("caught\n")
            self.assertEqual(process.wait(), 5)
        with self.sandbox.commands.start(["sleep", "300"]) as process:
            process.kill()
            self.assertEqual(process.wait(30), -9)

    def test_a_program_that_is_given_up_is_killed(self) -> None:
        with self.sandbox.commands.start("exec sleep 4242"):
            pass
        for _ in range(100):
            left = self.sandbox.commands.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c '[s]leep 4242' || true")
            if left.stdout == "0\n":
                return
            time.sleep(0.1)
        self.fail("it still runs")

    def test_large_input_arrives_whole(self) -> None:
        with self.sandbox.commands.start(["sha256sum"]) as process:
            process.write(b"a" * 1_000_000)
            process.close_stdin()
            said = b"".join(data for _, data in process)
        # The digest of a million times "a", from FIPS 180-2, appendix B.3.
        self.assertIn(b"cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0", said)
        self.assertEqual(process.exit_code, 0)

    def test_a_terminal_changes_its_size(self) -> None:
        with self.sandbox.pty(rows=30, columns=90) as shell:
            shell.write("stty size\n")
            shell.read_until("30 90")
            shell.resize(31, 91)
            shell.write("stty size\n")
            shell.read_until("31 91")
            shell.write("exit 3\n")
            self.assertEqual(shell.wait(), 3)

    def test_changes_of_files_are_told(self) -> None:
        self.sandbox.files.mkdir("/root/watched")
        told: List[FileChange] = []
        watching = self.sandbox.files.watch("/root/watched")

        def touch() -> None:
            time.sleep(1)
            self.sandbox.files.write("/root/watched/new", "content")

        toucher = threading.Thread(target=touch)
        toucher.start()
        for change in watching:
            told.append(change)
            # A write replaces the file by one that was written beside it.
            if change["path"] == "/root/watched/new":
                break
        watching.close()  # type: ignore[attr-defined]
        toucher.join()
        self.assertIn(told[-1]["type"], ("created", "moved", "written", "modified"))

    def test_errors_about_files_name_them(self) -> None:
        with self.assertRaisesRegex(ControllerError, "/root/none") as caught:
            self.sandbox.files.read("/root/none")
        self.assertEqual(caught.exception.status, 404)
        big = os.urandom(3 << 20)
        self.sandbox.files.write("/root/a b?&é", big, mode=0o640)
        self.assertEqual(self.sandbox.files.read("/root/a b?&é"), big)
        self.assertEqual(self.sandbox.files.stat("/root/a b?&é")["mode"], "0640")

    def test_a_server_in_the_guest_is_reached(self) -> None:
        self.sandbox.files.write("/srv/www/index.html", "served from the guest")
        server = self.sandbox.commands.start(
            ["python3", "-m", "http.server", "--bind", "127.0.0.1", "8000"], cwd="/srv/www"
        )
        with server:
            request = urllib.request.Request(self.sandbox.port_url(8000))
            request.add_header("Authorization", f"Bearer {self.sandbox.controller.token}")
            for attempt in range(100):
                try:
                    with urllib.request.urlopen(request, timeout=30) as answer:
                        self.assertEqual(answer.read(), b"served from the guest")
                    return
                except urllib.error.HTTPError as error:
                    self.assertIn(error.code, (502, 503, 504), f"attempt {attempt}")
                    error.close()
                    time.sleep(0.3)
            self.fail("nothing was served")

    def test_copies_go_their_own_ways(self) -> None:
        self.sandbox.eval("way = 'source'")
        copies = self.sandbox.fork_many(2)
        try:
            for index, copy in enumerate(copies):
                copy.eval(f"way += ' {index}'")
            self.assertEqual([copy.eval("way") for copy in copies], ["'source 0'", "'source 1'"])
            self.assertEqual(self.sandbox.eval("way"), "'source'")
            self.assertEqual({copy.info["forked_from"] for copy in copies}, {self.sandbox.id})
        finally:
            for copy in copies:
                copy.kill()
                copy.kill()

    def test_rewinding_brings_memory_and_files_back(self) -> None:
        with Sandbox.spawn(TAG) as sandbox:
            for name in ("one", "two"):
                sandbox.eval(f"point = {name!r}")
                self.assertEqual(sandbox.checkpoint(name)["name"], name)
            sandbox.eval("point = 'three'")
            sandbox.rewind(back=2)
            self.assertEqual(sandbox.eval("point"), "'one'")
            with self.assertRaises(ControllerError) as caught:
                sandbox.rewind("two")
            self.assertEqual(caught.exception.code, "checkpoint_not_found")
            sandbox.controller.delete_checkpoint(sandbox.id, "one")
            self.assertEqual(sandbox.checkpoints(), [])

    def test_the_daemon_by_hand(self) -> None:
        controller = Controller()
        found = Sandbox.connect(self.sandbox.id)
        self.assertEqual(found.tag, TAG)
        self.assertTrue(found.ping()["pong"])
        self.assertGreater(controller.sandbox_memory(found.id)["pss_bytes"], 0)
        self.assertEqual(controller.snapshot_info(TAG)["tag"], TAG)
        self.assertIn(found.id, [info["id"] for info in controller.list_sandboxes()])

    def test_coroutines_do_the_same(self) -> None:
        async def drive() -> None:
            async with AsyncController() as controller, await AsyncSandbox.spawn(TAG, controller=controller) as sandbox:
                self.assertEqual(await sandbox.eval("6 * 7"), "42")
                pieces: List[str] = []
                ran = await sandbox.commands.run("echo out; echo err >&2; exit 2", on_stdout=pieces.append)
                self.assertEqual((ran.stdout, ran.stderr, ran.exit_code), ("out\n", "err\n", 2))
                self.assertEqual("".join(pieces), "out\n")
                await sandbox.files.write("/root/a", b"\x00\xff")
                self.assertEqual(await sandbox.files.read("/root/a"), b"\x00\xff")
                self.assertFalse(await sandbox.files.exists("/root/b"))
                await sandbox.checkpoint("here")
                await sandbox.files.remove("/root/a")
                await sandbox.rewind()
                self.assertTrue(await sandbox.files.exists("/root/a"))
                async with await sandbox.commands.start(["cat"]) as process:
                    await process.write("there and back")
                    await process.close_stdin()
                    said = [data async for _, data in process]
                self.assertEqual((b"".join(said), process.exit_code), (b"there and back", 0))
                copy = await sandbox.fork()
                self.assertEqual(await copy.eval("1"), "1")
                await copy.kill()

                async def first_change() -> FileChange:
                    async for change in sandbox.files.watch("/root"):
                        return change
                    raise AssertionError("the stream ended")

                watching = asyncio.ensure_future(first_change())
                await asyncio.sleep(1)
                await sandbox.files.write("/root/c", "c")
                change = await asyncio.wait_for(watching, 60)
                self.assertTrue(change["path"].startswith("/root"))

        asyncio.run(drive())


if __name__ == "__main__":
    unittest.main()
