"""Models without weights: parameters on the meta device, buffers with what the class puts into them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.architecture import read_request, storage_of, with_empty_parameters
from bigpipe.bigmodel.checkpoint import ModelDescription
from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import InvalidCheckpoint, UsageError
from bigpipe.modules import foreign

if TYPE_CHECKING:
    import torch


def build_empty(folder: Path, described: ModelDescription, dtype: torch.dtype, sources: Sources) -> torch.nn.Module:
    """The class that the checkpoint's config or `bigpipe_architecture.json` names, with parameters on meta. Buffers are
    made by the class itself, so the ones no checkpoint holds (rotary frequencies, masks) are right."""
    request = read_request(folder, custom=described.custom, sources=sources)
    try:
        model = with_empty_parameters(request, dtype)
    except (UsageError, InvalidCheckpoint) as error:
        raise type(error)(f"{folder}: {error.cause}", error.cure) from error
    if not request.custom_class:
        return model
    model._no_split_modules = list(request.no_split)  # type: ignore[assignment]
    return emptied(model, dtype)


def emptied(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The model with parameters on meta, and what is floating made `dtype`; but buffers of which the class says another
    dtype than its parameters have stay as they are."""
    import torch

    common = {torch.get_default_dtype(), *(parameter.dtype for parameter in model.parameters())}
    made: dict[object, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                wanted = dtype if parameter.is_floating_point() else parameter.dtype
                empty = torch.nn.Parameter(
                    torch.empty(parameter.shape, dtype=wanted, device="meta"), parameter.requires_grad
                )
                module._parameters[name] = made.setdefault(storage_of(parameter), empty)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and buffer.dtype in common:
                module._buffers[name] = buffer.to(dtype)
    return model


def read_generation_config(model: Any, path: Path) -> None:
    """What `generate` does unless it is told otherwise, as the checkpoint says: in a file of its own or, in older ones
    without it, among the fields of config.json."""
    name = next((name for name in ("generation_config.json", "config.json") if (path / name).is_file()), None)
    if name is None or getattr(model, "generation_config", None) is None:
        return
    from transformers import GenerationConfig

    older = {"config_file_name": name, "_from_model_config": True} if name == "config.json" else {}
    with foreign(f"{path / name} cannot be used", "mend it, or leave it out", InvalidCheckpoint):
        model.generation_config = GenerationConfig.from_pretrained(str(path), local_files_only=True, **older)
