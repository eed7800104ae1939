"""Servers on loopback that say one thing, or nothing."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CREATED = b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n"


class Answering(BaseHTTPRequestHandler):
    answer = b""
    heard: list[tuple[str, str | None, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.heard.append((self.path, self.headers.get("Authorization"), body))
        self.wfile.write(self.answer)
        self.close_connection = True

    do_GET = do_POST

    def log_message(self, *arguments: Any) -> None: ...


@contextmanager
def serving(answer: bytes, heard: list[tuple[str, str | None, bytes]] | None = None) -> Iterator[str]:
    """heard: gets path, credentials and body of each request."""
    own = type("Own", (Answering,), {"answer": answer, "heard": [] if heard is None else heard})
    server = ThreadingHTTPServer(("127.0.0.1", 0), own)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def refusing() -> Iterator[str]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@contextmanager
def silent() -> Iterator[str]:
    """It takes what comes, and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as bound:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
