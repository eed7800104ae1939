"""A Hub on loopback: a real HTTP server that speaks the Hub's protocol to the real `huggingface_hub` client.

    with LoopbackHub() as hub:
        commit = hub.create("org/model", {"config.json": b"{}", "model.safetensors": Path("model.safetensors")})
        hub.fail("status", "/resolve/", status=503, times=2)
        ...
        assert hub.bytes_sent("model.safetensors") < 100_000

Large files are answered as the Hub does: a redirect that carries their sha256, to another origin that serves ranges and
must never see a token. Uploads go through preupload, LFS batch and the commit call. There is no Xet.
"""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from .hub_answers import Answer, Bandwidth, Fault, FaultKind, FileRange, Refusal, Request, as_json
from .hub_routes import ROUTES
from .hub_state import LFS_SUFFIXES, Blob, Repository, blob

LICENCES = ("apache-2.0", "mit", "openrail", "other")
"""Which a model card may say, of the many that the Hub knows."""


class LoopbackHub:
    """Start with `with`; `url` is the value for HF_ENDPOINT. All state may be changed while it serves."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.users: dict[str, str] = {}
        """token → user"""
        self.roles: dict[str, Mapping[str, Any]] = {}
        """token → what is told of what it is for; else it may write."""
        self.objects: dict[str, Blob] = {}
        """LFS objects by sha256, uploaded ones included."""
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.page_size = 1000
        self.bandwidth = Bandwidth()
        """Of all files together."""
        self.ranges = True
        """False: Range headers are ignored, as by some proxies."""
        self.hold: Callable[[Request], object] | None = None
        """Called before a file is sent; it may wait."""
        self.lock = threading.RLock()
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.cdn = f"http://localhost:{self.port}"
        """Another origin, as a CDN is."""

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def create(self, repo: str, files: Mapping[str, bytes | Path], *, branch: str = "main", **settings: Any) -> str:
        """A repository with one commit, which is given. `settings` are fields of `hub_state.Repository`."""
        self.repositories[repo] = Repository(repo, **settings)
        return self.commit(repo, files, branch)

    def commit(self, repo: str, files: Mapping[str, bytes | Path], branch: str = "main") -> str:
        """Add or replace files; the branch moves to the new commit, which is given."""
        blobs = {name: blob(name, content) for name, content in files.items()}
        with self.lock:
            self.objects |= {item.sha256: item for item in blobs.values() if item.lfs}
            return self.repositories[repo].commit(blobs, branch)

    def environment(self, home: Path) -> dict[str, str]:
        """What a client needs to meet this Hub only, with `home` for its cache and login."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def fail(
        self,
        kind: FaultKind,
        match: str = "",
        *,
        times: int = 1,
        method: str | None = None,
        status: int = 503,
        headers: Mapping[str, str] | None = None,
        seconds: float = 30.0,
        rate: int = 1000,
    ) -> None:
        """Let the next `times` requests whose path contains `match` go wrong.

        status: answer `status` with `headers`; cut: half the body, then the connection closes; garbage: other bytes of
        the same size; hang: nothing for `seconds`; html: 200 with a login page; slow: `rate` bytes a second;
        redirect: to itself, for ever; etag: another ETag than the listing's.
        """
        with self.lock:
            self.faults.append(Fault(kind, match, times, method, status, headers or {}, seconds, rate))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.match in path and fault.method in (None, method):
                    fault.times -= 1
                    return fault
        return None

    def names(self, repo: str) -> list[str]:
        """The files of its main branch."""
        found = self.repositories[repo]
        return list(found.commits[found.branches["main"]])

    def requests(self, match: str = "", method: str | None = None) -> list[Request]:
        return [entry for entry in list(self.log) if match in entry.path and method in (None, entry.method)]

    def bytes_sent(self, match: str = "") -> int:
        """Bytes of the answers, all counted: a client may have the last one before the thread that sent it goes on."""
        end = time.monotonic() + 5
        while not all(entry.done for entry in self.requests(match)) and time.monotonic() < end:
            time.sleep(0.01)
        return sum(entry.sent for entry in self.requests(match))


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    headers: Message[str, str]

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.user = self.hub.users.get(token or "")
        self.entry = Request(
            self.command,
            unquote(url.path),
            self.headers.get("Range"),
            self.user,
            token,
            self.headers.get("User-Agent", ""),
        )
        self.body = self._read_body()
        self.entry.received = len(self.body)
        self.fault = self.hub.take_fault(self.command, self.entry.path)
        try:
            answer = self._broken() or self._route(url.path)
        except Refusal as refusal:
            answer = refusal.answer
        self._send(answer)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _broken(self) -> Answer | None:
        if self.fault is None:
            return None
        if self.fault.kind == "status":
            answer = as_json({"error": "out of order"}, self.fault.status, self.fault.headers)
            return answer
        if self.fault.kind == "redirect":
            return Answer(302, {"Location": f"{self.hub.url}{self.path}"})
        if self.fault.kind == "html":
            page = b"<html><body>Please log in to the guest network</body></html>"
            return Answer(200, {"Content-Type": "text/html"}, [page], len(page))
        if self.fault.kind == "hang":
            self.hub.closing.wait(self.fault.seconds)
            self.close_connection = True
        return None

    def _route(self, path: str) -> Answer:
        if self.entry.token and self.user is None and not path.startswith("/cdn/"):
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        for name, pattern in ROUTES:
            if match := pattern.fullmatch(path):
                groups = {key: unquote(value) for key, value in match.groupdict().items() if value}
                with self.hub.lock:
                    answer: Answer = getattr(self, f"_{name}")(**groups)
                    return answer
        raise Refusal(404, "", f"Sorry, we can't find the page you are looking for: {path}")

    def _send(self, answer: Answer) -> None:
        self.entry.status = answer.status
        self.hub.log.append(self.entry)
        self.send_response(answer.status)
        self.send_header("Content-Length", str(answer.size))
        self.send_header("X-Request-Id", f"loopback-{len(self.hub.log)}")
        for key, value in answer.headers.items():
            self.send_header(key, value)
        self.end_headers()
        try:
            if self.hub.hold is not None and self.command == "GET" and answer.status in (200, 206):
                self.hub.hold(self.entry)
            if self.command != "HEAD" and isinstance(answer.body, FileRange) and self.fault is None:
                self.wfile.flush()
                for sent in answer.body.send(self.connection.fileno(), self.hub.bandwidth):
                    self.entry.sent += sent
            elif self.command != "HEAD":
                for chunk in self._spoilt(answer):
                    self.wfile.write(chunk)
                    self.entry.sent += len(chunk)
            self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            self.entry.done = True

    def _spoilt(self, answer: Answer) -> Iterator[bytes]:
        kind = self.fault.kind if self.fault and answer.status in (200, 206) else None
        if kind == "cut":
            self.close_connection = True
            yield next(iter(answer.body))[: answer.size // 2]
            return
        for chunk in answer.body:
            if kind == "garbage":
                yield bytes(byte ^ 0x5A for byte in chunk)
            elif kind == "slow" and self.fault:
                for start in range(0, len(chunk), self.fault.rate):
                    yield chunk[start : start + self.fault.rate]
                    self.wfile.flush()
                    time.sleep(1)
            else:
                yield chunk

    # The routes. Names and shapes are those of the Hub's API.

    def _repository(self, repo: str, *, contents: bool = False) -> Repository:
        """The repository if this user may see it; `contents` asks for its files, which a gate may keep back."""
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and self.user not in found.members):
            if self.user is None:
                raise Refusal(401, "RepoNotFound", "Invalid username or password.")
            raise Refusal(404, "RepoNotFound", "Repository not found")
        if contents and found.gated and self.user not in found.members:
            message = f"Access to model {repo} is restricted. You must have access to it and be authenticated."
            raise Refusal(401 if self.user is None else 403, "GatedRepo", message)
        return found

    def _at(self, repo: str, revision: str, *, contents: bool = False) -> tuple[Repository, str]:
        found = self._repository(repo, contents=contents)
        commit = found.resolve(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found, commit

    def _writable(self, repo: str, revision: str = "") -> Repository:
        if self.user is None:
            raise Refusal(401, "", "Invalid username or password.")
        found = self._repository(repo)
        mine = self.user in found.members or found.authors.get(revision) == self.user
        if repo.split("/")[0] != self.user and not mine:
            raise Refusal(403, "", "You don't have the rights to write here")
        return found

    def _whoami(self) -> Answer:
        if self.user is None:
            raise Refusal(401, "", "Invalid username or password.")
        role = self.hub.roles.get(self.entry.token or "", {"role": "write"})
        token = {"accessToken": {"displayName": "test", **role}}
        return as_json({"type": "user", "name": self.user, "orgs": [], "auth": token})

    def _auth_check(self, repo: str, write: str = "") -> Answer:
        self._writable(repo) if write else self._repository(repo, contents=True)
        return as_json({})

    def _info(self, repo: str, revision: str = "main") -> Answer:
        found, commit = self._at(repo, revision)
        return as_json(found.info(commit, blobs="blobs" in self.query))

    def _refs(self, repo: str) -> Answer:
        found = self._repository(repo)
        heads = {name: commit for name, commit in found.branches.items() if not name.startswith("refs/")}
        kinds = {"branches": ("heads", heads), "tags": ("tags", found.tags)}
        refs = {
            kind: [
                {"name": name, "ref": f"refs/{part}/{name}", "targetCommit": commit} for name, commit in values.items()
            ]
            for kind, (part, values) in kinds.items()
        }
        requests = [
            {"name": name.removeprefix("refs/"), "ref": name, "targetCommit": commit}
            for name, commit in found.branches.items()
            if name.startswith("refs/pr/")
        ]
        asked = {"pullRequests": requests} if "include_prs" in self.query else {}
        return as_json({**refs, **asked, "converts": []})

    def _tree(self, repo: str, revision: str, folder: str = "") -> Answer:
        found, commit = self._at(repo, revision)
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = found.tree(commit, folder, recursive=recursive)
        start = int(self.query.get("cursor", ["0"])[0])
        end = start + self.hub.page_size
        link = f'<{self.hub.url}{urlsplit(self.path).path}?recursive={recursive}&cursor={end}>; rel="next"'
        return as_json(entries[start:end], headers={"Link": link} if end < len(entries) else None)

    def _paths_info(self, repo: str, revision: str) -> Answer:
        found, commit = self._at(repo, revision)
        is_json = "json" in self.headers.get("Content-Type", "")
        wanted = json.loads(self.body)["paths"] if is_json else parse_qs(self.body.decode()).get("paths", [])
        files = found.commits[commit]
        return as_json([found.entry(name, files[name]) for name in wanted if name in files])

    def _resolve(self, repo: str, revision: str, name: str) -> Answer:
        found, commit = self._at(repo, revision, contents=True)
        item = found.commits[commit].get(name)
        if item is None:
            refusal = Refusal(404, "EntryNotFound", "Entry not found")
            refusal.answer.headers["X-Repo-Commit"] = commit
            raise refusal
        etag = "0" * 40 if self.fault and self.fault.kind == "etag" else item.etag
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if not item.lfs:
            return self._ranged(item, headers)
        linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(item.size)}
        text = b"Found. Redirecting"
        location = {"Location": f"{self.hub.cdn}/cdn/{item.sha256}/{name}"}
        return Answer(302, {**headers, **linked, **location}, [text], len(text))

    def _cdn(self, oid: str, name: str) -> Answer:
        if self.entry.token:
            raise Refusal(400, "", "a token left the Hub")
        return self._ranged(self.hub.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _ranged(self, item: Blob, headers: dict[str, str]) -> Answer:
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.entry.range or "")
        if not self.hub.ranges or not match or not any(match.groups()):
            return Answer(200, headers, item.chunks(0, item.size), item.size)
        first, last = match.groups()
        start = int(first) if first else max(0, item.size - int(last))
        end = min(int(last) + 1, item.size) if first and last else item.size
        if start >= end:
            return Answer(416, {"Content-Range": f"bytes */{item.size}"})
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{item.size}"
        return Answer(206, headers, item.chunks(start, end), end - start)

    def _create_repo(self) -> Answer:
        if self.user is None:
            raise Refusal(401, "", "Invalid username or password.")
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.user
        repo = f"{owner}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{repo}", "name": repo}
        if repo in self.hub.repositories:
            return as_json({"error": "You already created this model repo", **answer}, 409)
        if owner != self.user:
            raise Refusal(403, "", f"You don't have the rights to create a model under the namespace {owner!r}")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        created = Repository(repo, private=private, members={self.user}, library=None)
        created.commit({".gitattributes": blob(".gitattributes", b"*.safetensors filter=lfs\n")})
        self.hub.repositories[repo] = created
        return as_json(answer)

    def _validate_yaml(self) -> Answer:
        parts = json.loads(self.body)["content"].split("---\n", 2)
        try:
            told = yaml.safe_load(parts[1] if len(parts) == 3 else "") or {}
            errors = [] if told.get("license", "mit") in LICENCES else [f'"license" must be one of {LICENCES}']
        except yaml.YAMLError as error:
            errors = [str(error)]
        return as_json({"errors": [{"message": each} for each in errors], "warnings": []}, 400 if errors else 200)

    def _branch(self, repo: str, branch: str) -> Answer:
        found = self._writable(repo)
        if branch.startswith("refs/"):
            raise Refusal(400, "", f"{branch!r} is no name of a branch")
        if branch in found.branches:
            raise Refusal(409, "", "Reference already exists")
        found.branches[branch] = found.branches["main"]
        return as_json({}, 201)

    def _preupload(self, repo: str, revision: str) -> Answer:
        found = self._writable(repo, revision)
        present = found.commits[self._at(repo, revision)[1]]
        files = [
            {
                "path": name,
                "uploadMode": "lfs" if name.endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": present[name].etag if name in present else None,
            }
            for name in (file["path"] for file in json.loads(self.body)["files"])
        ]
        return as_json({"files": files})

    def _lfs_batch(self, repo: str) -> Answer:
        if self.user not in self._repository(repo).authors.values():
            self._writable(repo)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.cdn}/lfs/{asked['oid']}"},
                "verify": {"href": f"{self.hub.url}/lfs-verify"},
            }
            objects.append(asked if asked["oid"] in self.hub.objects else {**asked, "actions": actions})
        return as_json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid: str) -> Answer:
        item = blob("object", self.body, lfs=True)
        if item.sha256 != oid:
            raise Refusal(400, "", "content does not match its oid")
        self.hub.objects[oid] = item
        return as_json({})

    def _lfs_verify(self) -> Answer:
        asked = json.loads(self.body)
        if asked["oid"] not in self.hub.objects:
            raise Refusal(404, "", "no such object")
        return as_json({})

    def _commit(self, repo: str, revision: str) -> Answer:
        found = self._writable(repo, revision)
        files: dict[str, Blob | None] = {}
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if (
                operation["key"] == "header"
                and value.get("parentCommit", found.branches[revision]) != (found.branches[revision])
            ):
                raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
            if operation["key"] == "file":
                files[value["path"]] = blob(value["path"], base64.b64decode(value["content"]), lfs=False)
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                files[value["path"]] = None
        commit = found.commit(files, revision)
        return as_json({"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit})
