"""Byte ranges of one file on the Hub, kept: what has been fetched is not fetched twice."""

from __future__ import annotations

from dataclasses import dataclass, field

from bigpipe.bigmodel.checkpoint import FETCH_AGAIN, invalid

from .repository import Hub, HubFile, read_range

MAX_RANGE = 128 * 2**20
"""Bytes of one request. A header has at most 100 MB; nothing here reads weights."""


@dataclass(slots=True)
class RangeSource:
    """A `ByteSource` over HTTP. At least `guess` bytes are fetched where a read begins, to save round trips."""

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
