"""Reshards, converts or casts a checkpoint: its byte ranges through reused buffers, without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bigpipe.bigmodel.checkpoint import CASTABLE, SAFETENSORS_NAMES, Checkpoint, Format, describe_opened
from bigpipe.bigmodel.formats import castable
from bigpipe.errors import UsageError
from bigpipe.passing import NOBODY, Outlet

from .casting import is_cast
from .containers import container
from .plans import NAMES, PlannedTensor, ShardPlan, laid_out, plan_shards
from .ranges import RangeReaders
from .sidefiles import carry_side_files, config_with_dtype
from .writer import METADATA, ReportProgress, SavedCheckpoint, Traffic, write_checkpoint

WORKERS = 4
"""Files written side by side at most, one per core: one sha256 is slower than a disk. Each takes about 20 MB."""


def plan_conversion(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    tied: Mapping[str, str],
    *,
    max_shard_size: int,
    dtype: str | None = None,
    format: Format = "safetensors",
) -> list[ShardPlan]:
    """The files that `convert` writes for tensors of these (dtype, shape). UsageError for what cannot be written."""
    if dtype is not None and dtype not in CASTABLE:
        raise UsageError(f"dtype {dtype} cannot be cast to", f"choose one of {', '.join(sorted(CASTABLE))}")
    if format not in NAMES:
        raise UsageError(f"format {format!r} is not known", f"choose one of {', '.join(NAMES)}")
    planned = []
    for name, (stored, shape) in tensors.items():
        kept = dtype if dtype is not None and is_cast(stored, dtype) else stored
        if format == "safetensors" and kept not in SAFETENSORS_NAMES:
            raise UsageError(
                f"tensor {name!r}: safetensors has no {kept}", "write format: bin, or cast the tensor first"
            )
        planned.append(PlannedTensor.of(name, kept, shape))
    return plan_shards(planned, max_shard_size, format, tied)


def planned_bytes(plans: Sequence[ShardPlan], format: Format) -> int:
    """Bytes of the planned weight files, headers included."""
    return sum(container(plan, format, METADATA, "sorted").size for plan in plans)


def convert(
    checkpoint: Checkpoint,
    out: Path,
    *,
    max_shard_size: int,
    dtype: str | None = None,
    format: Format = "safetensors",
    linked: bool = False,
    progress: ReportProgress | None = None,
    journal: Path | None = None,
    outlet: Outlet = NOBODY,
) -> SavedCheckpoint:
    """Write a checkpoint's weights anew into `out`, with its config, tokenizer and other files.

    `dtype` changes floating-point tensors only, and the config. Aliases of tied weights are dropped in safetensors and
    kept as shared storages in `.bin`. linked: the other files become links. `journal` as in `write_checkpoint`,
    `outlet` as in `Traffic`.
    """
    refuse_in_place(checkpoint, out)
    if dtype is not None:
        castable(describe_opened(checkpoint), dtype)
    stored = {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}
    plans = plan_conversion(stored, checkpoint.tied, max_shard_size=max_shard_size, dtype=dtype, format=format)
    if format == "safetensors":
        # In the order of the file, so that it is hashed in passing.
        plans = [ShardPlan(plan.file, tuple(laid_out(plan, "sorted"))) for plan in plans]
    config = config_with_dtype(checkpoint.config, dtype) if dtype and checkpoint.config is not None else None
    carried = carry_side_files(checkpoint, out, config=config, linked=linked)
    sources = {plan.file: {checkpoint.tensors[tensor.name].file for tensor in plan.tensors} for plan in plans}

    def fingerprint(file: str) -> str:
        return repr(sorted((source.name, checkpoint.identity(source)) for source in sources[file]))

    with RangeReaders(checkpoint, dtype) as readers:
        saved = write_checkpoint(
            out,
            plans,
            readers.produce,
            metadata={"format": checkpoint.metadata.get("format", "pt")},
            format=format,
            journal=journal,
            fingerprint=fingerprint,
            workers=min(WORKERS, cores()),
            sources=sources,
            traffic=Traffic(progress, outlet, checkpoint.inlet, readers.close),
        )
    return replace(saved, files={**saved.files, **carried})


def refuse_in_place(checkpoint: Checkpoint, out: Path) -> None:
    """Raise UsageError where `out` is the directory of the checkpoint, by whatever name."""
    directory = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    if os.path.realpath(directory) == os.path.realpath(out):
        raise UsageError(
            f"{out}: is where the source is", "write to another directory; a checkpoint is never changed in place"
        )


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
