"""What is sent again when a connection breaks, and how streams go on. Needs no daemon."""

from __future__ import annotations

import asyncio
import json
import time
import unittest
from typing import Any, Callable, List, Optional
from unittest import mock

from forkd import AsyncController, Controller, ControllerError, DaemonUnreachable, _calls, _retries

from .http_server import Recorder

KEPT_OUT = (429, b'{"error":"slow down","code":"too_many_requests"}', {"Retry-After": "0"})


def event_lines(*ids: int) -> bytes:
    """A stream of events that comes again at once."""
    lines = [": hello\n", f"id: {ids[0] - 1}\n", "retry: 10\n", "\n", ": still here\n", "\n"]
    for number in ids:
        event = {"id": number, "at_unix": 1, "event": "sandbox.created", "sandbox": "sb-1-0000"}
        lines.append(f"id: {number}\nevent: sandbox.created\ndata: {json.dumps(event)}\n\n")
    return "".join(lines).encode()


class Repeats(unittest.TestCase):
    def setUp(self) -> None:
        self.server = Recorder().__enter__()
        self.addCleanup(self.server.__exit__)
        impatient = mock.patch.object(_retries, "FIRST_PAUSE", 0.01)
        impatient.start()
        self.addCleanup(impatient.stop)

    def each_client(
        self, use: Callable[[Any], Any], retries: int = 3, error: Optional[type[Exception]] = None
    ) -> List[List[Optional[str]]]:
        """Lets both clients do the same, from the same answers; the idempotency keys that were sent."""
        first, keys = list(self.server.first), []

        async def drive() -> None:
            async with AsyncController(self.server.url, retries=retries) as controller:
                await use(controller)

        for run in (lambda: use(Controller(self.server.url, retries=retries)), lambda: asyncio.run(drive())):
            self.server.first, self.server.requests = list(first), []
            if error is None:
                run()
            else:
                with self.assertRaises(Exception) as caught:
                    run()
                # What the asynchronous client raises for broken connections is its library's.
                if isinstance(caught.exception, (ControllerError, OSError)):
                    self.assertIsInstance(caught.exception, error)
            keys.append([request["key"] for request in self.server.requests])
        return keys

    def test_what_makes_something_is_sent_again_with_its_key(self) -> None:
        self.server.first = [None, KEPT_OUT]
        for sent in self.each_client(lambda controller: controller.spawn_sandboxes("py")):
            self.assertEqual(len(sent), 3)
            self.assertEqual(len(set(sent)), 1)
            self.assertRegex(str(sent[0]), "^[0-9a-f-]{36}$")

    def test_a_key_that_is_given_is_the_one_that_is_sent(self) -> None:
        self.server.answer = (200, b"{}")
        calls: List[Callable[[Any], Any]] = [
            lambda controller: controller.spawn_sandboxes("py", idempotency_key="mine"),
            lambda controller: controller.fork_sandbox("sb-1", idempotency_key="mine"),
            lambda controller: controller.branch_sandbox("sb-1", idempotency_key="mine"),
            lambda controller: controller.checkpoint_sandbox("sb-1", idempotency_key="mine"),
            lambda controller: controller.suspend_sandbox("sb-1", idempotency_key="mine"),
            lambda controller: controller.create_snapshot("t", "k", "r", idempotency_key="mine"),
            lambda controller: controller.compact_snapshot("t", "u", idempotency_key="mine"),
            lambda controller: controller.create_workspace("w", "py", idempotency_key="mine"),
            lambda controller: controller.suspend_workspace("w", idempotency_key="mine"),
            lambda controller: controller.resume_workspace("w", idempotency_key="mine"),
        ]
        for call in calls:
            self.assertEqual(self.each_client(call, retries=0), [["mine"], ["mine"]])

    def test_without_retries_nothing_is_sent_twice(self) -> None:
        self.server.first = [None]
        sent = self.each_client(lambda controller: controller.spawn_sandboxes("py"), retries=0, error=ConnectionError)
        self.assertEqual(sent, [[None], [None]])

    def test_what_does_more_when_it_is_sent_twice_is_not(self) -> None:
        calls: List[Callable[[Any], Any]] = [
            lambda controller: controller.exec_command("sb-1", ["true"]),
            lambda controller: controller.kill_sandbox("sb-1"),
            lambda controller: controller.rewind_sandbox("sb-1"),
        ]
        for call in calls:
            self.server.first = [None]
            self.assertEqual(self.each_client(call, error=ConnectionError), [[None], [None]])

    def test_a_refusal_for_good_is_the_answer(self) -> None:
        for answer in ((409, b"{}", {}), (503, b"{}", {}), (503, b"{}", {"Retry-After": "3600"})):
            self.server.first = [answer]
            for sent in self.each_client(lambda controller: controller.list_sandboxes(), error=ControllerError):
                self.assertEqual(len(sent), 1, answer)

    def test_the_daemon_is_waited_for_as_long_as_it_says(self) -> None:
        refusal = ControllerError(503, {}, "", retry_after=7.0)
        self.assertEqual(_retries.pause(_calls.list_sandboxes(), refusal, 0, 3), 7.0)
        self.assertIsNone(_retries.pause(_calls.list_sandboxes(), refusal, 3, 3))

    def test_nobody_is_not_waited_for(self) -> None:
        begun = time.monotonic()
        with self.assertRaises(DaemonUnreachable):
            Controller("http://127.0.0.1:1").list_sandboxes()
        self.assertLess(time.monotonic() - begun, 0.2)

    def test_a_stream_goes_on_after_the_last_event(self) -> None:
        self.server.first = [
            (200, event_lines(7, 8), {}),
            (503, b"{}", {}),
            None,
            (200, event_lines(9), {}),
        ]
        self.server.answer = (401, b'{"error":"who are you"}')
        first = list(self.server.first)
        with Controller(self.server.url).events(sandbox_id="sb-1") as events:
            self.assertEqual(events.last_id, 6)
            self.assertEqual([next(events)["id"] for _ in range(3)], [7, 8, 9])
            # An answer for good ends it.
            with self.assertRaisesRegex(ControllerError, "who are you"):
                next(events)
            self.assertEqual(list(events), [])
        seen = [request["last_event"] for request in self.server.requests]
        self.assertEqual(seen, [None, "8", "8", "8", "9"])
        self.assertEqual(self.server.last()["path"], "/v1/events?sandbox=sb-1")

        self.server.first, self.server.requests = first, []

        async def drive() -> None:
            async with AsyncController(self.server.url) as controller:
                async with await controller.events(after=3) as events:
                    self.assertEqual([(await events.__anext__())["id"] for _ in range(3)], [7, 8, 9])
                    with self.assertRaisesRegex(ControllerError, "who are you"):
                        await events.__anext__()

        asyncio.run(drive())
        seen = [request["last_event"] for request in self.server.requests]
        self.assertEqual(seen, ["3", "8", "8", "8", "9"])

    def test_a_daemon_that_stays_away_ends_a_stream(self) -> None:
        self.server.first = [(200, event_lines(7), {})]
        self.server.answer = (503, b"{}")

        async def drive() -> None:
            async with AsyncController(self.server.url) as controller:
                events = await controller.events(patience=0.1)
                with self.assertRaises(ControllerError):
                    async for _ in events:
                        pass

        asyncio.run(drive())
        self.server.first = [(200, event_lines(7), {})]
        events = Controller(self.server.url).events(patience=0.1)
        with self.assertRaises(ControllerError):
            for _ in events:
                pass


if __name__ == "__main__":
    unittest.main()
