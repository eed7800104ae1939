"""The plain values that travel between the parts of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from bigpipe.machine import Gpu as Gpu, Machine as Machine
from bigpipe.trust import Trust as Trust

Json = Any
"""A value that `json.dumps` takes: None, bool, int, float, str, and lists and string-keyed maps of these."""


class Status(StrEnum):
    """The state of a node in a run."""

    PENDING = "pending"
    RUNNING = "running"
    CACHED = "cached"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Lineage:
    """What is known of one finished node; a node sees that of all its ancestors, nearest last."""

    node: str
    kind: str
    key: str
    digest: str | None
    params: Mapping[str, Json]
    metrics: Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class Resources:
    """What a node holds while it runs. None: derived from the forecast, else one CPU."""

    cpus: int | None = None
    ram: int | None = None
    gpus: int | None = None
    gpu_memory: int | None = None
    disk: int | None = None


@dataclass(frozen=True, slots=True)
class Launch:
    """How the ranks of a node are started; the field names are accelerate's."""

    num_processes: int = 1
    num_machines: int = 1
    machine_rank: int = 0
    main_process_ip: str | None = None
    main_process_port: int | None = None
    config_file: str | None = None
    mixed_precision: str | None = None
    explicit: frozenset[str] = field(default_factory=frozenset)
    """The keys the manifest wrote itself; these override `config_file`."""
