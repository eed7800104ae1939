"""Measures real models: what they hold in memory, what they write, what their caches fill with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.architecture import Architecture, Head, read_request


def transformers_quietly() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def build(config: dict[str, Any]) -> Any:
    """The model that a config's `architectures` names, with random weights."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    transformers_quietly()
    model_class = getattr(transformers, config["architectures"][0])
    return model_class(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))).eval()


def describe_here(config: dict[str, Any], head: Head = "auto") -> Architecture:
    """What `describe_architecture` answers, in this process, which has torch already."""
    from bigpipe.bigmodel.architecture.instantiation import describe

    transformers_quietly()
    return describe(read_request(config, head=head))


def held_bytes(model: Any) -> int:
    """Bytes of the unique storages behind parameters, buffers and bitsandbytes' states."""
    storages: dict[int, int] = {}
    for tensor in _held(model):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr() or id(tensor)] = storage.nbytes()
    return sum(storages.values())


def _held(model: Any) -> Iterator[Any]:
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        yield from (value for name in ("CB", "SCB") if (value := getattr(parameter, name, None)) is not None)
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code)
            if state.state2 is not None:
                yield from (state.offset, state.state2.absmax, state.state2.code)


def stored_bytes(directory: Path) -> int:
    """Bytes of all tensors in a directory's safetensors files, headers left out."""
    total = 0
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        header.pop("__metadata__", None)
        total += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
    return total


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys, values and states in a transformers cache."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _cached(cache, set()) if tensor.dim())


def storage_bytes(cache: Any) -> int:
    """Bytes of the storages behind them, of which they may be views."""
    storages = [tensor.untyped_storage() for tensor in _cached(cache, set()) if tensor.dim()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _cached(value: Any, seen: set[int]) -> Iterator[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _cached(list(value.values()), seen)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _cached(entry, seen)
    elif type(value).__module__.startswith("transformers") and id(value) not in seen:
        seen.add(id(value))
        yield from _cached(getattr(value, "__dict__", {}), seen)
