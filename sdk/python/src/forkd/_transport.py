"""One HTTP exchange by the standard library, over TCP or a unix socket."""

from __future__ import annotations

import http.client
import socket
import urllib.error
import urllib.request
from typing import IO, Any, Dict, Mapping, Optional, Union, cast

from ._address import Address
from .errors import DaemonUnreachable, answer


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: Any) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        if isinstance(self.timeout, (int, float)):
            self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class _UnixHandler(urllib.request.HTTPHandler):
    """Opens ``http:`` URLs on one unix socket, whatever host they name."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        def connect(host: str, /, *, timeout: Any = None, **_: Any) -> http.client.HTTPConnection:
            return _UnixConnection(self._path, timeout)

        return self.do_open(connect, req)


class Transport:
    """A daemon at an address."""

    def __init__(self, address: Address, token: Optional[str]) -> None:
        self.address = address
        self.headers: Dict[str, str] = {"Authorization": f"Bearer {token}"} if token else {}
        handlers = [urllib.request.ProxyHandler({}), _UnixHandler(address.socket)] if address.socket else []
        self._opener = urllib.request.build_opener(*handlers)

    def open(
        self,
        method: str,
        path: str,
        body: Union[bytes, IO[bytes], None],
        headers: Mapping[str, str],
        timeout: Optional[float],
    ) -> IO[bytes]:
        """Sends a request and returns the answer's body as it comes; a status outside 2xx raises."""
        url = f"{self.address.base}{path}"
        request = urllib.request.Request(url, data=body, method=method, headers={**self.headers, **headers})
        try:
            return cast(IO[bytes], self._opener.open(request, timeout=timeout))
        except urllib.error.HTTPError as error:
            with error:
                answer(error.code, error.read(), url, error.headers.get("Retry-After"))
            raise
        except urllib.error.URLError as error:
            if isinstance(error.reason, (ConnectionRefusedError, FileNotFoundError)):
                raise DaemonUnreachable(self.address.text, error.reason) from error
            raise
