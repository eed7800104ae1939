"""Packed weights of a checkpoint, told apart from its other tensors, and put into a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from bigpipe.errors import InvalidCheckpoint

from .format import Format, Packing
from .registry import BUILT_IN, named

if TYPE_CHECKING:
    import torch

    from bigpipe.bigmodel.checkpoint import TensorInfo

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PackedWeight(Generic[T]):
    packing: Packing
    parts: Mapping[str, T]
    """By suffix: what follows the module's name and a dot; `weight` has the codes."""


def set_apart(tensors: Mapping[str, T], format: Format) -> tuple[dict[str, T], dict[str, PackedWeight[T]]]:
    """Return (other tensors by name, packed weights by module), told by stored names.

    format: of the checkpoint; bitsandbytes' own are always looked for.
    """
    plain = dict(tensors)
    packed: dict[str, PackedWeight[T]] = {}
    for packing in dict.fromkeys(known.packing for known in (*map(named, BUILT_IN), format) if known.packing):
        mark = f".{packing.suffixes[-1]}"
        for module in sorted(name.removesuffix(mark) for name in tensors if name.endswith(mark)):
            names = {suffix: f"{module}.{suffix}" for suffix in packing.suffixes}
            parts = {suffix: plain.pop(name) for suffix, name in names.items() if name in plain}
            packed[module] = PackedWeight(packing, parts)
    return plain, packed


def replace_linears(
    model: torch.nn.Module, packed: Mapping[str, PackedWeight[TensorInfo]], config: Mapping[str, Any] | None
) -> None:
    """Put an empty module of its format wherever `packed` names one. config: `quantization_config`.

    Raise InvalidCheckpoint for a module that the model does not have.
    """
    modules = dict(model.named_modules())
    for name, weight in packed.items():
        if name not in modules:
            raise InvalidCheckpoint(
                f"{_file(weight.parts.values())} holds a quantized weight for {name}, which the model does not have",
                "check that config.json is the one that was saved with these weights",
            )
        shapes = {suffix: part.shape for suffix, part in weight.parts.items()}
        model.set_submodule(name, weight.packing.module(modules[name], shapes, config or {}))


def _file(parts: Iterable[TensorInfo]) -> str:
    return str(next(iter(parts)).file)
