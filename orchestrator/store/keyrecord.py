"""What a computation gave, by its key: the record that says an artifact exists."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from bigpipe.orchestrator.contract import Json

from .layout import Layout
from .sealing import Damaged, explained, make_directory, read_sealed, write_sealed


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

    def as_json(self) -> dict[str, Json]:
        return {name: getattr(self, name) for name in type(self).model_fields}


def load_record(layout: Layout, key: str) -> KeyRecord | None:
    """Return the record of a key; None where there is none. A damaged one goes to quarantine and is none.

    Raise BigpipeError where the file system fails.
    """
    path = layout.key(key)
    with explained(path):
        try:
            data = read_sealed(path)
            if data["key"] == key:
                known = data.keys() <= KeyRecord.model_fields.keys()  # else a later bigpipe wrote it
                return KeyRecord.model_construct(**data) if known else None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (Damaged, KeyError, TypeError):
            pass
        layout.set_aside(path)
    return None


def save_record(layout: Layout, record: KeyRecord) -> None:
    """Say durably that the computation is done; everything it names must be durable before."""
    make_directory(layout.partials)
    layout.partial(record.partial).touch()
    write_sealed(layout.key(record.key), record.as_json())


def all_records(layout: Layout) -> Iterator[KeyRecord]:
    """Return every readable record, in the order of their keys."""
    for name in sealed_names(layout.keys):
        record = load_record(layout, f"sha256:{name}")
        if record is not None:
            yield record


def sealed_names(folder: os.PathLike[str]) -> list[str]:
    """Return the hex names of the `HEX.json` files in a directory of the store, sorted."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(name[:-5] for name in names if name.endswith(".json") and len(name) == 69)
