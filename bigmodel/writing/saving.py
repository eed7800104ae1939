"""One way to save a checkpoint, whether it lies on disk or in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bigpipe.bigmodel.checkpoint import Checkpoint, Format, open_checkpoint
from bigpipe.sizes import size_of

from .conversion import convert
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
    """Write a checkpoint, resharded, converted or cast, into the directory `out`.

    source: a checkpoint on disk, which goes there with its config, tokenizer and other files (streamed in constant
    memory, without torch; see `conversion.convert`), or a torch module or a state dict (see `modules.save_module`).
    Raise InvalidCheckpoint, UsageError, DoesNotFit.
    """
    out, limit = Path(out), size_of("max_shard_size", max_shard_size)
    if not isinstance(source, str | Path | Checkpoint):
        from .modules import save_module

        return save_module(source, out, max_shard_size=limit, dtype=dtype, format=format, progress=progress)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    return convert(checkpoint, out, max_shard_size=limit, dtype=dtype, format=format, progress=progress)
