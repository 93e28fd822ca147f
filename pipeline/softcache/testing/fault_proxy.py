"""A bad network between a client and an S3 server: answers that are lost, cut in half, late, or say 500 and 503.

Which request meets which fault is drawn from a seed; what was done is counted, and compared with what came of it.
"""

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("cut_request", "cut_answer", "lost_answer", "stall", "500", "503")
"""Cut before the server has the request; half of the answer; none, though the server did it; silence; an error page."""

SLOW_DOWN = b'<?xml version="1.0"?><Error><Code>%s</Code><Message>injected</Message></Error>'


class FaultProxy:
    """A proxy on loopback.

    Attributes:
        rates: the share of requests that meet each fault; may be changed while it runs.
        dead_after: requests, after which every one is cut; None for never.
        counts: of requests, by what happened to them ("passed", or a fault).
        answered_bytes: of all bodies that were sent to clients.
        most_at_once: requests that were in the proxy together.
        gather: requests for .json objects wait until so many are in the proxy together, or for five seconds; then 0.
    """

    def __init__(self, upstream_port: int, *, seed: int, stall_seconds: float) -> None:
        self.rates: dict[str, float] = {}
        self.dead_after: int | None = None
        self.counts: Counter[str] = Counter()
        self.answered_bytes, self.most_at_once, self.gather, self._inside = 0, 0, 0, 0
        self.upstream_port, self.stall_seconds = upstream_port, stall_seconds
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def draw(self) -> str:
        """Returns what shall happen to the next request."""
        with self._lock:
            place, chosen = self._random.random(), "passed"
            for name, rate in self.rates.items():
                if place < rate:
                    chosen = name
                    break
                place -= rate
            if self.dead_after is not None and self.requests >= self.dead_after:
                chosen = "cut_request"
            self.counts[chosen] += 1
            return chosen

    @contextmanager
    def counted(self, path: str) -> Iterator[None]:
        end = time.monotonic() + 5
        with self._lock:
            self._inside += 1
            self.most_at_once = max(self.most_at_once, self._inside)
        try:
            while path.endswith(".json") and self._inside < self.gather and time.monotonic() < end:
                time.sleep(0.002)
            if path.endswith(".json"):
                self.gather = 0
            yield
        finally:
            with self._lock:
                self._inside -= 1

    @property
    def requests(self) -> int:
        return sum(self.counts.values())

    @property
    def injected(self) -> dict[str, int]:
        return {name: count for name, count in self.counts.items() if name != "passed"}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """One connection; the proxy's fault is drawn anew for every request on it."""

    proxy: FaultProxy
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the client is gone
            self.close_connection = True

    def _pass(self) -> None:
        with self.proxy.counted(self.path):
            self._handle_one()

    def _handle_one(self) -> None:
        fault = self.proxy.draw()
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "cut_request":
            self.rfile.read(length // 2)
            return self._cut()
        body = self.rfile.read(length)
        if fault in ("500", "503"):
            code = b"InternalError" if fault == "500" else b"SlowDown"
            return self._answer(int(fault), [("Content-Type", "application/xml")], SLOW_DOWN % code)
        status, headers, data = self._ask(body)
        if fault == "stall":
            time.sleep(self.proxy.stall_seconds)
            return self._cut()
        if fault == "lost_answer":
            return self._cut()
        return self._answer(status, headers, data, cut=fault == "cut_answer")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection("127.0.0.1", self.proxy.upstream_port, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # Host as it was: it is signed
                upstream.putheader(name, value)
            upstream.endheaders(body)
            found = upstream.getresponse()
            kept = [
                (n, v) for n, v in found.getheaders() if n.lower() not in ("transfer-encoding", "connection")
            ]
            return found.status, kept, found.read()
        finally:
            upstream.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        names = {name.lower() for name, _ in headers}
        for name, value in headers:
            self.send_header(name, value)
        if "content-length" not in names:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.proxy.answered_bytes += len(data)
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.wfile.flush()
            self._cut()

    def _cut(self) -> None:
        """Ends the connection at once, with a reset."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def fault_proxy(upstream_port: int, *, seed: int, stall_seconds: float = 3.0) -> Iterator[FaultProxy]:
    proxy = FaultProxy(upstream_port, seed=seed, stall_seconds=stall_seconds)
    try:
        yield proxy
    finally:
        proxy.close()
