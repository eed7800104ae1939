"""What is known of a checkpoint without its weights: what one stage's forecast tells the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigpipe.errors import UsageError

from .files import MAX_CONFIG, read_json
from .tensors import Tensors, tensor_nbytes
from .view import Checkpoint, open_checkpoint

ARCHITECTURE_FILE = "bigpipe_architecture.json"
"""Names the Python class of a model that has no transformers config; travels inside the artifact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    config: Mapping[str, Any] | None
    tensors: Tensors | None
    """In the order of their bytes. None: not known."""
    format: str | None
    """safetensors or bin."""
    tied: Mapping[str, str]
    """Alias → stored name."""
    path: Path | None
    """Where side files (config, tokenizer, custom class) can be read, if anywhere yet."""
    custom: Mapping[str, Any] | None
    """Contents of `bigpipe_architecture.json`."""

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """`quantization_config` of the config, of the part of it that is about text, or of a custom description."""
        config = self.config or {}
        for holder in (config, config.get("text_config"), self.custom):
            for name in ("quantization_config", "compression_config"):  # the second: compressed-tensors before 2025
                found = holder.get(name) if isinstance(holder, Mapping) else None
                if isinstance(found, Mapping) and found:
                    return found
        return None

    @property
    def nbytes(self) -> int | None:
        """Bytes of all stored tensors, without headers. None where the tensors are not known."""
        if self.tensors is None:
            return None
        return sum(tensor_nbytes(dtype, shape) for dtype, shape in self.tensors.values())


def describe_checkpoint(path: str | Path) -> ModelDescription:
    """Describes a checkpoint directory from its headers. Raises InvalidCheckpoint as `open_checkpoint` does."""
    return describe_opened(open_checkpoint(path))


def describe_if_single(path: Path) -> ModelDescription | None:
    """As `describe_checkpoint`; None for what has no single checkpoint, such as a diffusers pipeline."""
    try:
        return describe_checkpoint(path)
    except UsageError:
        return None


def describe_opened(checkpoint: Checkpoint) -> ModelDescription:
    """As `describe_checkpoint`, of a checkpoint that is open."""
    file = checkpoint.path / ARCHITECTURE_FILE
    custom = read_json(file, checkpoint.path, MAX_CONFIG) if file in checkpoint.extras else None
    return ModelDescription(
        config=checkpoint.config,
        tensors={name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()},
        format=checkpoint.format,
        tied=checkpoint.tied,
        path=checkpoint.path,
        custom=custom,
    )
