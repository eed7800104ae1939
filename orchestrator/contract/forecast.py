"""What a node will cost and give, before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigpipe.fit import Misfit as Misfit

from .types import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a node will cost and give, known before it runs. None means unknown. Sizes in bytes."""

    download_bytes: int | None = None
    """Over the network."""
    write_bytes: int | None = None
    """New bytes in the store."""
    file_bytes: int = 0
    """Of the largest of the files that others may take one by one as they are made."""
    works_on: int = 0
    """Bytes of its input that are between begun and done at a time, where it takes files one by one; 0: one file."""
    fetches_to: Path | None = None
    """Where what is downloaded stays, if that is not the store."""
    ram: int | None = None
    """Peak of all its processes, besides the page cache."""
    vram: Mapping[int, int] = field(default_factory=dict)
    """Peak per GPU index."""
    seconds: float | None = None
    """By the kind's own reckoning. What was recorded of a run with the same params counts for more."""
    metrics: Mapping[str, Json] = field(default_factory=dict)
    """Those metrics that are known now, with the values the run will give; gates on them are decided now."""
    output: Any = None
    """A description of the output for the next node's forecast; its type is the kinds' own affair."""
    unknown: tuple[str, ...] = ()
    """Facts that could not be had, each a sentence: `size of facebook/opt-13b: the Hub cannot be reached`."""
    misfits: tuple[Misfit, ...] = ()
    summary: str = ""
    """One line for people: `6 shards, +25.7 GB`."""
    details: tuple[str, ...] = ()
    """Lines for those who ask for more: which part of a model goes on which device."""
