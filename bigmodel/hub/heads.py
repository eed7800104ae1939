"""Heads of weight files: read by byte ranges, on the Hub or in a directory; and which files may pass on by theirs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.checkpoint import (
    FETCH_AGAIN,
    ByteSource,
    FileSource,
    choose_weights,
    find_weight_files,
    invalid,
    read_head,
)
from bigpipe.errors import InvalidCheckpoint, Transient

from .errors import of_cache
from .repository import READERS, HubFile, Repository, read_range

GUESS = 64 * 2**10
"""Bytes fetched at once where a safetensors header may be short."""
MAX_RANGE = 128 * 2**20
"""Bytes of one request. A header has at most 100 MB; nothing here reads weights."""


def may_pass(names: Iterable[str]) -> list[str]:
    """Return the weight files at the root, where nobody has to choose among them."""
    try:
        found = choose_weights([name for name in names if "/" not in name], "the files")
    except InvalidCheckpoint:
        return []
    return sorted(found.files) if found is not None else []


def are_the_model(weights: Sequence[str], folder: Path) -> bool:
    """Are these files, no more and no fewer, what `open_checkpoint` would read? The index lies in `folder` already."""
    try:
        found = find_weight_files(folder, weights)
    except InvalidCheckpoint:
        return False
    return {file.name for file in found.files} == set(weights)


def directory_heads(folder: Path, names: Iterable[str]) -> dict[str, tuple[bytes, int]]:
    """Return name → (head, size). Raise InvalidCheckpoint."""
    heads = {}
    for name in names:
        with FileSource(folder / name) as source:
            heads[name] = read_head(source, folder / name)
    return heads


def repository_heads(repository: Repository, files: Sequence[HubFile]) -> dict[str, tuple[bytes, int]]:
    """Return name → (head, size), from the Hub cache or by HTTP range. Raise as `describe`, and InvalidCheckpoint."""

    def read(file: HubFile) -> tuple[str, tuple[bytes, int]]:
        with reading(repository, file, GUESS) as (source, name):
            return file.path, read_head(source, name)

    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(READERS, "head") as pool:
        return dict(pool.map(read, files))


@contextmanager
def reading(repository: Repository, file: HubFile, guess: int = 0) -> Iterator[tuple[ByteSource, Path]]:
    """A file of a repository, from the Hub cache where it is whole there, else by ranges; and its name for errors.
    guess: how many bytes to fetch at once where the file's header may be short; of safetensors files only."""
    cached = repository.cached(file)
    if file.may_be(cached):
        with of_cache(cached):
            source = FileSource(cached)
        with source:
            yield source, cached
    else:
        yield RangeSource(repository, file, guess if file.path.endswith(".safetensors") else 0), Path(file.path)


def is_promised(file: HubFile, digests: Mapping[str, Any]) -> bool:
    """Return whether a content is what the listing says, by its `size` and its `sha256`, or `blob_id` (git's sha1), or
    the `sha1` of the content alone. Without any (a mirror may name blobs otherwise) by its size."""
    proofs = ["sha256"] if file.sha256 else ["blob_id"] if file.blob_id else ["blob_id", "sha1"]
    proven = file.etag in (digests.get(proof) for proof in proofs)
    unproven = not file.sha256 and len(file.etag) != 40
    return (proven or unproven) and digests["size"] == file.size


def check_content(repository: Repository, file: HubFile, content: bytes) -> None:
    """Raise Transient where a whole file that came is not what the listing promises: what is learnt of it is kept."""
    sha256, sha1 = hashlib.sha256(content), hashlib.sha1(content, usedforsecurity=False)
    git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    digests = {"sha256": sha256.hexdigest(), "sha1": sha1.hexdigest(), "blob_id": git.hexdigest(), "size": len(content)}
    if not is_promised(file, digests):
        cause = f"{file.path} of {repository.repo} came with other bytes than its digest {file.etag} promises"
        raise Transient(cause, "something in between changes them; run again, or over another network")


@dataclass(slots=True)
class RangeSource:
    """A `ByteSource` over HTTP. What was fetched is kept. At least `guess` bytes are fetched where a read begins."""

    repository: Repository
    file: HubFile
    guess: int = 0
    _kept: dict[int, bytes] = field(default_factory=dict)
    """Where a piece begins → the piece."""

    @property
    def name(self) -> str:
        repository, path = self.repository, self.repository.address(self.file)
        return f"{repository.hub.endpoint}/{repository.repo}/resolve/{repository.commit[:12]}/{path}"

    @property
    def size(self) -> int:
        return self.file.size

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > self.size:
            raise invalid(self.name, f"ends at byte {self.size}, but {offset + length} bytes are needed", FETCH_AGAIN)
        if not length:
            return b""
        begins = (start for start, piece in self._kept.items() if start <= offset <= start + len(piece))
        start = next(begins, offset)
        end = start + len(self._kept.get(start, b""))
        if end < offset + length:
            wanted = min(max(offset + length - end, self.guess), self.size - end)
            if wanted > MAX_RANGE:
                raise invalid(self.name, f"{wanted} bytes are asked of its header", FETCH_AGAIN, offset=offset)
            self._kept[start] = self._kept.pop(start, b"") + self._fetch(end, wanted)
        return self._kept[start][offset - start : offset - start + length]

    def _fetch(self, offset: int, length: int) -> bytes:
        repository = self.repository
        path = repository.address(self.file)
        content = read_range(repository.repo, repository.commit, path, offset, length, hub=repository.hub)
        if len(content) != length:
            raise invalid(self.name, f"gave {len(content)} bytes where {length} were asked", FETCH_AGAIN, offset=offset)
        return content
