"""An HTTP server that records what it is asked and answers what it is told, over TCP or a unix socket."""

from __future__ import annotations

import json
import socketserver
import threading
from http.server import BaseHTTPRequestHandler
from typing import Any, Dict, List, Optional, Tuple


class Recorder:
    """What came in, and what goes out."""

    def __init__(self, socket_path: Optional[str] = None) -> None:
        self.requests: List[Dict[str, Any]] = []
        self.answer: Tuple[int, bytes] = (200, b"[]")
        self.first: List[Optional[Tuple[int, bytes, Dict[str, str]]]] = []
        """Answers that come before it, with their headers; ``None`` cuts the connection instead."""
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.body()
                recorder.requests.append(
                    {
                        "method": self.command,
                        "path": self.path,
                        "type": self.headers.get("Content-Type"),
                        "token": self.headers.get("Authorization"),
                        "key": self.headers.get("Idempotency-Key"),
                        "last_event": self.headers.get("Last-Event-ID"),
                        "body": json.loads(body) if self.headers.get("Content-Type") == "application/json" else body,
                    }
                )
                answer = recorder.first.pop(0) if recorder.first else (*recorder.answer, {})
                if answer is None:
                    self.close_connection = True
                    return
                status, content, headers = answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_DELETE = handle_any

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                whole = b""
                while True:
                    size = int(self.rfile.readline(), 16)
                    whole += self.rfile.read(size)
                    self.rfile.readline()
                    if size == 0:
                        return whole

            def address_string(self) -> str:
                return "client"

            def log_message(self, *_: Any) -> None:
                pass

        if socket_path is None:
            self._server: Any = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
            self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        else:
            self._server = socketserver.ThreadingUnixStreamServer(socket_path, Handler)
            self.url = f"unix://{socket_path}"
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def last(self) -> Dict[str, Any]:
        """The newest request."""
        return self.requests[-1]
