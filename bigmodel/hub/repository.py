"""The Hugging Face Hub: which commit a revision means, which files it has, and whether they may be read.

A thin layer over `huggingface_hub`, whose session, headers, login, cache and environment variables (`HF_HOME`,
`HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`…) it uses. It adds what a plan needs: one metadata request per repository,
each with a time limit, and errors that say what to do (`hub_errors`). `snapshot` brings the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from bigpipe.bigmodel.memo import recall, remember
from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import InvalidCheckpoint, NotAuthorised, Offline, Transient

from .errors import LOGIN, hub_errors

TIMEOUT = 10.0
"""Seconds for one metadata request."""
PATIENCE = 5.0
"""The longest `Retry-After` that a metadata request waits for, in seconds."""
MAX_ANSWER = 128 * 2**20
"""Bytes of one answer. A listing takes some 300 per file."""
DTYPE = re.compile(r"[A-Z][A-Z0-9_]{0,19}")
"""As safetensors writes them."""
COMMIT = re.compile(r"[0-9a-f]{40}")
CURE_OFFLINE = "run once with a network (without --offline and HF_HUB_OFFLINE); what it brings stays in the Hub cache"


@dataclass(frozen=True, slots=True)
class Hub:
    """Which Hub, which cache, and who asks."""

    endpoint: str
    cache: Path
    """Where `huggingface_hub` keeps repositories: `models--owner--name/{blobs,snapshots,refs}`."""
    token: str | None = field(default=None, repr=False)
    """None: whatever login `huggingface_hub` finds itself."""
    offline: bool = False
    meter: Callable[[int], None] | None = field(default=None, repr=False, compare=False)
    """Told the size of every answer to a metadata or range request."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None, *, offline: bool = False) -> Hub:
        """The process's environment, overlaid with `environment`, read by the rules of `huggingface_hub.constants`."""
        env = {**os.environ, **(environment or {})}
        home = env.get("HF_HOME") or f"{env.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
        cache = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
        return cls(
            endpoint=(env.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/"),
            cache=Path(os.path.expandvars(cache)).expanduser(),
            token=env.get("HF_TOKEN") or env.get("HUGGING_FACE_HUB_TOKEN") or None,
            offline=offline or any(_is_true(env.get(name)) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")),
        )

    @classmethod
    def of(cls, sources: Sources) -> Hub:
        return cls.from_environment(sources.environment, offline=sources.offline)

    def folder(self, repo: str) -> Path:
        """The cache's directory of one model repository; it need not exist."""
        return self.cache / "--".join(["models", *repo.split("/")])


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a commit. `sha256` is known for LFS files only; for the others `blob_id` is git's sha1."""

    path: str
    size: int
    blob_id: str
    sha256: str | None = None

    @property
    def etag(self) -> str:
        """What the Hub sends as ETag and the cache uses as the blob's name."""
        return self.sha256 or self.blob_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A model repository at one commit, as the Hub describes it."""

    repo: str
    commit: str
    files: tuple[HubFile, ...]
    gated: bool = False
    private: bool = False
    library: str | None = None
    license: str | None = None
    elements: Mapping[str, int] | None = None
    """Safetensors dtype → elements, as the Hub counts them; None where it does not."""

    def file(self, path: str) -> HubFile | None:
        return next((file for file in self.files if file.path == path), None)

    def as_json(self) -> dict[str, Any]:
        files = [
            {"path": file.path, "size": file.size, "blob_id": file.blob_id, "sha256": file.sha256}
            for file in self.files
        ]
        return {**asdict(replace(self, files=())), "files": files}  # asdict alone takes a millisecond per hundred files

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Repository:
        return cls(**{**data, "files": tuple(HubFile(**file) for file in data["files"])})


def resolve_commit(repo: str, revision: str, *, hub: Hub, memo: Path | None = None) -> str:
    """The 40 hex digits that `revision` (branch, tag, `refs/pr/N`, short or full commit) means now.

    A full commit is given back without a request; anything else is one request, whose listing is kept under `memo`.
    Raises Offline, NotAuthorised, UsageError (no such repository or revision), Transient.
    """
    return revision if COMMIT.fullmatch(revision) else describe(repo, revision, hub=hub, memo=memo).commit


def describe(repo: str, revision: str = "main", *, hub: Hub, memo: Path | None = None) -> Repository:
    """The repository's files at `revision`, with sizes and digests: one request, none for a commit seen before.

    A commit's listing never changes, so it is kept under `memo` for ever; offline it may also come from the Hub cache.
    Raises as `resolve_commit`, and InvalidCheckpoint where a file name would lead out of the repository.
    """
    if COMMIT.fullmatch(revision) and (known := _remembered(hub, repo, revision, memo)):
        return known
    if hub.offline:
        raise _offline(hub, repo, revision)
    path = f"/api/models/{quote(repo)}/revision/{quote(revision, safe='')}"
    data = _get_json(hub, path, repo, revision, {"blobs": "true"})
    described = _parse(hub, repo, data)
    for file in described.files:
        check_name(repo, file.path)
    if memo is not None:
        remember(_memo_file(hub, repo, described.commit, memo), described.as_json())
    return described


def check_access(repo: str, *, hub: Hub, write: bool = False) -> None:
    """Ask whether this login may read (or write) the repository's files, without reading any.

    Raises GatedRepository, NotAuthorised, UsageError (no such repository), Offline, Transient.
    """
    if hub.offline:
        raise _offline(hub, repo, None)
    _get_json(hub, f"/api/models/{quote(repo)}/auth-check{'/write' if write else ''}", repo, None, {})


def whoami(hub: Hub) -> list[str]:
    """The name of the login's user, then those of its organisations. Raises NotAuthorised, Offline, Transient."""
    try:
        data = _get_json(hub, "/api/whoami-v2", "whoami", None, {})
    except NotAuthorised as error:
        raise NotAuthorised(f"{hub.endpoint} knows no user for this login, or there is none (401)", LOGIN) from error
    return [data["name"], *[organisation["name"] for organisation in data.get("orgs", [])]]


def read_range(repo: str, commit: str, path: str, start: int, size: int, *, hub: Hub) -> bytes:
    """`size` bytes of one file from byte `start` on, by an HTTP range; fewer only where the file ends."""
    if hub.offline:
        raise _offline(hub, repo, commit)
    with hub_errors(hub.endpoint, repo, commit, path):
        status, content = _request(
            hub,
            f"/{quote(repo)}/resolve/{quote(commit, safe='')}/{quote(path)}",
            {},
            {"Range": f"bytes={start}-{start + size - 1}", "Accept-Encoding": "identity"},
            limit=size,
        )
    if status == 206 or start == 0:
        return content
    raise Transient(
        f"{hub.endpoint} answered a request for bytes {start} and on of {path} with the beginning of the file",
        "a proxy in between may drop the Range header; try again, or without it",
    )


def check_name(repo: str, name: str) -> None:
    """Refuse a file name that is not a plain relative path: nothing may be written outside, or beside its listing."""
    parts = PurePosixPath(name).parts
    plain = name == "/".join(parts) and not name.startswith("/") and ".." not in parts
    if not plain or "\\" in name or ":" in parts[0] or any(ord(letter) < 32 for letter in name):
        raise InvalidCheckpoint(
            f"{repo} lists a file named {name!r}, which could lead out of the repository",
            "do not use this repository; report it to the Hub",
        )


def cached_commit(hub: Hub, repo: str, revision: str) -> str | None:
    """What the Hub cache last saw `revision` point to."""
    try:
        commit = (hub.folder(repo) / "refs" / revision).read_text().strip()
    except OSError:
        return None
    return commit if COMMIT.fullmatch(commit) else None


def cached_repository(hub: Hub, repo: str, commit: str) -> Repository | None:
    """The listing of a snapshot that lies in the Hub cache, from the blobs' names, which are their digests.

    Files that were never downloaded are not in it. None where there is no snapshot, or one without links.
    """
    snapshot = hub.folder(repo) / "snapshots" / commit
    files = []
    for path in sorted(snapshot.rglob("*")):
        if not path.is_file():
            continue
        if not path.is_symlink():
            return None
        etag = Path(os.readlink(path)).name
        sha256 = etag if len(etag) == 64 else None
        files.append(
            HubFile(path.relative_to(snapshot).as_posix(), path.stat().st_size, "" if sha256 else etag, sha256)
        )
    return Repository(repo=repo, commit=commit, files=tuple(files)) if files else None


def _remembered(hub: Hub, repo: str, commit: str, memo: Path | None) -> Repository | None:
    if memo is not None:
        try:
            return Repository.from_json(recall(_memo_file(hub, repo, commit, memo)))
        except (TypeError, KeyError):
            pass
    return cached_repository(hub, repo, commit) if hub.offline else None


def _memo_file(hub: Hub, repo: str, commit: str, memo: Path) -> Path:
    name = hashlib.sha256(json.dumps(["hub listing", 1, hub.endpoint, repo, commit]).encode()).hexdigest()
    return memo / "hub" / f"{name}.json"


def _offline(hub: Hub, repo: str, revision: str | None) -> Offline:
    known = cached_commit(hub, repo, revision) if revision else None
    cure = (
        f"the Hub cache saw {revision} at {known}: write `revision: {known}`, or {CURE_OFFLINE}"
        if known
        else CURE_OFFLINE
    )
    at = f" at {revision}" if revision else ""
    return Offline(f"{repo}{at} is not known here, and asking the Hub is switched off", cure)


def _get_json(hub: Hub, path: str, repo: str, revision: str | None, query: Mapping[str, str]) -> Any:
    with hub_errors(hub.endpoint, repo, revision, refs=lambda: _revisions(hub, repo)):
        return json.loads(_request(hub, path, query)[1])


def _request(
    hub: Hub, path: str, query: Mapping[str, str], headers: Mapping[str, str] | None = None, limit: int = MAX_ANSWER
) -> tuple[int, bytes]:
    """Return status and content of one GET, or of a second one where the first met a limit or a server out of order.

    At most `limit` bytes are read: a server that ignores a Range header would send the whole file.
    """
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    sent = {**build_hf_headers(token=hub.token, library_name="bigpipe"), **(headers or {})}
    options = {"params": dict(query), "headers": sent, "timeout": TIMEOUT}
    for last in (False, True):
        with get_session().stream("GET", f"{hub.endpoint}{path}", **options) as response:
            wait = _retry_after(response.headers.get("Retry-After"))
            if last or wait > PATIENCE or response.status_code not in (429, 500, 502, 503, 504):
                hf_raise_for_status(response)
                content = _read(response, limit, hub)
                break
        time.sleep(wait)
    if hub.meter is not None:
        hub.meter(len(content) + sum(len(hop.content) for hop in response.history))
    return response.status_code, content


def _read(response: Any, limit: int, hub: Hub) -> bytes:
    content = bytearray()
    for chunk in response.iter_bytes():
        content += chunk
        if len(content) > limit:
            raise Transient(
                f"{hub.endpoint} answered with more than the {limit} bytes that were asked for",
                "a proxy in between may drop the Range header; try again, or without it",
            )
    return bytes(content)


def _retry_after(value: str | None) -> float:
    """Seconds; half a second where the header is missing, an endless wait where it is a date."""
    if value is None:
        return 0.5
    return float(value) if value.isdecimal() else float("inf")


def _revisions(hub: Hub, repo: str) -> list[str]:
    data = json.loads(_request(hub, f"/api/models/{quote(repo)}/refs", {})[1])
    return [ref["name"] for kind in ("branches", "tags") for ref in data[kind]]


def _parse(hub: Hub, repo: str, data: Any) -> Repository:
    """The Hub's model info."""
    try:
        card = data.get("cardData") or {}
        licence = card.get("license") if isinstance(card, Mapping) else None
        return Repository(
            repo=repo,
            commit=data["sha"],
            files=tuple(_parse_file(item) for item in data["siblings"]),
            gated=bool(data.get("gated")),
            private=bool(data.get("private")),
            library=data.get("library_name"),
            license=licence if isinstance(licence, str) else None,
            elements=_parse_counts(data.get("safetensors")),
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise Transient(
            f"{hub.endpoint} describes {repo} without what a Hub tells ({type(error).__name__}: {error})",
            "check HF_ENDPOINT: a mirror must speak the Hub's API",
        ) from error


def _parse_file(item: Mapping[str, Any]) -> HubFile:
    if lfs := item.get("lfs"):
        return HubFile(item["rfilename"], lfs["size"], item["blobId"], lfs["sha256"])
    return HubFile(item["rfilename"], item["size"], item["blobId"])


def _parse_counts(told: Any) -> dict[str, int] | None:
    """Only a cross-check, so counts that are none are left out, not refused."""
    counts = told.get("parameters") if isinstance(told, Mapping) else None
    if not isinstance(counts, Mapping):
        return None
    plain = all(DTYPE.fullmatch(name) and type(count) is int and count >= 0 for name, count in counts.items())
    return dict(counts) if plain else None


def _is_true(value: str | None) -> bool:
    return (value or "").upper() in ("1", "ON", "YES", "TRUE")
