"""Reshards, converts or casts a checkpoint: its byte ranges through reused buffers, without torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from bigpipe.bigmodel.checkpoint import (
    CASTABLE,
    SAFETENSORS_NAMES,
    Checkpoint,
    Format,
    ModelDescription,
    describe_opened,
)
from bigpipe.bigmodel.formats import castable
from bigpipe.errors import UsageError
from bigpipe.machine import cores
from bigpipe.passing import NOBODY, Outlet

from .containers import container
from .plans import NAMES, PlannedTensor, ShardPlan, plan_shards
from .ranges import RangeReader, is_cast
from .sidefiles import carry_side_files, config_with_dtype
from .writer import ReportProgress, SavedCheckpoint, Traffic, write_checkpoint

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name → (torch dtype name, shape)."""
WORKERS = 4
"""Files written side by side at most, one per core: one sha256 is slower than a disk. Each takes about 20 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """How weights are written anew."""

    max_shard_size: int
    """Bytes of a file, unless one tensor alone has more."""
    dtype: str | None = None
    """Of floating-point tensors; None: as they are."""
    format: Format = "safetensors"

    def plans(self, tensors: Tensors, tied: Mapping[str, str]) -> list[ShardPlan]:
        """Return the files of tensors of these (dtype, shape). Raise UsageError for what cannot be written."""
        if self.dtype is not None and self.dtype not in CASTABLE:
            raise UsageError(f"dtype {self.dtype} cannot be cast to", f"choose one of {', '.join(sorted(CASTABLE))}")
        if self.format not in NAMES:
            raise UsageError(f"format {self.format!r} is not known", f"choose one of {', '.join(NAMES)}")
        planned = [
            PlannedTensor(name, self.dtype if self.dtype and is_cast(stored, self.dtype) else stored, shape)
            for name, (stored, shape) in tensors.items()
        ]
        odd = next((tensor for tensor in planned if tensor.dtype not in SAFETENSORS_NAMES), None)
        if odd is not None and self.format == "safetensors":
            cure = "write format: bin, or cast the tensor first"
            raise UsageError(f"tensor {odd.name!r}: safetensors has no {odd.dtype}", cure)
        return plan_shards(planned, self.max_shard_size, self.format, tied)

    def of(self, source: ModelDescription) -> tuple[list[ShardPlan], ModelDescription]:
        """Return the files that `source` becomes, whose tensors are known, and the checkpoint they make.

        Raise UsageError for what cannot be cast or written.
        """
        if self.dtype is not None:
            castable(source, self.dtype)
        plans, config = self.plans(source.tensors or {}, source.tied), source.config
        if self.dtype is not None and config is not None:
            config = config_with_dtype(config, self.dtype)
        return plans, replace(
            source,
            config=config,
            tensors={tensor.name: (tensor.dtype, tensor.shape) for plan in plans for tensor in plan.tensors},
            format=self.format,
            tied=source.tied if self.format == "bin" else {},
        )


def planned_bytes(plans: Iterable[ShardPlan]) -> int:
    """Bytes of the planned weight files, headers included."""
    return sum(container(plan).size for plan in plans)


def convert(
    checkpoint: Checkpoint,
    out: Path,
    conversion: Conversion,
    *,
    linked: bool = False,
    progress: ReportProgress | None = None,
    journal: Path | None = None,
    outlet: Outlet = NOBODY,
) -> SavedCheckpoint:
    """Write a checkpoint's weights anew into `out`, with its config, tokenizer and other files.

    A cast changes the config too. Aliases of tied weights are dropped in safetensors and kept as shared storages in
    `.bin`. linked: the other files become links. `journal` as in `write_checkpoint`, `outlet` as in `Traffic`.
    """
    refuse_in_place(checkpoint, out)
    plans, converted = conversion.of(describe_opened(checkpoint))
    config = converted.config if conversion.dtype else None
    carried = carry_side_files(checkpoint, out, config=config, linked=linked)
    sources = {plan.file: {checkpoint.tensors[tensor.name].file for tensor in plan.tensors} for plan in plans}

    def fingerprint(file: str) -> str:
        return repr(sorted((source.name, checkpoint.identity(source)) for source in sources[file]))

    with RangeReader(checkpoint) as reader:
        saved = write_checkpoint(
            out,
            plans,
            reader.produce,
            metadata={"format": checkpoint.metadata.get("format", "pt")},
            journal=journal,
            fingerprint=fingerprint,
            workers=min(WORKERS, cores()),
            sources=sources,
            traffic=Traffic(progress, outlet, checkpoint.inlet, reader.close),
        )
    return replace(saved, files={**saved.files, **carried})


def refuse_in_place(checkpoint: Checkpoint, out: Path) -> None:
    """Raise UsageError where `out` is the directory of the checkpoint, by whatever name."""
    directory = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    if os.path.realpath(directory) == os.path.realpath(out):
        raise UsageError(
            f"{out}: is where the source is", "write to another directory; a checkpoint is never changed in place"
        )
