"""A proxy on loopback: forwards plain HTTP, tunnels TLS, and may ask for a name and a password."""

from __future__ import annotations

import socket
import threading
from base64 import b64encode
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

HOP_BY_HOP = {"connection", "proxy-authorization", "proxy-connection", "transfer-encoding"}
CHUNK = 1 << 16


class LoopbackProxy:
    """Every host leads to `port` of this machine, so hosts may have names that nobody else knows."""

    def __init__(self, port: int, login: str = "") -> None:
        self.port = port
        self.expected = f"Basic {b64encode(login.encode()).decode()}" if login else None
        self.log: list[str] = []
        """Methods and addresses that were let through."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self.server.daemon_threads = True
        self.address = f"127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> LoopbackProxy:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    proxy: LoopbackProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _admitted(self) -> bool:
        if self.proxy.expected in (None, self.headers.get("Proxy-Authorization")):
            self.proxy.log.append(f"{self.command} {self.path}")
            return True
        self.send_response(407)
        self.send_header("Proxy-Authenticate", "Basic")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False

    def do_GET(self) -> None:
        if not self._admitted():
            return
        url = urlsplit(self.path)
        upstream = HTTPConnection("127.0.0.1", self.proxy.port)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        upstream.request(self.command, url._replace(scheme="", netloc="").geturl(), body, headers)
        answer = upstream.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        self.end_headers()
        while piece := answer.read(CHUNK):
            self.wfile.write(piece)
        upstream.close()

    do_HEAD = do_POST = do_GET

    def do_CONNECT(self) -> None:
        if not self._admitted():
            return
        with socket.create_connection(("127.0.0.1", self.proxy.port)) as upstream:
            self.send_response(200)
            self.end_headers()
            back = threading.Thread(target=_pass_on, args=(upstream, self.connection), daemon=True)
            back.start()
            _pass_on(self.connection, upstream)
            back.join(5)
        self.close_connection = True


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    try:
        while piece := source.recv(CHUNK):
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass
