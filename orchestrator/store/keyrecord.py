"""What a computation gave, by its key: the record that says an artifact exists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from bigpipe.orchestrator.contract import Json

from .artifacts import artifact_digest
from .layout import Layout
from .sealing import Damaged, make_directory, sealed_digests, write_sealed


class KeyRecord(BaseModel):
    """One finished computation. Times in seconds, memory in bytes, digests as `sha256:…`."""

    # What is read was sealed by us, so no schema is compiled to read it, only to make a new one.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    key: str
    partial: str
    """The key with the inputs left out."""
    identity: dict[str, Any]
    inputs: dict[str, list[str]] = Field(default_factory=dict)
    kind: str
    node: str
    manifest: str
    digest: str | None = None
    """Of the artifact; None for kinds without output."""
    artifact_type: str | None = None
    """None, or empty, for kinds without output."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, dict[str, str | int]] = Field(default_factory=dict)
    """Relative path → `sha256` (hex) and `size`."""
    pins: dict[str, str] = Field(default_factory=dict)
    pin_source: str = ""
    seconds: float = 0.0
    peak_rss: int = 0
    created: str = ""
    """ISO 8601 in UTC."""
    run: str = ""
    tools: dict[str, str] = Field(default_factory=dict)
    """Versions of what made it."""

    def holding(self, files: Mapping[str, tuple[str, int]]) -> KeyRecord:
        """Return the record of an artifact of these files: relative path → (sha256 in hex, size)."""
        listed = {name: {"sha256": sha256, "size": size} for name, (sha256, size) in files.items()}
        return self.model_copy(update={"digest": artifact_digest(files), "files": listed})

    def as_json(self) -> dict[str, Json]:
        return {name: getattr(self, name) for name in type(self).model_fields}


def load_record(layout: Layout, key: str) -> KeyRecord | None:
    """Return the record of a key, None where there is none, as `Layout.load` says."""

    def read(data: Json) -> KeyRecord | None:
        if data["key"] != key:
            raise Damaged
        known = data.keys() <= KeyRecord.model_fields.keys()  # else a later bigpipe wrote it
        return KeyRecord.model_construct(**data) if known else None

    return layout.load(layout.key(key), read)


def save_record(layout: Layout, record: KeyRecord) -> None:
    """Say durably that the computation is done; everything it names must be durable before."""
    make_directory(layout.partials)
    layout.partial(record.partial).touch()
    write_sealed(layout.key(record.key), record.as_json())


def all_records(layout: Layout) -> Iterator[KeyRecord]:
    """Return every readable record, in the order of their keys."""
    for key in sealed_digests(layout.keys):
        if record := load_record(layout, key):
            yield record
