"""The page of a cache on this machine: http://127.0.0.1:PORT/TOKEN/, for the browser of the one who knows the address.

The server listens on the loopback interface alone. Other users of the machine and pages of other sites do not know the
token; a site whose name is made to resolve to 127.0.0.1 (DNS rebinding) is refused by the name in its `Host`. Only GET is
answered, and nothing of a request is a path: samples are numbers, and keys are compared with keys.
"""

from __future__ import annotations

import re
import secrets
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from softcache.errors import SoftcacheError, StorageError
from softcache.tools.browse.browser import Browser
from softcache.tools.page import to_page_json

__all__ = ["make_server"]

ADDRESS = "127.0.0.1"
HOSTS = {ADDRESS, "localhost", "[::1]"}
MAX_DETAILS = 64
"""Samples of one request."""
MAX_KEY = 1024


def make_server(browser: Browser, port: int = 0) -> tuple[ThreadingHTTPServer, str]:
    """Returns a server that is not running yet (`serve_forever`), and the address of its page.

    Args:
        port: 0 takes one that is free.

    Raises:
        StorageError: the port is in use.
    """
    token = secrets.token_urlsafe(18)
    handler = type("Handler", (_Handler,), {"browser": browser, "token": token})
    try:
        server = ThreadingHTTPServer((ADDRESS, port), handler)
    except OSError as error:
        raise StorageError(
            f"port {port}: {error.strerror or error}; give --port another one, or 0 for one that is free"
        ) from error
    server.daemon_threads = True
    return server, f"http://{ADDRESS}:{server.server_address[1]}/{token}/"


class _Handler(BaseHTTPRequestHandler):
    browser: Browser
    token: str
    server_version, sys_version = "softcache", ""
    timeout = 30

    def do_GET(self) -> None:
        host = re.sub(r":\d+$", "", self.headers.get("Host", ""))
        if host not in HOSTS:
            return self._send(403, "text/plain", f"host {host!r}: this page is of {ADDRESS} alone")
        url = urlsplit(self.path)
        first, _, name = url.path.removeprefix("/").partition("/")
        if not secrets.compare_digest(first.encode(), self.token.encode()):
            return self._send(
                404, "text/plain", "not found: the address is the one that softcache browse printed"
            )
        try:
            self._answer(name, parse_qs(url.query, max_num_fields=4))
        except (ValueError, IndexError) as error:
            self._send(400, "text/plain", f"request: {error}")
        except SoftcacheError as error:
            self._send(500, "text/plain", str(error))

    def _answer(self, name: str, query: dict[str, list[str]]) -> None:
        if name == "":
            page, policy = self.browser.page(served=True)
            return self._send(200, "text/html", page, policy)
        if name == "details":
            samples = [int(number) for number in query["samples"][0].split(",")] if "samples" in query else []
            if not 0 < len(samples) <= MAX_DETAILS:
                raise ValueError(f"samples: expected 1 to {MAX_DETAILS} numbers; found {len(samples)}")
            return self._send_json(self.browser.details(samples, max(0, int(query.get("first", ["0"])[0]))))
        if name == "find":
            return self._send_json(self.browser.find(query.get("key", [""])[0][:MAX_KEY]))
        return self._send(404, "text/plain", "not found")

    def _send_json(self, value: Any) -> None:
        self._send(200, "application/json", to_page_json(value))

    def _send(self, status: int, kind: str, text: str, policy: str = "default-src 'none'") -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Content-Security-Policy": f"{policy}; frame-ancestors 'none'",
            "Cross-Origin-Resource-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Logs nothing: addresses have the token in them."""
