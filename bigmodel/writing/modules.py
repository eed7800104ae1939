"""Saves a model that is in memory: what accelerate's `save_model` does, written by the streaming writer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.checkpoint import CASTABLE, CHUNK, Format
from bigpipe.errors import UsageError

from .conversion import plan_conversion
from .plans import PlannedTensor
from .writer import ReportProgress, SavedCheckpoint, Traffic, write_checkpoint

if TYPE_CHECKING:
    import torch


def save_module(
    source: torch.nn.Module | Mapping[str, Any],
    out: Path,
    *,
    max_shard_size: int,
    dtype: str | None = None,
    format: Format = "safetensors",
    progress: ReportProgress | None = None,
) -> SavedCheckpoint:
    """Writes the weights of a module, or of its state dict, into `out`; a transformers model's config too.

    Names that share storage are stored once: dropped in safetensors, kept as shared in `.bin`. Tensors are copied one
    at a time, and only if they are not contiguous, not on the CPU, or cast. UsageError for tensors without data.
    """
    state = source if isinstance(source, Mapping) else source.state_dict()
    tensors, tied = _unique(state)
    described = {name: (_dtype(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()}
    plans = plan_conversion(described, tied, max_shard_size=max_shard_size, dtype=dtype, format=format)
    saved = write_checkpoint(
        out,
        plans,
        lambda planned: _pieces(tensors[planned.name], planned),
        format=format,
        traffic=Traffic(progress),
    )
    config = getattr(source, "config", None)
    if hasattr(config, "save_pretrained"):
        _save_config(source, config, dtype, out)
    return saved


def _unique(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors that are stored, and alias → stored name."""
    import torch

    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        if isinstance(tensor, str):
            continue  # bitsandbytes keeps the name of a layout among its weights; the Hub's own writer skips it too
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta or tensor.layout != torch.strided:
            raise UsageError(
                f"{name!r} has no data here, or is not a dense tensor",
                "load the model completely, with nothing offloaded, before saving it",
            )
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        kept = first.setdefault(place, name) if tensor.numel() else name
        if kept == name:
            tensors[name] = tensor
        else:
            tied[name] = kept
    return tensors, tied


def _pieces(tensor: torch.Tensor, planned: PlannedTensor) -> Iterator[memoryview]:
    import torch

    whole = tensor.detach().to("cpu", getattr(torch, planned.dtype)).resolve_conj().resolve_neg().contiguous()
    if whole.numel():
        # as_strided: the one element of a view may keep a stride that `view` does not take.
        flat = whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)
        content = memoryview(flat.numpy().data)
        for start in range(0, len(content), CHUNK):
            yield content[start : start + CHUNK]


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _save_config(model: Any, config: Any, dtype: str | None, out: Path) -> None:
    config.architectures = [type(model).__name__]
    stored = dtype if dtype in CASTABLE else _dtype(next(model.parameters()))
    config.dtype = stored
    config.save_pretrained(out)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(out)
