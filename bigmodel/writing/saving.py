"""One way to save a checkpoint, whether it lies on disk or in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bigpipe.bigmodel.checkpoint.files import Format
from bigpipe.bigmodel.checkpoint.view import Checkpoint
from bigpipe.sizes import size_of

from . import writer
from .writer import ReportProgress, SavedCheckpoint


def save_checkpoint(
    source: str | Path | Checkpoint | Any,
    out: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
    format: Format = "safetensors",
    progress: ReportProgress | None = None,
) -> SavedCheckpoint:
    """Writes a checkpoint, resharded, converted or cast, into the directory `out`.

    source: a checkpoint on disk (streamed in constant memory, without torch; see `writer.save_checkpoint`), or a torch
    module or a state dict (see `modules.save_module`).
    Raises InvalidCheckpoint, UsageError, DoesNotFit.
    """
    if isinstance(source, str | Path | Checkpoint):
        return writer.save_checkpoint(
            source, out, max_shard_size=max_shard_size, dtype=dtype, format=format, progress=progress
        )
    from .modules import save_module

    limit = size_of("max_shard_size", max_shard_size)
    return save_module(source, Path(out), max_shard_size=limit, dtype=dtype, format=format, progress=progress)
