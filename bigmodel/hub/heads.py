"""Heads of weight files: read by byte ranges, on the Hub or in a directory; and which files may pass on by theirs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bigpipe.bigmodel.checkpoint import (
    BIN_SUFFIXES,
    FETCH_AGAIN,
    NOT_A_MODEL,
    ByteSource,
    FileSource,
    files_to_come,
    format_of,
    invalid,
    read_head,
)
from bigpipe.errors import InvalidCheckpoint

from .repository import Hub, HubFile, Repository, read_range

READERS = 8
"""Headers read at a time."""
GUESS = 64 * 2**10
"""Bytes fetched at once where a safetensors header may be short."""
MAX_RANGE = 128 * 2**20
"""Bytes of one request. A header has at most 100 MB; nothing here reads weights."""


def may_pass(names: Iterable[str]) -> list[str]:
    """The weight files at the root, where they all have one format."""
    root = sorted(name for name in names if "/" not in name)
    found = [name for name in root if name.endswith((".safetensors", *BIN_SUFFIXES)) and not NOT_A_MODEL.match(name)]
    return found if len({format_of(Path(name)) for name in found}) == 1 else []


def are_the_model(weights: Sequence[str], folder: Path) -> bool:
    """Are these files, no more and no fewer, what `open_checkpoint` would read? The index lies in `folder` already."""
    try:
        found = files_to_come(folder, weights)
    except InvalidCheckpoint:
        return False
    return {file.name for file in found.files} == set(weights)


def directory_heads(folder: Path, names: Iterable[str]) -> dict[str, tuple[bytes, int]]:
    """Name → (head, size). Raises InvalidCheckpoint."""
    heads = {}
    for name in names:
        with FileSource(folder / name) as source:
            heads[name] = read_head(source, folder / name)
    return heads


def repository_heads(repository: Repository, files: Sequence[HubFile], hub: Hub) -> dict[str, tuple[bytes, int]]:
    """Name → (head, size), from the Hub cache or by HTTP range. Raises InvalidCheckpoint, Transient, Offline…"""

    def read(file: HubFile) -> tuple[str, tuple[bytes, int]]:
        with reading(hub, repository, file, GUESS) as (source, name):
            return file.path, read_head(source, name)

    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(READERS, "head") as pool:
        return dict(pool.map(read, files))


@contextmanager
def reading(hub: Hub, repository: Repository, file: HubFile, guess: int = 0) -> Iterator[tuple[ByteSource, Path]]:
    """A file of a repository, from the Hub cache where it is whole there, else by ranges; and its name for errors.

    guess: how many bytes to fetch at once where the file's header may be short; of safetensors files only.
    """
    cached = hub.folder(repository.repo) / "snapshots" / repository.commit / file.path
    if cached.is_file() and cached.stat().st_size == file.size:
        with FileSource(cached) as source:
            yield source, cached
    else:
        guess = guess if file.path.endswith(".safetensors") else 0
        yield RangeSource(hub, repository.repo, repository.commit, file, guess), Path(file.path)


@dataclass(slots=True)
class RangeSource:
    """A `ByteSource` over HTTP. What was fetched is kept. At least `guess` bytes are fetched where a read begins."""

    hub: Hub
    repo: str
    commit: str
    file: HubFile
    guess: int = 0
    _kept: list[tuple[int, bytes]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.hub.endpoint}/{self.repo}/resolve/{self.commit[:12]}/{self.file.path}"

    @property
    def size(self) -> int:
        return self.file.size

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > self.size:
            raise invalid(self.name, f"ends at byte {self.size}, but {offset + length} bytes are needed", FETCH_AGAIN)
        end = self._covered(offset)
        if end < offset + length:
            wanted = min(max(offset + length - end, self.guess), self.size - end)
            if wanted > MAX_RANGE:
                raise invalid(self.name, f"{wanted} bytes are asked of its header", FETCH_AGAIN, offset=offset)
            self._fetch(end, wanted)
        return self._cut(offset, length)

    def _fetch(self, offset: int, length: int) -> None:
        content = read_range(self.repo, self.commit, self.file.path, offset, length, hub=self.hub)
        if len(content) != length:
            raise invalid(self.name, f"gave {len(content)} bytes where {length} were asked", FETCH_AGAIN, offset=offset)
        self._kept.append((offset, content))
        self._kept.sort()

    def _covered(self, offset: int) -> int:
        """Where the run of kept bytes that holds `offset` ends; `offset` itself where none does."""
        end = offset
        for start, content in self._kept:
            if start <= end < start + len(content):
                end = start + len(content)
        return end

    def _cut(self, offset: int, length: int) -> bytes:
        pieces = bytearray()
        for start, content in self._kept:
            position = offset + len(pieces)
            if start <= position < start + len(content):
                pieces += content[position - start : offset + length - start]
        return bytes(pieces)
