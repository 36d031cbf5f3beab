"""An S3 server on loopback (moto) behind a proxy that can misbehave, by chance or on purpose."""

import http.client
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = str  # "500", "silence", "lost" (done, but the answer is a 500), "flip", "half", "deny", "blind" or ""


class Proxy(ThreadingHTTPServer):
    """Passes requests on to moto. `fault(method, path)` says what goes wrong with each."""

    daemon_threads = True

    def __init__(self, behind: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind = behind
        self.fault: Callable[[str, str], Fault] = lambda method, path: ""
        self.requests: list[tuple[str, str]] = []
        self.closing = threading.Event()
        self.kept: dict[Any, Any] = {}  # what tests share as long as this server lives

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def sent(self, method: str, ending: str) -> int:
        """How many requests of a method had a path with this ending."""
        return sum(m == method and path.partition("?")[0].endswith(ending) for m, path in self.requests)

    def by_chance(self, seed: int, share: float, faults: tuple[Fault, ...]) -> None:
        """Let a share of all requests go wrong."""
        draw, mutex = random.Random(seed), threading.Lock()

        def fault(method: str, path: str) -> Fault:
            with mutex:
                return draw.choice(faults) if draw.random() < share else ""

        self.fault = fault

    def handle_error(self, *_: Any) -> None:
        """A client that gave up is what these tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Proxy

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.fault(self.command, self.path)
        self.server.requests.append((self.command, self.path))
        if fault == "silence":
            self.server.closing.wait(30)
            self.close_connection = True
            return
        if fault == "500":
            self.answer(500, {}, b"<Error><Code>InternalError</Code><Message>no</Message></Error>")
            return
        if fault == "deny":
            self.answer(403, {}, b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>")
            return
        status, headers, answer = self.ask(body, blind=fault == "blind")
        if fault == "lost":
            self.answer(500, {}, b"<Error><Code>InternalError</Code><Message>no</Message></Error>")
            return
        if fault == "flip" and answer:
            answer = answer[:-1] + bytes([answer[-1] ^ 1])
        self.answer(status, headers, answer, cut=fault == "half" and len(answer) > 1)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on

    def ask(self, body: bytes, blind: bool) -> tuple[int, dict[str, str], bytes]:
        behind = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=30)
        unseen = {"expect"} | ({"if-none-match", "if-match"} if blind else set())
        behind.request(
            self.command, self.path, body, {k: v for k, v in self.headers.items() if k.lower() not in unseen}
        )
        answer = behind.getresponse()
        data = answer.read()
        behind.close()
        return answer.status, dict(answer.getheaders()), data

    def answer(self, status: int, headers: dict[str, str], body: bytes, cut: bool = False) -> None:
        self.send_response(status)
        dropped = {"connection", "transfer-encoding", "server", "date"}
        length = headers.get("Content-Length", str(len(body)))
        for name, value in (headers | {"Content-Length": length}).items():
            if name.lower() not in dropped:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@contextmanager
def s3_server() -> Iterator[Proxy]:
    """The proxy of a new, empty S3 server; both end with the context."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    proxy = Proxy(moto.get_host_and_port()[1])
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.closing.set()
        proxy.shutdown()
        proxy.server_close()
        moto.stop()
