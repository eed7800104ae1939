"""An empty model: its class built from config, parameters without bytes, buffers with their true values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigpipe.bigmodel.architecture import build_here, read_request
from bigpipe.bigmodel.checkpoint import Checkpoint
from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import UsageError, first_few

if TYPE_CHECKING:
    import torch


def build_skeleton(checkpoint: Checkpoint, dtype: torch.dtype, sources: Sources = Sources()) -> torch.nn.Module:
    """Return the class that the checkpoint's config or `bigpipe_architecture.json` names, with parameters on meta.

    Buffers are made by the class itself, so the ones no checkpoint holds (rotary frequencies, masks) are right.
    """
    import torch
    from accelerate import init_empty_weights

    directory = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    request = read_request(directory, sources=sources)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights(include_buffers=False):
            model = build_here(request)
    finally:
        torch.set_default_dtype(default)
    if not request.custom_class:
        return model
    model._no_split_modules = list(request.no_split)  # type: ignore[assignment]
    return adopt(model, dtype)


def adopt(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Return the model emptied: parameters on meta, and what is floating made `dtype`, as by `.to`.

    Raise UsageError where buffers that no checkpoint holds have no values.
    """
    stored = model.state_dict()
    if lost := [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in stored]:
        raise UsageError(
            f"buffers without values that no checkpoint holds: {first_few(lost)}",
            "build the model with accelerate's init_empty_weights(include_buffers=False), or on the CPU",
        )
    emptied: dict[object, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = emptied.setdefault(_storage(parameter), _empty(parameter, dtype))
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
    return model


def _empty(parameter: torch.nn.Parameter, dtype: torch.dtype) -> torch.nn.Parameter:
    import torch

    wanted = dtype if parameter.is_floating_point() else parameter.dtype
    return torch.nn.Parameter(torch.empty(parameter.shape, dtype=wanted, device="meta"), requires_grad=False)


def _storage(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return what is equal for tensors that are one and the same memory, on meta too, where every `data_ptr` is 0."""
    return tensor.device.type, tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape)


def tied_groups(model: torch.nn.Module) -> list[list[str]]:
    """Return the names of parameters that are one tensor, by storage or by the rules of a transformers class."""
    names = {name: parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    group = {name: _storage(parameter) for name, parameter in names.items()}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target in names and source in names:
            group = {name: group[source] if key == group[target] else key for name, key in group.items()}
    groups: dict[object, list[str]] = {}
    for name, key in group.items():
        groups.setdefault(key, []).append(name)
    return [found for found in groups.values() if len(found) > 1]
