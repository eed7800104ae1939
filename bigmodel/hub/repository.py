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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from bigpipe.bigmodel.memo import recall, remember
from bigpipe.bigmodel.sources import Sources
from bigpipe.environment import absolute_places, says_offline
from bigpipe.errors import BigpipeError, InvalidCheckpoint, Offline, Transient, UsageError, first_few
from bigpipe.redaction import conceal_environment, printable

from .connection import MAX_ANSWER, asking, clean_token, guard_answers, request
from .errors import CURE_OFFLINE, hub_errors
from .exchange import exchanging
from .responses import COMMIT, DIGEST, NO_RANGE, NOT_A_HUB, shown

DTYPE = re.compile(r"[A-Z][A-Z0-9_]{0,19}")
"""As safetensors writes them."""
LIBRARY = re.compile(r"[\w.+-]{1,64}", re.ASCII)
NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
DRIVE = re.compile(r"[A-Za-z]:")
READERS = 8
"""Files that are asked about at a time."""
MOST_ASKED = 2000
"""Files whose size is asked for one by one."""
MOST_BYTES = 2**50
LONGEST_NAME, LONGEST_PART = 1000, 255
"""Bytes. Of the latter ext4, XFS, APFS and NTFS take no more."""
UNUSABLE = "do not use this repository; report it to the Hub"


@dataclass(frozen=True, slots=True)
class Hub:
    """Which Hub, which cache, and who asks."""

    endpoint: str
    cache: Path
    """Where `huggingface_hub` keeps repositories: `models--owner--name/{blobs,snapshots,refs}`."""
    token: str | None = field(default=None, repr=False)
    """None: whatever login `huggingface_hub` finds itself."""
    offline: bool = False
    memo: Path | None = field(default=None, compare=False)
    """Where listings of commits and digests of cached files are kept, if anywhere."""
    timeout: float = 10.0
    """Seconds for one metadata request."""
    known: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Question → what a Hub answered before: believed only where this one cannot be asked."""
    meter: Callable[[int], None] | None = field(default=None, repr=False, compare=False)
    """Told the size of every answer to a metadata or range request."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None, *, offline: bool = False) -> Hub:
        """Read the process's environment, overlaid with `environment`, by the rules of `huggingface_hub.constants`."""
        env = {**os.environ, **(environment or {})}
        home = env.get("HF_HOME") or f"{env.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
        cache = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
        conceal_environment(env)
        return cls(
            endpoint=(env.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/"),
            cache=Path(os.path.expanduser(os.path.expandvars(cache))),
            token=clean_token(env.get("HF_TOKEN")) or clean_token(env.get("HUGGING_FACE_HUB_TOKEN")),
            offline=offline or says_offline(env),
        )

    @classmethod
    def of(cls, sources: Sources) -> Hub:
        environment = absolute_places(sources.environment or {}, sources.base or Path.cwd())
        return replace(
            cls.from_environment(environment, offline=sources.offline), memo=sources.memo, known=sources.known
        )

    def folder(self, repo: str) -> Path:
        """Return the cache's directory of one model repository; it need not exist."""
        return self.cache / "--".join(["models", *repo.split("/")])

    def recall(self, *facts: object) -> Any:
        """Return what was kept under these facts; None where nothing was."""
        return None if self.memo is None else recall(self._answer(self.memo, facts))

    def told(self, *facts: object) -> Any:
        """Return what is `known` under these facts; None where nothing is."""
        return self.known.get(question(*facts))

    def remember(self, answer: Any, *facts: object) -> None:
        """Keep the JSON `answer` under these facts, if answers are kept anywhere."""
        if self.memo is not None:
            remember(self._answer(self.memo, facts), answer)

    def _answer(self, memo: Path, facts: tuple[object, ...]) -> Path:
        return memo / "hub" / f"{hashlib.sha256(json.dumps([self.endpoint, *facts]).encode()).hexdigest()}.json"


def question(*facts: object) -> str:
    """Return what an answer is `known` by: the same for every endpoint, since a commit names its content."""
    return json.dumps(facts)


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a commit. `sha256` is known for LFS files only; for the others `blob_id` is git's sha1."""

    path: str
    size: int
    blob_id: str
    sha256: str | None = None
    mark: str = ""
    """40 hex digits that a mirror sends as ETag, whose listing tells no digest: git's sha1, or that of the content."""

    @property
    def etag(self) -> str:
        """What the Hub sends as ETag and the cache uses as the blob's name."""
        return self.sha256 or self.blob_id or self.mark

    def may_be(self, path: Path) -> bool:
        """Return whether a file of its size is there."""
        return path.is_file() and path.stat().st_size == self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A model repository at one commit, as the Hub describes it."""

    hub: Hub = field(repr=False, compare=False)
    repo: str
    commit: str
    files: tuple[HubFile, ...]
    library: str | None = None
    elements: Mapping[str, int] | None = None
    """Safetensors dtype → elements, as the Hub counts them; None where it does not."""
    subfolder: str = ""
    """What the paths of the files start from; the repository's root, unless it is said otherwise."""
    renamed: str = ""
    """What the Hub calls it now, where it was asked for by another name."""
    whole: bool = True
    """False: it may have files besides these, which lie in the Hub cache."""

    def below(self, subfolder: str) -> Repository:
        """Return it with the files of one folder alone, as if that were the root. Raise UsageError where it is none."""
        prefix = f"{subfolder}/"
        found = [file for file in self.files if file.path.startswith(prefix)]
        if not found:
            folders = sorted({file.path.rpartition("/")[0] for file in self.files} - {""})
            cause = f"{self.repo} has no folder {subfolder!r}"
            raise UsageError(cause, f"it has {first_few(folders) or 'none'}", field="subfolder")
        files = tuple(replace(file, path=file.path.removeprefix(prefix)) for file in found)
        return replace(self, files=files, subfolder=subfolder, elements=None)

    def address(self, file: HubFile) -> str:
        """Return the path of a file from the repository's root."""
        return f"{self.subfolder}/{file.path}" if self.subfolder else file.path

    def cached(self, file: HubFile) -> Path:
        """Return where the cache's snapshot of this commit has a file; it need not be there."""
        return self.snapshot / self.address(file)

    def file(self, path: str) -> HubFile | None:
        return next((file for file in self.files if file.path == path), None)

    @property
    def snapshot(self) -> Path:
        """The cache's directory of this commit; it need not exist."""
        return self.hub.folder(self.repo) / "snapshots" / self.commit

    def blob(self, file: HubFile) -> Path:
        """Return where the cache keeps the bytes of a file."""
        return Path(os.path.realpath(self.hub.folder(self.repo) / "blobs" / file.etag))

    def is_cached(self, file: HubFile) -> bool:
        """Return whether the cache has a file of this name, or these bytes, and size."""
        return file.may_be(self.blob(file)) or file.may_be(self.cached(file))


def address_of(repo: str, revision: str, commit: str | None = None, *, hub: Hub) -> str:
    """Return what a repository at a revision is called where two are compared. The Hub takes names in any case, and a
    renamed repository by its old one. Another branch is another place, also where it means the same commit. commit:
    what the revision means, where that is known."""
    try:
        name = describe(repo, commit or revision, hub=hub).renamed
    except BigpipeError:  # not there yet, or it cannot be asked now
        name = ""
    return f"hf://{(name or repo).lower()}@{revision}"


def resolve_commit(repo: str, revision: str, *, hub: Hub) -> str:
    """Return the 40 hex digits that `revision` (branch, tag, `refs/pr/N`, short or full commit) means now.
    A full commit is given back without a request; anything else is one request. Raise as `describe`."""
    return revision if COMMIT.fullmatch(revision) else describe(repo, revision, hub=hub).commit


def describe(repo: str, revision: str = "main", *, hub: Hub) -> Repository:
    """Return the repository's files at `revision`, with sizes and digests: one request, none for a commit seen before.

    A commit's listing never changes, so it is kept under `hub.memo` for ever; offline it may also be `hub.known` or
    come from the Hub cache. Raise Offline, NotAuthorised, UsageError (no such repository or revision), Transient, and
    InvalidCheckpoint where a file name would lead out of the repository.
    """
    if COMMIT.fullmatch(revision) and (known := _remembered(hub, repo, revision)):
        return known
    try:
        return _ask(hub, repo, revision)
    except Offline:
        if (told := _told(hub, repo, revision)) is None:
            raise
        return told


def _ask(hub: Hub, repo: str, revision: str) -> Repository:
    if hub.offline:
        commit = cached_commit(hub, repo, revision)
        if commit is None or (known := _remembered(hub, repo, commit)) is None:
            raise unknown_here(hub, repo, revision)
        return known
    path = f"/api/models/{quote(repo)}/revision/{quote(revision, safe='')}"
    data = get_json(hub, path, repo, revision, {"blobs": "true"})
    described = _sized(_parse(hub, repo, data, revision if COMMIT.fullmatch(revision) else ""))
    hub.remember(as_listing(described), "listing", repo, described.commit)
    return described


def _sized(repository: Repository) -> Repository:
    """Ask for the size and digest of each file where the listing tells no sizes, as those of some mirrors do."""
    if all(file.size >= 0 for file in repository.files):
        return repository
    from concurrent.futures import ThreadPoolExecutor

    if (many := len(repository.files)) > MOST_ASKED:
        raise Transient(f"{repository.hub.endpoint} tells no sizes of {many} files of {repository.repo}", NOT_A_HUB)
    with ThreadPoolExecutor(READERS, "size") as pool:
        return replace(repository, files=tuple(pool.map(partial(_asked_for, repository), repository.files)))


def _asked_for(repository: Repository, file: HubFile) -> HubFile:
    from huggingface_hub import get_hf_file_metadata

    hub, address = repository.hub, f"/{quote(repository.repo)}/resolve/{repository.commit}/{quote(file.path)}"
    with (
        hub_errors(hub.endpoint, repository.repo, repository.commit, file.path),
        exchanging(asking(hub.timeout, asked_for=file.path, commit=repository.commit, digest=file.etag)),
    ):
        guard_answers(hub.endpoint)
        told = get_hf_file_metadata(f"{hub.endpoint}{address}", token=hub.token, timeout=hub.timeout)
    if told.size is None or told.size > MOST_BYTES:
        raise Transient(f"{hub.endpoint} does not tell how large {file.path} of {repository.repo} is", NOT_A_HUB)
    digest = told.etag if told.etag and DIGEST.fullmatch(told.etag) else ""
    sha256, mark = (digest, "") if len(digest) == 64 else (file.sha256, digest)
    return replace(file, size=told.size, sha256=sha256, mark=mark)


def read_range(repo: str, commit: str, path: str, start: int, size: int, *, hub: Hub) -> bytes:
    """Return `size` bytes of one file from byte `start` on, by an HTTP range; fewer only where the file ends."""
    if hub.offline:
        raise unknown_here(hub, repo, commit)
    address = f"/{quote(repo)}/resolve/{quote(commit, safe='')}/{quote(path)}"
    headers = {"Range": f"bytes={start}-{start + size - 1}", "Accept-Encoding": "identity"}
    with hub_errors(hub.endpoint, repo, commit, path):
        status, content = _request(hub, address, {}, headers, limit=size)
    if status == 206 or start == 0:
        return content
    cause = f"{hub.endpoint} answered a request for bytes {start} and on of {path} with the beginning of the file"
    raise Transient(cause, NO_RANGE)


def check_name(repo: str, name: str) -> None:
    """Refuse a file name that is not a plain relative path: nothing may be written outside, beside its listing, or to a
    terminal."""
    parts = PurePosixPath(name).parts
    plain = name and name == "/".join(parts) and not name.startswith("/") and ".." not in parts
    moves = printable(name) != name or not {"\n", "\t"}.isdisjoint(name)
    if not plain or "\\" in name or DRIVE.match(name) or moves:
        cause = f"{repo} lists a file named {name[:200]!r}, which could lead out of the repository"
        raise InvalidCheckpoint(cause, UNUSABLE)
    if len(name.encode()) > LONGEST_NAME or any(len(part.encode()) > LONGEST_PART for part in parts):
        raise InvalidCheckpoint(f"{repo} lists a file named {name[:80]}…, which no disk takes", UNUSABLE)


def _check_names(repo: str, names: Sequence[str]) -> None:
    """One file a name, and no name below another one's."""
    taken: set[str] = set()
    for name in names:
        check_name(repo, name)
        if name in taken:
            raise InvalidCheckpoint(f"{repo} lists {name} twice", UNUSABLE)
        taken.add(name)
    for name in names:
        if below := taken.intersection(map(str, PurePosixPath(name).parents)):
            raise InvalidCheckpoint(f"{repo} lists {name} below the file {below.pop()}", UNUSABLE)


def cached_commit(hub: Hub, repo: str, revision: str) -> str | None:
    """Return the commit that the Hub cache last saw `revision` point to."""
    try:
        commit = (hub.folder(repo) / "refs" / revision).read_text().strip()
    except OSError:
        return None
    return commit if COMMIT.fullmatch(commit) else None


def _remembered(hub: Hub, repo: str, commit: str) -> Repository | None:
    with suppress(Transient):  # nothing, or a damaged memory
        return _parse(hub, repo, hub.recall("listing", repo, commit), commit)
    return (_told(hub, repo, commit) or _cached_repository(hub, repo, commit)) if hub.offline else None


def _told(hub: Hub, repo: str, commit: str) -> Repository | None:
    with suppress(Transient):  # nothing, or what no Hub says
        return _parse(hub, repo, hub.told("listing", repo, commit), commit)
    return None


def _cached_repository(hub: Hub, repo: str, commit: str) -> Repository | None:
    """The listing of a snapshot that lies in the Hub cache, with the names of blobs, which are their digests: a copy
    that holds files in place of links tells none. Files that were never downloaded are not in it. None where there is
    no snapshot."""
    found = Repository(hub=hub, repo=repo, commit=commit, files=())
    paths = [path for path in sorted(found.snapshot.rglob("*")) if path.is_file()]
    files = tuple(_cached_file(path, found.snapshot) for path in paths)
    return replace(found, files=files, whole=False) if files else None


def _cached_file(path: Path, snapshot: Path) -> HubFile:
    name, size = path.relative_to(snapshot).as_posix(), path.stat().st_size
    digest = Path(os.readlink(path)).name if path.is_symlink() else ""
    if not DIGEST.fullmatch(digest):
        return HubFile(name, size, "")
    return HubFile(name, size, "", digest) if len(digest) == 64 else HubFile(name, size, digest)


def unknown_here(hub: Hub, repo: str, revision: str | None) -> Offline:
    """Return the error for what must be asked, and may not."""
    known = cached_commit(hub, repo, revision) if revision else None
    seen = f"the Hub cache saw {revision} at {known}: write `revision: {known}`, or " if known else ""
    at = f" at {revision}" if revision else ""
    return Offline(
        f"{repo}{at} is not known here, and asking the Hub is switched off", seen + CURE_OFFLINE, field="repo"
    )


def get_json(hub: Hub, path: str, repo: str, revision: str | None, query: Mapping[str, str]) -> Any:
    """Return what the Hub answers to a GET. Raise what `hub_errors` knows."""
    with hub_errors(hub.endpoint, repo, revision, refs=lambda: _revisions(hub, repo)):
        return json.loads(_request(hub, path, query)[1])


def _request(
    hub: Hub, path: str, query: Mapping[str, str], headers: Mapping[str, str] | None = None, limit: int = MAX_ANSWER
) -> tuple[int, bytes]:
    """Status and content of one GET."""
    response = request(
        f"{hub.endpoint}{path}", token=hub.token, timeout=hub.timeout, query=query, headers=headers or {}, limit=limit
    )
    content: bytes = response.content
    if hub.meter is not None:
        hub.meter(len(content) + sum(len(hop.content) for hop in response.history))
    return response.status_code, content


def _revisions(hub: Hub, repo: str) -> list[str]:
    data = json.loads(_request(hub, f"/api/models/{quote(repo)}/refs", {})[1])
    names = [ref["name"] for kind in ("branches", "tags") for ref in data[kind]]
    return [shown(name) for name in names if isinstance(name, str)]


def _parse(hub: Hub, repo: str, data: Any, wanted: str = "") -> Repository:
    """The Hub's model info. wanted: the commit, where one was asked for."""
    try:
        if not isinstance(data["sha"], str):
            raise TypeError(f"sha is {data['sha']!r}")
        if not COMMIT.fullmatch(data["sha"]) or wanted not in ("", data["sha"]):
            raise TypeError(f"sha is {data['sha'][:80]!r}{f', asked for {wanted}' if wanted else ''}")
        files, elements = tuple(_parse_file(item) for item in data["siblings"]), _parse_counts(data.get("safetensors"))
        told = data.get("library_name")
        library = told if isinstance(told, str) and LIBRARY.fullmatch(told) else None
        _check_names(repo, [file.path for file in files])
        return Repository(
            hub=hub, repo=repo, commit=data["sha"], files=files, library=library, elements=elements,
            renamed=_renamed(data.get("id"), repo),
        )  # fmt: skip
    except (AttributeError, KeyError, TypeError) as error:
        raise Transient(
            f"{hub.endpoint} describes {repo} without what a Hub tells ({why(error)})", NOT_A_HUB
        ) from error


def _renamed(told: Any, repo: str) -> str:
    known = isinstance(told, str) and NAME.fullmatch(told)
    return told if known and told.lower() != repo.lower() else ""


def why(error: Exception) -> str:
    """Return what is wrong with an answer, as one short line."""
    return shown(f"{type(error).__name__}: {error}")


def _parse_file(item: Mapping[str, Any]) -> HubFile:
    """A mirror may tell no size (-1 here) and no digest; what it tells must be one. The size beside that of an LFS
    object is the same, or of the pointer that git keeps in its place."""
    lfs = item.get("lfs") or {}
    size, sha256, blob_id = lfs.get("size", item.get("size")), lfs.get("sha256"), item.get("blobId") or ""
    file = HubFile(item["rfilename"], -1 if size is None else size, blob_id, sha256, item.get("etag") or "")
    fine = type(file.size) is int and -1 <= file.size <= MOST_BYTES
    if not fine or (file.etag and not DIGEST.fullmatch(file.etag)) or (sha256 and len(sha256) != 64):
        raise TypeError(f"{file.path!r} has the size {str(file.size)[:80]} and the digest {file.etag[:80]!r}")
    if lfs and item.get("size") not in (None, file.size, lfs.get("pointerSize")):
        raise TypeError(f"{file.path!r} has the sizes {str(item['size'])[:80]} and {file.size}")
    return file


def as_listing(repository: Repository) -> dict[str, Any]:
    """Return what a plan reads of the Hub's model info, and nothing else that a server may have put there."""
    told = {"sha": repository.commit, "siblings": [_as_sibling(file) for file in repository.files]}
    told |= {"library_name": repository.library} if repository.library else {}
    told |= {"id": repository.renamed} if repository.renamed else {}
    return told | ({"safetensors": {"parameters": repository.elements}} if repository.elements is not None else {})


def _as_sibling(file: HubFile) -> dict[str, Any]:
    sibling = {"rfilename": file.path, "size": file.size, "blobId": file.blob_id}
    sibling |= {"etag": file.mark} if file.mark else {}
    return sibling | ({"lfs": {"sha256": file.sha256, "size": file.size}} if file.sha256 else {})


def _parse_counts(told: Any) -> dict[str, int] | None:
    """Only a cross-check, so counts that are none are left out, not refused."""
    counts = told.get("parameters") if isinstance(told, Mapping) else None
    if not isinstance(counts, Mapping):
        return None
    plain = all(
        DTYPE.fullmatch(name) and type(count) is int and 0 <= count <= MOST_BYTES for name, count in counts.items()
    )
    return dict(counts) if plain else None
