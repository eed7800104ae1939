"""A Hub that lies: a server on raw sockets, right in all but what a case changes.

    with Enemy(files) as enemy:
        enemy.change = lambda asked, said: replace(said, status=500) if asked.kind == "info" else said

A change gives another answer, or bytes and pauses that are sent as they are, for as long as somebody listens.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from .hub_state import LFS_SUFFIXES, git_blob_id, lfs_pointer

REPO = "org/model"
CANARY = "CANARY"
TOKEN = "hf_" + "c4n4ry" * 5
MOST = 1 << 30
"""Bytes that are sent to one client at most, whoever listens."""
ROUTES = (
    ("info", "GET", rf"/api/models/{REPO}/revision/(?P<name>[^/]+)"),
    ("auth", "GET", rf"/api/models/{REPO}/auth-check(/write)?"),
    ("refs", "GET", rf"/api/models/{REPO}/refs"),
    ("head", "HEAD", rf"/{REPO}/resolve/[^/]+/(?P<name>.+)"),
    ("get", "GET", rf"/{REPO}/resolve/[^/]+/(?P<name>.+)"),
    ("cdn", "GET", r"/cdn/(?P<name>.+)"),
    ("whoami", "GET", r"/api/whoami-v2"),
    ("create", "POST", r"/api/repos/create"),
    ("yaml", "POST", r"/api/validate-yaml"),
    ("preupload", "POST", rf"/api/models/{REPO}/preupload/(?P<name>[^/]+)"),
    ("batch", "POST", rf"/{REPO}\.git/info/lfs/objects/batch"),
    ("put", "PUT", r"/put/(?P<name>.+)"),
    ("verify", "POST", r"/verify"),
    ("commit", "POST", rf"/api/models/{REPO}/commit/(?P<name>[^/]+)"),
)


@dataclass(frozen=True, slots=True)
class Asked:
    kind: str
    method: str
    path: str
    name: str
    headers: Mapping[str, str]
    """Names in small letters."""
    body: bytes


@dataclass(frozen=True, slots=True)
class Said:
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    length: str | None = ""
    """What it says of its size; "": the truth, None: nothing, and the connection ends with the body."""

    def __bytes__(self) -> bytes:
        told = str(len(self.body)) if self.length == "" else self.length
        lines = [f"HTTP/1.1 {self.status} Said", *(f"{name}: {value}" for name, value in self.headers)]
        lines += [f"Content-Length: {told}"] if told is not None else ["Connection: close"]
        return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape")

    def having(self, **headers: str | None) -> Said:
        """Return it with other headers; `_` stands for `-`, None takes one away."""
        given = {name.replace("_", "-").lower(): value for name, value in headers.items()}
        kept = tuple((name, value) for name, value in self.headers if name.lower() not in given)
        added = tuple((name, value) for name, value in given.items() if value is not None)
        return Said(self.status, kept + added, self.body, self.length)


Script = Iterable[bytes | float]
Change = Callable[[Asked, Said], Said | Script]


def honest(asked: Asked, said: Said) -> Said | Script:
    return said


@dataclass(slots=True)
class Enemy:
    files: dict[str, bytes]
    change: Change = honest
    listing: Callable[[dict[str, Any]], Any] = lambda listing: listing
    """Changes what is told of the repository."""
    canary: str = "nowhere"
    """A folder that a lie would write to, from the root: what is said of CANARY in a header is said of it."""
    log: list[Asked] = field(default_factory=list)
    sent: int = 0
    _socket: socket.socket = field(init=False)
    _closing: threading.Event = field(default_factory=threading.Event)
    uploaded: dict[str, bytes] = field(default_factory=dict)
    _committed: dict[str, bytes] | None = None

    def __enter__(self) -> Enemy:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._socket.close()

    def reset(self) -> None:
        """Be honest, and forget."""
        self.change, self.listing, self.sent = honest, lambda listing: listing, 0
        self.log, self.uploaded, self._committed = [], {}, None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    @property
    def elsewhere(self) -> str:
        """Another origin."""
        return f"http://localhost:{self._socket.getsockname()[1]}"

    @property
    def present(self) -> dict[str, bytes]:
        return self.files if self._committed is None else self._committed

    @property
    def commit(self) -> str:
        told = b"".join(name.encode("utf-8", "surrogatepass") + data for name, data in sorted(self.present.items()))
        return hashlib.sha1(told, usedforsecurity=False).hexdigest()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError, ValueError):
            connection.settimeout(30)
            reading = connection.makefile("rb")
            while not self._closing.is_set() and (line := reading.readline(65536)):
                asked = self._read(line, reading)
                self.log.append(asked)
                answer = self.change(asked, self._answer(asked))
                if not isinstance(answer, Said):
                    return self._play(answer, connection)
                head = bytes(answer).replace(CANARY.encode(), self.canary.encode())
                self._send(connection, head + (b"" if asked.method == "HEAD" else answer.body))
                if answer.length is None:
                    return None
        return None

    def _read(self, line: bytes, reading: Any) -> Asked:
        method, target, _ = line.decode("latin-1").split(" ", 2)
        headers = {}
        while (header := reading.readline(65536).strip()) != b"":
            name, _, value = header.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        body = reading.read(int(headers.get("content-length", 0)))
        while headers.get("transfer-encoding") == "chunked" and (size := int(reading.readline(), 16)):
            body += reading.read(size)
            reading.readline()
        if headers.get("transfer-encoding") == "chunked":
            reading.readline()
        path = urlsplit(target).path
        for kind, wanted, pattern in ROUTES:
            if method == wanted and (found := re.fullmatch(pattern, path)):
                return Asked(kind, method, path, unquote(found.groupdict().get("name") or ""), headers, body)
        return Asked("other", method, path, "", headers, body)

    def _play(self, script: Script, connection: socket.socket) -> None:
        for piece in script:
            if isinstance(piece, bytes):
                self._send(connection, piece)
            elif self._closing.wait(piece):
                return
            if self.sent > MOST:
                return

    def _send(self, connection: socket.socket, data: bytes) -> None:
        connection.sendall(data)
        self.sent += len(data)

    # What a Hub says

    def _answer(self, asked: Asked) -> Said:
        answer: Said = getattr(self, f"_say_{asked.kind}", self._say_nothing)(asked)
        return answer

    @staticmethod
    def _json(value: Any, status: int = 200) -> Said:
        return Said(status, (("Content-Type", "application/json"),), json.dumps(value).encode())

    def _say_nothing(self, asked: Asked) -> Said:
        return Said(404, (("X-Error-Code", "EntryNotFound"),))

    def _say_info(self, asked: Asked) -> Said:
        if asked.name not in ("main", self.commit):
            return Said(404, (("X-Error-Code", "RevisionNotFound"),))
        siblings = [sibling(name, data) for name, data in sorted(self.present.items())]
        listing = {"_id": "0" * 24, "id": REPO, "modelId": REPO, "sha": self.commit, "siblings": siblings}
        return self._json(self.listing({**listing, "library_name": "transformers", "tags": [], "private": False}))

    def _say_auth(self, asked: Asked) -> Said:
        return self._json({})

    def _say_refs(self, asked: Asked) -> Said:
        return self._json({"branches": [{"name": "main", "targetCommit": self.commit}], "tags": []})

    def _said_of(self, name: str) -> tuple[tuple[str, str], ...]:
        data = self.present[name]
        tag = hashlib.sha256(data).hexdigest() if is_lfs(name) else git_blob_id(data)
        head = (("X-Repo-Commit", self.commit), ("ETag", f'"{tag}"'), ("Accept-Ranges", "bytes"))
        linked = (("X-Linked-Etag", f'"{tag}"'), ("X-Linked-Size", str(len(data))))
        place = (("Location", f"{self.elsewhere}/cdn/{name}"),)
        return head + linked + place if is_lfs(name) else head

    def _say_head(self, asked: Asked) -> Said:
        if asked.name not in self.present:
            return Said(404, (("X-Error-Code", "EntryNotFound"), ("X-Repo-Commit", self.commit)))
        head = self._said_of(asked.name)
        return Said(302, head) if is_lfs(asked.name) else Said(200, head, self.present[asked.name])

    def _say_get(self, asked: Asked) -> Said:
        if asked.name not in self.present or is_lfs(asked.name):
            return self._say_head(asked)
        return self._part(asked, self._said_of(asked.name))

    def _say_cdn(self, asked: Asked) -> Said:
        return self._part(asked, (("ETag", '"of-the-cdn"'),)) if asked.name in self.present else Said(404)

    def _part(self, asked: Asked, headers: tuple[tuple[str, str], ...]) -> Said:
        data, wanted = self.present[asked.name], re.fullmatch(r"bytes=(\d+)-(\d*)", asked.headers.get("range", ""))
        if wanted is None:
            return Said(200, headers, data)
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        told = ("Content-Range", f"bytes {first}-{last}/{len(data)}")
        return Said(206, (*headers, told), data[first : last + 1])

    # Uploads

    def _say_whoami(self, asked: Asked) -> Said:
        return self._json({"type": "user", "name": REPO.partition("/")[0], "orgs": []})

    def _say_create(self, asked: Asked) -> Said:
        return self._json({"url": f"{self.url}/{REPO}", "name": REPO})

    def _say_yaml(self, asked: Asked) -> Said:
        return self._json({"errors": [], "warnings": []})

    def _say_preupload(self, asked: Asked) -> Said:
        names = [file["path"] for file in json.loads(asked.body)["files"]]
        modes = [{"path": name, "uploadMode": "lfs" if is_lfs(name) else "regular", "oid": None} for name in names]
        return self._json({"files": [{**mode, "shouldIgnore": False} for mode in modes]})

    def _say_batch(self, asked: Asked) -> Said:
        objects = json.loads(asked.body)["objects"]
        for one in objects:
            verify = {"href": f"{self.url}/verify"}
            one["actions"] = {"upload": {"href": f"{self.elsewhere}/put/{one['oid']}"}, "verify": verify}
        return self._json({"transfer": "basic", "objects": objects})

    def _say_put(self, asked: Asked) -> Said:
        self.uploaded[asked.name] = asked.body
        return Said(200, (("ETag", '"part"'),))

    def _say_verify(self, asked: Asked) -> Said:
        return self._json({})

    def _say_commit(self, asked: Asked) -> Said:
        from base64 import b64decode

        found = dict(self.present)
        for line in asked.body.decode().splitlines():
            told = json.loads(line)
            key, value = told["key"], told["value"]
            if key == "file":
                found[value["path"]] = b64decode(value["content"])
            elif key == "lfsFile":
                found[value["path"]] = self.uploaded.get(value["oid"], b"")
            elif key == "deletedFile":
                found.pop(value["path"], None)
        self._committed = found
        return self._json({"success": True, "commitOid": self.commit, "commitUrl": f"{self.url}/{REPO}/commit/1"})


def is_lfs(name: str) -> bool:
    return name.endswith(LFS_SUFFIXES)


def sibling(name: str, data: bytes) -> dict[str, Any]:
    """A file in a listing."""
    if not is_lfs(name):
        return {"rfilename": name, "size": len(data), "blobId": git_blob_id(data)}
    digest = hashlib.sha256(data).hexdigest()
    pointer = lfs_pointer(digest, len(data))
    lfs = {"sha256": digest, "size": len(data), "pointerSize": len(pointer)}
    return {"rfilename": name, "size": len(data), "blobId": git_blob_id(pointer), "lfs": lfs}


def drip(data: bytes, seconds: float, *, first: bytes = b"") -> Script:
    """One byte after the other, then the connection stays open."""
    yield first
    for byte in data:
        yield bytes([byte])
        yield seconds
    yield 60.0


def endless(piece: bytes, *, first: bytes = b"") -> Script:
    yield first
    while True:
        yield piece


def silence(first: bytes = b"") -> Script:
    """Nothing more, for longer than anybody should wait."""
    yield first
    yield 60.0
