"""A file server of our own on the loopback interface, which can be told to go wrong in every known way."""

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

PAGE = b"<!DOCTYPE html><html><body>Please sign in</body></html>"
SILENCE_S = 5.0


class FileServer:
    """Serves `files` (path with query -> bytes).

    Attributes:
        faults: path -> what goes wrong with its next requests, in order; then all is well. A number is an
            HTTP status; "cut" sends half of what was asked for; "silent" stops there and says nothing; "page"
            and "page as data" send a login page; "no range" ignores the header; "other range" sends one byte
            less in front; "ignore if-range" takes no notice of a changed file; "slow" sends 1 KB every 10 ms.
        requests: (path, Range header or "") of everything that was asked for.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.faults: dict[str, list[Any]] = {}
        self.requests: list[tuple[str, str]] = []
        self._ended = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def close(self) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def paths(self) -> list[str]:
        """What was asked for, without the ranges."""
        return [path for path, _ in self.requests]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                outer.requests.append((self.path, self.headers.get("Range", "")))
                faults = outer.faults.get(self.path, [])
                outer._answer(self, faults.pop(0) if faults else "")

        return Handler

    def _answer(self, request: BaseHTTPRequestHandler, fault: Any) -> None:
        if request.path in self.redirects:
            request.send_response(302)
            request.send_header("Location", self.redirects[request.path])
            request.end_headers()
            return
        if isinstance(fault, int) or request.path not in self.files:
            _send(request, fault or 404, b"no", {})
            return
        if fault in ("page", "page as data"):
            kind = "text/html" if fault == "page" else "application/octet-stream"
            _send(request, 200, PAGE, {"Content-Type": kind})
            return
        content = self.files[request.path]
        headers = {
            "ETag": f'"{hashlib.md5(content).hexdigest()}"',
            "Content-Type": "application/octet-stream",
        }
        start = self._start(request, fault, headers["ETag"])
        if start and start >= len(content):
            _send(request, 416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        if fault == "other range":
            start -= 1
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send_body(request, 206 if start else 200, content[start:], headers, fault)

    def _start(self, request: BaseHTTPRequestHandler, fault: Any, etag: str) -> int:
        asked = request.headers.get("Range", "")
        unchanged = request.headers.get("If-Range", etag) == etag or fault == "ignore if-range"
        return int(asked[len("bytes=") : -1]) if asked and unchanged and fault != "no range" else 0

    def _send_body(
        self, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str], fault: Any
    ) -> None:
        sent = body[: len(body) // 2] if fault in ("cut", "silent") else body
        _send(request, status, b"", {**headers, "Content-Length": str(len(body))})
        step = 1024 if fault == "slow" else max(1, len(sent))
        try:
            for first in range(0, len(sent), step):
                request.wfile.write(sent[first : first + step])
                if fault == "slow":
                    time.sleep(0.01)
        except OSError:
            return
        if fault == "silent":
            self._ended.wait(SILENCE_S)
        request.close_connection = True


def _send(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
    request.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)


@contextmanager
def file_server() -> Iterator[FileServer]:
    server = FileServer()
    yield server
    server.close()


def dead_url() -> str:
    """An address where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def stay_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test that tries to reach another host than this one, by a name or by a number."""
    connect = socket.socket.connect

    def checked(self: socket.socket, address: Any) -> None:
        assert address[0] in ("127.0.0.1", "::1"), f"a test tried to reach {address}"
        connect(self, address)

    def no_names(host: Any, *args: Any, **kwargs: Any) -> Any:
        assert host in ("127.0.0.1", "localhost"), f"a test tried to find {host}"
        return resolve(host, *args, **kwargs)

    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", checked)
    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
