"""What a remote store says of a key. Whoever may write there chose it, so it may say anything: what is not of this
shape, or contradicts itself, is refused. Whether it is true nobody can tell by looking at it (docs/reliability.md)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

from bigpipe.files import Damaged, is_partial, seal, unseal
from bigpipe.names import is_text

from .artifacts import KeyRecord, artifact_digest
from .hashing import canonical
from .layout import is_hex

LARGEST = 16 * 2**20
"""Bytes of a record: 100,000 files take about 12 MB."""
MOST_FILES = 100_000
LONGEST_NAME, LONGEST_PART = 1024, 255
"""Characters of a path, bytes of one name in it."""
DEEPEST = 32
"""Levels of maps and lists in metrics."""
Size = Annotated[StrictInt, Field(ge=0, le=2**53)]
Seconds = Annotated[StrictFloat | StrictInt, Field(ge=0, lt=1e12)]
Word = Annotated[StrictStr, Field(max_length=200)]


class Wrong(Exception):
    """What a remote store gave is not what it should be."""


class ClaimedFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    sha256: StrictStr
    size: Size


class Claim(BaseModel):
    """What a computation gave, as a remote store has it: nothing of who did it, or where."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
    key: StrictStr
    kind: Word
    digest: StrictStr | None
    artifact_type: Word
    metrics: dict[StrictStr, Any]
    files: dict[StrictStr, ClaimedFile] = Field(max_length=MOST_FILES)
    kept: StrictBool
    """Its files are there. False for `cache: false`: the digest, the metrics and the sizes are all that is told."""
    seconds: Seconds
    peak_rss: Size
    tools: dict[Word, Word] = Field(max_length=100)

    @classmethod
    def of(cls, record: KeyRecord, *, kept: bool) -> Claim:
        """Return what is told of a record of this store."""
        shared = {name: getattr(record, name) for name in cls.model_fields if name != "kept"}
        return cls.model_validate({**shared, "artifact_type": record.artifact_type or "", "kept": kept})

    def sealed(self) -> bytes:
        return seal(self.model_dump(mode="json"))

    def recorded(self, record: KeyRecord) -> KeyRecord:
        """Return `record`, which says what was asked for, with what came out."""
        told = self.model_dump(mode="json", exclude={"kept", "key", "kind"})
        return record.model_copy(update=told)


def read_claim(content: bytes, key: str) -> Claim:
    """Return what a record of a remote store says of `key`. Raise Wrong for one that is damaged, of another key, too
    large, or that no store could have written."""
    if len(content) > LARGEST:
        raise Wrong(f"it is larger than {LARGEST} bytes")
    try:
        claim = Claim.model_validate(unseal(content))
    except Damaged:
        raise Wrong("it is damaged") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise Wrong(f"it is no record: {place[:80]}: {first['msg'][:120]}") from None
    if claim.key != key:
        raise Wrong("it is that of another key")
    _check(claim)
    return claim


def _check(claim: Claim) -> None:
    listed = {name: (file.sha256, file.size) for name, file in claim.files.items()}
    try:
        canonical(claim.metrics)
        digest = artifact_digest(listed)
    except (ValueError, TypeError, RecursionError):
        raise Wrong("it holds values that no record has") from None
    if _is_deep(claim.metrics):
        raise Wrong(f"its metrics are nested more than {DEEPEST} levels")
    if not all(is_hex(sha256) for sha256, _ in listed.values()):
        raise Wrong("its files have no sha256")
    for name in listed:
        if not _is_name(name, listed):
            raise Wrong(f"a file in it has a name that no artifact's file has: {name[:80]!r}")
    if (claim.digest or listed or claim.artifact_type) and (claim.digest != digest or not claim.artifact_type):
        raise Wrong("its digest is not that of its files")


def _is_deep(value: Any, levels: int = 0) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > DEEPEST or any(_is_deep(each, levels + 1) for each in inner)


def _is_name(name: str, others: dict[str, tuple[str, int]]) -> bool:
    """Could a file of an artifact be called this, and lie within the artifact, beside all others?"""
    parts = name.split("/")
    above = ("/".join(parts[:depth]) for depth in range(1, len(parts)))
    return (
        0 < len(name) <= LONGEST_NAME
        and is_text(name)
        and not {"", ".", ".."} & set(parts)
        and not any(is_partial(part) or len(part.encode()) > LONGEST_PART for part in parts)
        and not any(folder in others for folder in above)
    )
