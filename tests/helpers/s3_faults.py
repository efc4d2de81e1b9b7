"""A proxy in front of an S3 server that spoils chosen answers, and remembers what was asked."""

import contextlib
import http.client
import random
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Kind = Literal[
    "slow down", "error", "reset", "stall", "drip", "slow", "truncate", "short", "corrupt", "swallow", "no condition"
]
"""slow down: 503; error: 500; reset: no answer; stall: half of the body and then silence; drip: a byte now and then;
slow: the whole body, spread over `seconds`; truncate: the connection ends after half of the body; short: half of the
body, and headers that say so; corrupt: one byte is another; swallow: the server does as asked, the answer is lost;
no condition: a put that was refused by its condition is said to be done."""

_SLOW_DOWN = (
    b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'
)
_ERROR = b'<?xml version="1.0"?><Error><Code>InternalError</Code><Message>We failed.</Message></Error>'
_SLOW_PARTS = 16
_HOP_HEADERS = ("connection", "keep-alive", "transfer-encoding", "content-length")


@dataclass
class Fault:
    """What to spoil, and how often."""

    kind: Kind
    path: str = ""
    """Part of the path with its query."""
    method: str = "GET"
    times: int = 1
    """How many requests that match are spoiled; -1 for all."""
    share: float = 1.0
    """Share of the requests that match which count at all."""
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    seconds: float = 0.0
    """How long a slow answer takes."""


@dataclass
class Request:
    """One request that came."""

    method: str
    path: str
    range: str | None
    fault: str | None
    at_s: float
    num_bytes: int = 0
    """Of the body that is sent back."""


class FaultProxy:
    """A proxy to one server. `faults` may be changed at any time; the first that matches counts."""

    def __init__(self, port: int) -> None:
        """Listen; `port` is the server's."""
        self.server_port = port
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        self.ended = threading.Event()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Its endpoint."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def asked(self, method: str, path: str) -> list[Request]:
        """Requests of a method whose path holds a text."""
        with self.lock:
            return [one for one in self.requests if one.method == method and path in one.path]

    def clear(self) -> None:
        """Forget faults and requests."""
        with self.lock:
            self.faults, self.requests = [], []

    def close(self) -> None:
        """End."""
        self.ended.set()
        self._http.shutdown()
        self._http.server_close()

    def take(self, method: str, path: str) -> Fault | None:
        """The fault for a request, counted."""
        with self.lock:
            for fault in self.faults:
                if fault.times == 0 or fault.method != method or fault.path not in path:
                    continue
                if fault.share < 1 and fault.chance.random() >= fault.share:
                    continue
                fault.times -= fault.times > 0
                return fault
        return None


@contextlib.contextmanager
def fault_proxy(port: int) -> Iterator[FaultProxy]:
    """A proxy to the server at a port of the loopback interface."""
    proxy = FaultProxy(port)
    try:
        yield proxy
    finally:
        proxy.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _relay(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.take(self.command, self.path)
        kind = None if fault is None else fault.kind
        self._seconds = 0.0 if fault is None else fault.seconds
        request = Request(self.command, self.path, self.headers.get("Range"), kind, time.monotonic())
        with self.proxy.lock:
            self.proxy.requests.append(request)
        try:
            if kind in ("slow down", "error"):
                self._answer(503 if kind == "slow down" else 500, {}, _SLOW_DOWN if kind == "slow down" else _ERROR)
            elif kind == "reset":
                self._drop()
            else:
                self._forward(request, body)
        except OSError:
            self.close_connection = True  # the client has gone

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _relay

    def _forward(self, request: Request, body: bytes) -> None:
        """Ask the server and pass its answer on, spoiled or not."""
        kind = request.fault
        server = http.client.HTTPConnection("127.0.0.1", self.proxy.server_port, timeout=60)
        with contextlib.closing(server):
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    server.putheader(name, value)
            server.endheaders(body)
            answer = server.getresponse()
            data = answer.read()
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP_HEADERS}
            length = int(answer.getheader("Content-Length") or 0) if self.command == "HEAD" else len(data)
        if kind == "swallow":
            self._drop()
            return
        if kind == "no condition" and answer.status == 412:
            self._answer(200, {"ETag": '"written"'}, b"")
            return
        if kind == "corrupt" and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if kind == "short":
            data = data[: len(data) // 2]
            length = len(data)
        if kind not in ("stall", "drip", "slow", "truncate"):
            request.num_bytes = len(data)
            self._answer(answer.status, headers, data, length)
            return
        self._head(answer.status, headers, length)
        if kind == "slow":
            request.num_bytes = len(data)
            size = -(-len(data) // _SLOW_PARTS)
            for place in range(0, len(data), size):
                if self.proxy.ended.wait(self._seconds / _SLOW_PARTS):
                    break
                self.wfile.write(data[place : place + size])
            return
        half = request.num_bytes = len(data) // 2
        if kind == "drip":
            for place in range(half):
                self.wfile.write(data[place : place + 1])
                if self.proxy.ended.wait(0.05):
                    break
        else:
            self.wfile.write(data[:half])
            if kind == "stall":
                self.wfile.flush()
                self.connection.settimeout(30)
                self.connection.recv(1)  # until the client gives up
        self._drop()

    def _head(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _answer(self, status: int, headers: dict[str, str], data: bytes, length: int | None = None) -> None:
        self._head(status, headers, len(data) if length is None else length)
        if self.command != "HEAD":
            self.wfile.write(data)

    def _drop(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
