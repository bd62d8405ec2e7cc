"""What is sent for each call, and what becomes of each answer. Needs no daemon."""

from __future__ import annotations

import asyncio
import inspect
import os
import tempfile
import unittest
import urllib.error
from typing import Any, Dict
from unittest import mock

import forkd
from forkd import AsyncController, Controller, ControllerError, DaemonUnreachable, NotOverRest, Sandbox
from forkd._address import Address, resolve_token
from forkd._calls import host_port

from .http_server import Recorder

INFO: Dict[str, Any] = {
    "id": "sb-1-0000",
    "snapshot_tag": "py",
    "netns": None,
    "guest_addr": "10.42.0.2:8888",
    "created_at_unix": 1,
    "pid": 2,
    "memory_limit_mib": None,
    "has_branched": False,
    "last_branch_memory_path": None,
    "branch_count": 0,
}


class Wire(unittest.TestCase):
    """The bodies that daemons have always got."""

    def setUp(self) -> None:
        self.server = self.enterContext(Recorder()) if hasattr(self, "enterContext") else Recorder().__enter__()
        self.controller = Controller(self.server.url + "/", token="secret token")

    def sent(self, method: str, path: str, body: Any = b"") -> None:
        last = self.server.last()
        self.assertEqual((last["method"], last["path"], last["body"]), (method, path, body))
        self.assertEqual(last["token"], "Bearer secret token")
        self.assertEqual(last["type"], None if body == b"" else "application/json")

    def test_snapshots(self) -> None:
        self.assertEqual(self.controller.list_snapshots(), [])
        self.sent("GET", "/v1/snapshots")
        self.server.answer = (204, b"")
        self.assertIsNone(self.controller.delete_snapshot("py"))
        self.sent("DELETE", "/v1/snapshots/py")
        self.controller.delete_snapshot("py", cascade=True)
        self.sent("DELETE", "/v1/snapshots/py?cascade=true")

    def test_spawn(self) -> None:
        self.controller.spawn_sandboxes("py")
        least = {"snapshot_tag": "py", "n": 1, "per_child_netns": False}
        self.sent("POST", "/v1/sandboxes", least)
        self.controller.spawn_sandboxes("py", 3, True, 256, True, True, True, timeout_secs=60)
        all_of_it = {
            "snapshot_tag": "py",
            "n": 3,
            "per_child_netns": True,
            "memory_limit_mib": 256,
            "prewarm": True,
            "live_fork": True,
            "hugepages": True,
            "timeout_secs": 60,
        }
        self.sent("POST", "/v1/sandboxes", all_of_it)

    def test_branch(self) -> None:
        for arguments, body in (
            ({}, {}),
            ({"tag": "t"}, {"tag": "t"}),
            ({"diff": True}, {"diff": True}),
            ({"mode": "live", "diff": True, "wait": False}, {"mode": "live", "wait": False}),
            ({"measure_diff": True}, {"measure_diff": True}),
            ({"mode": "diff", "parent_tag": "py"}, {"mode": "diff", "parent_tag": "py"}),
        ):
            self.controller.branch_sandbox("sb-1", **arguments)  # type: ignore[arg-type]
            self.sent("POST", "/v1/sandboxes/sb-1/branch", body)

    def test_lifetimes(self) -> None:
        self.controller.spawn_sandboxes("py", timeout_secs=0.5, on_timeout="suspend", auto_checkpoint="exec")
        plain = {"snapshot_tag": "py", "n": 1, "per_child_netns": False}
        lifetime = {"timeout_secs": 1, "on_timeout": "suspend"}
        self.sent("POST", "/v1/sandboxes", {**plain, **lifetime, "auto_checkpoint": "exec"})
        self.controller.fork_sandbox("sb-1", timeout_secs=60)
        self.sent("POST", "/v1/sandboxes/sb-1/fork", {"n": 1, "timeout_secs": 60})
        self.controller.set_timeout("sb-1", 7, "kill")
        self.sent("POST", "/v1/sandboxes/sb-1/timeout", {"timeout_secs": 7, "on_timeout": "kill"})
        self.controller.set_timeout("sb-1", None)
        self.sent("POST", "/v1/sandboxes/sb-1/timeout", {"timeout_secs": None})
        self.controller.suspend_sandbox("sb-1")
        self.sent("POST", "/v1/sandboxes/sb-1/suspend")

    def test_workspaces_and_the_whole(self) -> None:
        self.controller.create_workspace("w", "py")
        self.sent("POST", "/v1/workspaces", {"name": "w", "snapshot_tag": "py"})
        self.controller.create_workspace(
            "w", "py", per_child_netns=True, memory_limit_mib=64, hugepages=True, idle_suspend_secs=0.1
        )
        options = {"per_child_netns": True, "memory_limit_mib": 64, "hugepages": True, "idle_suspend_secs": 1}
        self.sent("POST", "/v1/workspaces", {"name": "w", "snapshot_tag": "py", **options})
        self.controller.list_workspaces()
        self.sent("GET", "/v1/workspaces")
        self.controller.get_workspace("w/x")
        self.sent("GET", "/v1/workspaces/w%2Fx")
        self.controller.suspend_workspace("w")
        self.sent("POST", "/v1/workspaces/w/suspend", {})
        self.controller.resume_workspace("w")
        self.sent("POST", "/v1/workspaces/w/resume")
        self.controller.delete_workspace("w")
        self.sent("DELETE", "/v1/workspaces/w")
        self.controller.usage()
        self.sent("GET", "/v1/usage")
        self.controller.tree()
        self.sent("GET", "/v1/tree")
        self.controller.create_snapshot("t", "/k", "/r", boot_wait_secs=20)
        body = {"tag": "t", "kernel": "/k", "rootfs": "/r", "boot_wait_secs": 20}
        self.sent("POST", "/v1/snapshots", body)

    def test_what_runs_in_a_sandbox(self) -> None:
        self.controller.exec_command("sb-1", ["true"])
        self.sent("POST", "/v1/sandboxes/sb-1/exec", {"args": ["true"], "timeout_secs": 30})
        self.controller.exec_command("sb-1", ["env"], 5, env={"A": "1"}, cwd="/", user="nobody", stdin="in")
        more = {"env": [["A", "1"]], "cwd": "/", "user": "nobody", "stdin": "in"}
        self.sent("POST", "/v1/sandboxes/sb-1/exec", {"args": ["env"], "timeout_secs": 5, **more})
        self.controller.eval_code("sb-1", "1 + 1")
        self.sent("POST", "/v1/sandboxes/sb-1/eval", {"code": "1 + 1"})
        self.controller.ping_sandbox("sb-1")
        self.sent("POST", "/v1/sandboxes/sb-1/ping")

    def test_what_a_name_holds_stays_in_its_segment(self) -> None:
        self.controller.get_sandbox("../snapshots/x?force=true")
        self.sent("GET", "/v1/sandboxes/..%2Fsnapshots%2Fx%3Fforce%3Dtrue")

    def test_a_refusal_carries_what_was_said(self) -> None:
        self.server.answer = (404, b'{"error":"sandbox sb-1 not found","code":"sandbox_not_found"}')
        with self.assertRaises(ControllerError) as caught:
            self.controller.get_sandbox("sb-1")
        error = caught.exception
        self.assertEqual((error.status, error.code), (404, "sandbox_not_found"))
        self.assertEqual(error.body, {"error": "sandbox sb-1 not found", "code": "sandbox_not_found"})
        self.assertIn("HTTP 404: sandbox sb-1 not found", str(error))
        self.assertIsInstance(error, RuntimeError)
        self.server.answer = (502, b"Bad Gateway")
        with self.assertRaisesRegex(ControllerError, "HTTP 502: Bad Gateway"):
            self.controller.list_sandboxes()

    def test_a_sandbox_over_rest(self) -> None:
        self.server.answer = (200, f"[{_json(INFO)}]".encode())
        sandbox = Sandbox.spawn(tag="py", hugepages=True, controller=self.controller)
        self.sent("POST", "/v1/sandboxes", {"snapshot_tag": "py", "n": 1, "per_child_netns": False, "hugepages": True})
        self.assertEqual((sandbox.id, sandbox.tag), ("sb-1-0000", "py"))
        self.server.answer = (200, b'{"result":"0.0","error":null,"exit_code":0}')
        self.assertEqual(sandbox.eval("numpy.zeros(5).sum()"), "0.0")
        self.server.answer = (200, b'{"result":null,"error":"Traceback: ZeroDivisionError","exit_code":1}')
        with self.assertRaisesRegex(RuntimeError, "ZeroDivisionError"):
            sandbox.eval("1 / 0")
        self.server.answer = (200, b'{"result":"[1,2]","error":null,"exit_code":0}')
        self.assertEqual(sandbox.eval("[1, 2]", language="node"), [1, 2])
        self.server.answer = (404, b'{"error":"gone"}')
        sandbox.kill()

    def test_streamed_output_is_put_together_across_cut_characters(self) -> None:
        # "é" is c3 a9: its bytes come in two pieces.
        lines = [
            '{"type":"started","pid":7}',
            '{"type":"stdout","data":"YcM="}',
            '{"type":"stderr","data":"ZQ=="}',
            '{"type":"stdout","data":"qWI="}',
            '{"type":"exit","code":3,"timed_out":false}',
        ]
        sandbox = Sandbox.of(self.controller, INFO)  # type: ignore[arg-type]
        self.server.answer = (200, "\n".join(lines).encode())
        pieces: list[str] = []
        result = sandbox.commands.run("x", on_stdout=pieces.append)
        self.assertEqual((result.stdout, result.stderr, result.exit_code), ("aéb", "e", 3))
        self.assertEqual(pieces, ["a", "éb"])
        self.server.answer = (200, lines[0].encode())
        with self.assertRaises(ConnectionError):
            sandbox.commands.run("x", on_stdout=pieces.append)
        self.server.answer = (200, b'{"type":"error","error":"no such program: x","code":"not_found"}')
        with self.assertRaisesRegex(forkd.StreamError, "no such program"):
            sandbox.commands.run("x", on_stdout=pieces.append)

    def test_the_asynchronous_client_sends_the_same(self) -> None:
        async def drive() -> None:
            async with AsyncController(self.server.url, token="secret token") as controller:
                await controller.spawn_sandboxes("py", n=2, hugepages=True)
                body = {"snapshot_tag": "py", "n": 2, "per_child_netns": False, "hugepages": True}
                self.sent("POST", "/v1/sandboxes", body)
                self.server.answer = (409, b'{"error":"taken","code":"snapshot_exists"}')
                with self.assertRaisesRegex(ControllerError, "taken"):
                    await controller.branch_sandbox("sb-1", tag="t")
                self.sent("POST", "/v1/sandboxes/sb-1/branch", {"tag": "t"})
                self.server.answer = (200, b"{}")
                await controller.create_workspace("w", "py", idle_suspend_secs=0)
                self.sent("POST", "/v1/workspaces", {"name": "w", "snapshot_tag": "py", "idle_suspend_secs": 0})

        asyncio.run(drive())


class Addresses(unittest.TestCase):
    def test_the_forms(self) -> None:
        self.assertEqual(Address.parse("http://h:1//").base, "http://h:1")
        for text in ("unix:///run/x.sock", "unix:/run/x.sock"):
            self.assertEqual(Address.parse(text).socket, "/run/x.sock")
        for wrong in ("h:1", "unix:", "unix:///", "ftp://h"):
            with self.assertRaises(ValueError):
                Address.parse(wrong)

    def test_the_environment(self) -> None:
        with mock.patch.dict(os.environ, {"FORKD_URL": "http://h:2/", "FORKD_TOKEN": ""}):
            self.assertEqual((Controller().base_url, Controller().token), ("http://h:2", None))
            self.assertEqual(resolve_token("t"), "t")
        with mock.patch.dict(os.environ, clear=True):
            self.assertEqual(Controller().base_url, "http://127.0.0.1:8889")

    def test_targets(self) -> None:
        self.assertEqual(host_port("10.42.0.2:8888"), ("10.42.0.2", 8888))
        self.assertEqual(host_port("[::1]:8888"), ("::1", 8888))
        for wrong in ("localhost", ":1", "h:", "::1:8888"):
            with self.assertRaises(ValueError):
                host_port(wrong)

    def test_a_unix_socket(self) -> None:
        with tempfile.TemporaryDirectory() as directory, Recorder(f"{directory}/s") as server:
            self.assertEqual(Controller(server.url).list_sandboxes(), [])
            self.assertEqual(server.last()["path"], "/v1/sandboxes")

            async def drive() -> None:
                async with AsyncController(server.url) as controller:
                    await controller.list_snapshots()

            asyncio.run(drive())
            self.assertEqual(server.last()["path"], "/v1/snapshots")

    def test_nobody_is_there(self) -> None:
        with self.assertRaisesRegex(DaemonUnreachable, "unix:///nonexistent.*forkd env"):
            Controller("unix:///nonexistent").list_sandboxes()
        # What callers have always caught.
        with self.assertRaises(urllib.error.URLError):
            Controller("http://127.0.0.1:1").list_sandboxes()


class Surface(unittest.TestCase):
    """Signatures that callers rely on."""

    def test_the_controller(self) -> None:
        self.assertEqual(list(inspect.signature(Controller).parameters)[:3], ["base_url", "token", "timeout"])
        spawn = inspect.signature(Controller.spawn_sandboxes).parameters
        order = [
            "self",
            "snapshot_tag",
            "n",
            "per_child_netns",
            "memory_limit_mib",
            "prewarm",
            "live_fork",
            "hugepages",
        ]
        self.assertEqual(list(spawn)[:8], order)
        branch = inspect.signature(Controller.branch_sandbox).parameters
        self.assertEqual(list(branch)[:7], ["self", "sandbox_id", "tag", "diff", "measure_diff", "mode", "wait"])

    def test_the_sandbox(self) -> None:
        self.assertEqual(list(inspect.signature(Sandbox).parameters), ["tag", "target", "timeout", "spawn"])
        self.assertEqual(Sandbox.DEFAULT_TAG, os.environ.get("FORKD_TAG", "pyagent"))
        attached = Sandbox(target="127.0.0.1:1", spawn=False)
        with self.assertRaises(OSError):
            attached.ping()
        with self.assertRaises(NotOverRest):
            attached.fork()
        attached.kill()

    def test_both_clients_have_the_same_calls(self) -> None:
        def calls(of: type) -> Dict[str, str]:
            members = {name: getattr(of, name) for name in vars(of) if not name.startswith("_")}
            signatures = {name: inspect.signature(member) for name, member in members.items() if callable(member)}
            return {name: str(signature).replace("Async", "") for name, signature in signatures.items()}

        blocking, asynchronous = calls(Controller), calls(AsyncController)
        underneath = {"open", "call", "aclose", "fetch", "lines"}
        for name in set(blocking) | set(asynchronous):
            if name not in underneath:
                self.assertEqual(blocking.get(name), asynchronous.get(name), name)


def _json(value: Any) -> str:
    import json

    return json.dumps(value)


if __name__ == "__main__":
    unittest.main()
