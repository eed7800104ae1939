"""The plain values that travel between the parts of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from operator import index
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from bigpipe.fit import Misfit as Misfit
from bigpipe.machine import Gpu as Gpu, Machine as Machine
from bigpipe.sizes import counted
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
    """What is known of one node that is done, or is followed while it runs; a node sees that of all its ancestors,
    nearest last."""

    node: str
    kind: str
    key: str
    digest: str | None
    params: Mapping[str, Json]
    metrics: Mapping[str, Json]
    """Empty while the node still runs."""
    left: str = ""
    """The gates that do not hold, of one whose variant was left for another."""
    inputs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Port → nodes; where it takes the `first` variant that passes, all of these."""
    pins: Mapping[str, str] = field(default_factory=dict)
    """Field path → what floated there, made exact: known before the node is done."""


def _not_bool(value: Json) -> Json:
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is not a whole number; write 1 or 0, or quote it where text is meant")
    return value


Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, BeforeValidator(_not_bool)]
"""A whole number; also as text, which is what `${env.N:-2}` gives."""


MOST_RANKS = 2**16


class Launch(BaseModel):
    """How ranks are started; the names are accelerate's. Keys written here override those of `config_file`."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    num_processes: Count = Field(default=1, ge=1, le=MOST_RANKS, description="Ranks over all machines.")
    num_machines: Count = Field(default=1, ge=1, le=MOST_RANKS, description="Machines that share the ranks.")
    machine_rank: Count = Field(default=0, ge=0, description="Which of them this one is, from 0.")
    main_process_ip: Text | None = Field(default=None, description="The address of machine 0.")
    main_process_port: Count | None = Field(default=None, ge=1, le=65535, description="A free port there.")
    config_file: Text | None = Field(default=None, description="An accelerate config file, relative to the manifest.")
    mixed_precision: Literal["no", "fp16", "bf16", "fp8"] | None = Field(
        default=None, description="What accelerate tells the ranks; refused where a kind has a dtype of its own."
    )
    max_restarts: Count = Field(
        default=3, ge=0, description="How often ranks that died are replaced, where a kind goes on after that."
    )

    join_seconds: Count = Field(default=300, ge=1, description="Until all machines that a scheduler starts have come.")

    @model_validator(mode="after")
    def _machines_agree(self) -> Launch:
        if self.machine_rank >= self.num_machines:
            cause = f"machine_rank {self.machine_rank} is not one of {counted(self.num_machines, 'machine')}"
            raise ValueError(f"{cause}; ranks of machines count from 0")
        return self

    @property
    def local_processes(self) -> int:
        """Ranks on each machine."""
        return self.num_processes // self.num_machines

    @property
    def local_ranks(self) -> range:
        """The global ranks on this machine."""
        first = self.machine_rank * self.local_processes
        return range(first, first + self.local_processes)


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
    vram: Mapping[int, int] | None = None
    """Peak per GPU index; empty: it uses none."""
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

    def __post_init__(self) -> None:
        """Make sizes whole numbers, numpy's too. Raise TypeError for what is none."""
        for name in ("download_bytes", "write_bytes", "file_bytes", "works_on", "ram"):
            if (given := getattr(self, name)) is not None and type(given) is not int:
                object.__setattr__(self, name, _whole(name, given))
        if self.vram:
            if not isinstance(self.vram, Mapping):
                raise TypeError(f"Forecast: vram is {self.vram!r}, and not GPU index → bytes")
            vram = {index(gpu): _whole(f"vram[{gpu}]", size) for gpu, size in self.vram.items()}
            object.__setattr__(self, "vram", vram)


def _whole(name: str, size: Any) -> int:
    if isinstance(size, str | bytes) or not hasattr(size, "__int__"):
        raise TypeError(f"Forecast: {name} is {size!r}, and not a number of bytes")
    return int(size)
