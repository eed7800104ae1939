"""What a model needs in memory, per dtype, before a byte of its weights moves.

    >>> print(bigpipe.estimate("facebook/opt-13b", dtypes=["int8"], batch_size=4, memory="16GiB").render())

`look` finds what the model is from headers, `architecture_of` its modules, `budget` the bytes of one dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bigpipe.errors import UsageError
from bigpipe.sizes import parse_size

from .architecture import Architecture
from .budget import Budget, Workload, budget, capped_length
from .description import ModelDescription
from .footprint import WIDTHS
from .hub import Hub
from .inquiry import Head
from .sighting import Sighting, Sources, architecture_of, look

SCHEMA = "bigpipe.estimate/1"
DTYPES = ("float32", "float16", "int8", "int4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What would have to be different for a model to fit."""

    option: str
    """As it is written on the command line: `--batch-size 1`. Empty: as asked for."""
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    memory: int
    fits: bool
    """Also at the upper end of what is not exact."""
    change: Change | None
    """The smallest change that fits; None where it fits, or nothing here would."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    model: str
    revision: str | None
    source: str
    """headers or config."""
    fetched_bytes: int
    head: Head
    workload: Workload
    """With the sequence length as capped by the model."""
    architecture: Architecture = field(repr=False)
    checkpoint: Mapping[str, Any] | None
    """Of the weights as they are stored now: bytes, format, elements per dtype, quantization."""
    budgets: tuple[Budget, ...]
    notes: tuple[str, ...] = ()
    memory: int | None = None

    def __getitem__(self, dtype: str) -> Budget:
        return next(found for found in self.budgets if found.dtype == dtype)

    def verdict(self, dtype: str, memory: int) -> Verdict:
        """Does it fit into `memory` bytes, and if not, what is the least that must change?"""
        if self[dtype].inference_high <= memory:
            return Verdict(memory=memory, fits=True, change=None)
        return Verdict(memory=memory, fits=False, change=self._smallest_change(dtype, memory))

    def _smallest_change(self, dtype: str, memory: int) -> Change | None:
        batch, length = self.workload.batch_size, self.workload.sequence_length
        if found := self._largest(dtype, memory, "batch_size", 1, batch - 1):
            return found
        if found := self._largest(dtype, memory, "sequence_length", 1, length - 1):
            return found
        narrower = [name for name in WIDTHS if WIDTHS[name] < WIDTHS[dtype] and name not in ("float8", "int4", "fp4")]
        for name in sorted(narrower, key=lambda name: -WIDTHS[name]):
            smaller = budget(self.architecture, name, self.workload)
            if smaller.inference_high <= memory:
                return Change(option=f"--dtypes {name}", bytes=smaller.inference_high)
        return None

    def _largest(self, dtype: str, memory: int, field_name: str, low: int, high: int) -> Change | None:
        """The largest value from low to high that fits; memory grows with it, so halving finds it."""
        best: tuple[int, int] | None = None
        while low <= high:
            middle = (low + high) // 2
            changed = Workload(**{**_fields(self.workload), field_name: middle})
            size = budget(self.architecture, dtype, changed).inference_high
            if size <= memory:
                best, low = (middle, size), middle + 1
            else:
                high = middle - 1
        option = field_name.replace("_", "-")
        return Change(option=f"--{option} {best[0]}", bytes=best[1]) if best else None

    def as_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "schema": SCHEMA,
            "model": self.model,
            "revision": self.revision,
            "source": self.source,
            "fetched_bytes": self.fetched_bytes,
            "class": self.architecture.class_name,
            "head": self.head,
            **_fields(self.workload),
            "checkpoint": dict(self.checkpoint) if self.checkpoint else None,
            "notes": list(self.notes),
            "dtypes": {found.dtype: found.as_json() for found in self.budgets},
        }
        if self.memory is not None:
            data["memory"] = self.memory
            for found in self.budgets:
                verdict = self.verdict(found.dtype, self.memory)
                change = {"option": verdict.change.option, "bytes": verdict.change.bytes} if verdict.change else None
                data["dtypes"][found.dtype]["fits"] = verdict.fits
                data["dtypes"][found.dtype]["smallest_change"] = change
        return data

    def metrics(self) -> dict[str, Any]:
        """Per dtype, the numbers that gates read."""
        return {found.dtype: found.metrics() for found in self.budgets}

    def render(self) -> str:
        """For a terminal; see `estimate_text`."""
        from .estimate_text import render

        return render(self)


def _fields(workload: Workload) -> dict[str, Any]:
    return {name: getattr(workload, name) for name in workload.__slots__}


def estimate(
    model: str | Path,
    *,
    dtypes: Sequence[str] | None = None,
    head: Head = "auto",
    batch_size: int = 1,
    sequence_length: int = 2048,
    library_name: str | None = None,
    revision: str = "main",
    memory: int | str | None = None,
    double_quant: bool = False,
    lora_rank: int = 8,
    gradient_checkpointing: bool = False,
    trust_modules: Sequence[str] = (),
    trust_remote_code: bool = False,
    base: Path | None = None,
    memo: Path | None = None,
    offline: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Estimate:
    """An estimate for a repository (`owner/name` or its address), a checkpoint directory, or a bare `config.json`.

    dtypes: of `float32 float16 bfloat16 float8 int8 int4 nf4 fp4`; int4 is accelerate's word for any 4-bit format.
    head: auto is the class the config names; none is the bare model, which is what accelerate counts.
    sequence_length: capped at what the model's positions allow.
    memory: bytes or `24GiB`; the estimate then says whether each dtype fits, and the smallest change that does.
    memo: where answers are kept; what is known of a commit is not fetched again, and a class is built once.

    No weight moves, and torch is not imported here. Raises UsageError, InvalidCheckpoint, Offline, NotAuthorised,
    GatedRepository, Transient, each with its cure.
    """
    workload = Workload(
        batch_size=batch_size, sequence_length=sequence_length, double_quant=double_quant, lora_rank=lora_rank,
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip
    sources = Sources(
        memo=memo, hub=Hub.from_environment(environment, offline=offline), modules=trust_modules, base=base,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    sighting = look(model, revision, sources, library_name)
    made = estimate_sighting(sighting, dtypes=dtypes, head=head, workload=workload, sources=sources)
    return replace(made, memory=None if memory is None else _size(memory))


def _size(memory: int | str) -> int:
    try:
        return parse_size(memory)
    except ValueError as error:
        raise UsageError(f"memory: {error}") from error


def estimate_sighting(
    sighting: Sighting,
    *,
    dtypes: Sequence[str] | None = None,
    head: Head = "auto",
    workload: Workload,
    sources: Sources,
) -> Estimate:
    """An estimate for a model that has been looked at."""
    wanted = tuple(dict.fromkeys(dtypes or DTYPES))
    if unknown := [dtype for dtype in wanted if dtype not in WIDTHS]:
        raise UsageError(f"dtype {unknown[0]!r} is not known to estimate", f"use {', '.join(WIDTHS)}")
    architecture, notes = architecture_of(sighting, head, sources)
    length = capped_length(architecture, workload.sequence_length)
    capped = replace(workload, sequence_length=length)
    return Estimate(
        model=sighting.name,
        revision=sighting.revision,
        source=sighting.source,
        fetched_bytes=sighting.fetched_bytes,
        head=head,
        workload=capped,
        architecture=architecture,
        checkpoint=_checkpoint(sighting.description),
        budgets=tuple(budget(architecture, dtype, capped) for dtype in wanted),
        notes=notes,
    )


def _checkpoint(description: ModelDescription) -> dict[str, Any] | None:
    if description.tensors is None:
        return None
    dtypes: dict[str, int] = {}
    for dtype, shape in description.tensors.values():
        count = 1
        for size in shape:
            count *= size
        dtypes[dtype] = dtypes.get(dtype, 0) + count
    method = (description.quantization or {}).get("quant_method")
    return {
        "bytes": description.nbytes, "format": description.format, "dtypes": dtypes,
        "quantization": str(method) if method else None,
    }  # fmt: skip
