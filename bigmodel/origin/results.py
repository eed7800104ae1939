"""What came of recomputing a published model, file by file, for people and programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bigpipe.errors import StageFailed, first_few
from bigpipe.sizes import counted, format_transfer
from bigpipe.tables import columns

SCHEMA = "bigpipe.reproduce/1"
SHOWN = 20
"""Differences that are printed for people; programs get all."""

What = Literal["bytes", "dtype", "shape", "missing", "extra", "text"]
Became = Literal["equal", "different", "not recomputed"]


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor, or a file beside the weights, that is not what the source gives."""

    name: str
    """Of the tensor, or "" for a whole file."""
    file: str
    """Relative path of the file that holds it; "" for a tensor that is not there."""
    what: What
    detail: str

    def __str__(self) -> str:
        named = f"{self.name} in {self.file}" if self.name and self.file else self.name or self.file
        return f"{named}: {self.detail}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedFile:
    """One file of a published model."""

    name: str
    """Relative path."""
    became: Became
    bytes: int
    """Of a weight file: of its tensors, without the header, which was read."""
    equal_bytes: int
    """Of these, those that were recomputed and are the same."""
    tensors: int = 0
    """Of a weight file: how many it holds."""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Reproduction:
    """A published model beside what its source gives."""

    published: str
    """A repository, or a path."""
    commit: str | None
    """Of the repository."""
    source: str
    """A repository, or a path."""
    source_commit: str | None
    """Of the repository."""
    pinned: bool
    """The source's commit is on record, or was named; else it is what the repository holds today."""
    scheme: str
    """int8, nf4 or fp4."""
    files: tuple[ComparedFile, ...]
    differences: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Are all tensors, and the files that are known to the byte, what the source gives?"""
        return not self.differences

    @property
    def error(self) -> StageFailed | None:
        """Return why it is not proven; None where it is."""
        if self.equal:
            return None
        told = first_few([each.name or each.file for each in self.differences], 3)
        cure = "do not use it without asking who published it" + ("" if self.pinned else ", and of which commit it is")
        return StageFailed(f"{self.published} is not what {self.source} gives: {told}", cure)

    def __repr__(self) -> str:
        what = "equal" if self.equal else counted(len(self.differences), "difference")
        return f"<Reproduction of {self.published} from {self.source}: {what}>"

    def as_json(self) -> dict[str, Any]:
        """Return what `verify --reproduce --json` prints."""
        told = asdict(self) | {"files": list(map(asdict, self.files)), "notes": list(self.notes)}
        return {"schema": SCHEMA, "equal": self.equal, **told, "differences": list(map(asdict, self.differences))}

    def render(self) -> str:
        """Return it as text."""
        head = (
            f"{_at(self.published, self.commit)}, {self.scheme}, recomputed from {_at(self.source, self.source_commit)}"
        )
        rows = [[file.name, file.became, _amount(file)] for file in self.files]
        lines = [line.rstrip() for line in columns(rows).split("\n")]
        return "\n".join([head, *lines, *self._verdict(), *(f"note: {note}" for note in self.notes)])

    def _verdict(self) -> Sequence[str]:
        weights = [file for file in self.files if file.tensors]
        size = format_transfer(sum(file.equal_bytes for file in weights))
        if self.equal:
            return [f"equal: {counted(sum(file.tensors for file in weights), 'tensor')}, {size}"]
        told = [f"different: {each}" for each in self.differences[:SHOWN]]
        more = len(self.differences) - SHOWN
        return [*told, *([f"and {more} more: --json has all"] if more > 0 else []), f"equal: {size} of the weights"]


def _amount(file: ComparedFile) -> str:
    if not file.tensors:
        return file.note
    return f"{counted(file.tensors, 'tensor')}, {format_transfer(file.equal_bytes)} of {format_transfer(file.bytes)}"


def _at(place: str, commit: str | None) -> str:
    return f"{place} at {commit[:12]}" if commit else place
