"""A guest's agent reached directly over TCP: one JSON line there, one back, a connection each."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from typing import IO, Any, Dict, Mapping, Optional

from ._calls import host_port

CONNECT_TIMEOUT = 5.0
SPAWN_TIMEOUT = 30.0
HOLD_SECS = 3600
"""How long `forkd fork` holds its child."""


def ask(target: str, message: Mapping[str, Any], timeout: float) -> Dict[str, Any]:
    """Sends one request to the agent at ``target``; its answer may take ``timeout`` seconds."""
    answer = bytearray()
    with socket.create_connection(host_port(target), timeout=CONNECT_TIMEOUT) as connection:
        connection.settimeout(timeout)
        connection.sendall((json.dumps(message) + "\n").encode())
        connection.shutdown(socket.SHUT_WR)
        try:
            while True:
                piece = connection.recv(65536)
                if not piece:
                    break
                answer += piece
        except socket.timeout as error:
            raise TimeoutError(f"forkd: no response from guest agent at {target} within {timeout:g}s") from error
    if not answer:
        raise RuntimeError(
            f"forkd: empty response from guest agent at {target} (it closed the connection without an answer)"
        )
    value = json.loads(answer)
    if not isinstance(value, dict):
        raise RuntimeError(f"forkd: the guest agent at {target} answered {value!r} where an object was due")
    return value


class ForegroundFork:
    """A child held by a `forkd fork` of its own, which ends with it."""

    def __init__(self, tag: str) -> None:
        if shutil.which("forkd") is None:
            raise RuntimeError(
                "the `forkd` program must be on PATH; `make build` puts it into target/forkd. "
                "Sandbox.spawn(tag) needs only a daemon"
            )
        self._tag = tag
        command = ["forkd", "--quiet", "fork", "--tag", tag, "-n", "1", "--settle-secs", str(HOLD_SECS)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def wait_for(self, target: str, ping_timeout: float) -> None:
        """Returns when the child's agent answers at ``target``."""
        deadline = time.monotonic() + SPAWN_TIMEOUT
        while True:
            try:
                ask(target, {"action": "ping"}, ping_timeout)
                return
            # Until then something else may answer for the address, a gateway for example.
            except (OSError, ValueError, RuntimeError) as error:
                code = self._process.poll()
                if code is not None and code != 0:
                    raise RuntimeError(
                        f"forkd fork --tag {self._tag} exited with code {code}:\n{self._said()}"
                    ) from error
                if time.monotonic() > deadline:
                    self.end()
                    raise RuntimeError(
                        f"sandbox didn't come up at {target} within {SPAWN_TIMEOUT:g}s (last error: {error})"
                    ) from error
                time.sleep(0.1)

    def end(self) -> None:
        """Ends the child."""
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        stderr: Optional[IO[bytes]] = self._process.stderr
        if stderr is not None:
            stderr.close()

    def _said(self) -> str:
        stderr = self._process.stderr
        return stderr.read().decode(errors="replace") if stderr is not None else ""
