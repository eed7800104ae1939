"""Which stored tensors make which parameter of a model.

Most names match as they are. transformers renames others while loading (a base model's prefix, old names) and fuses
some (the experts of a mixture become one parameter); its own rules are asked, so that what `from_pretrained` loads,
loads here the same way. What bitsandbytes stores beside a quantized weight travels with that weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from .view import TensorInfo

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Window = Callable[[TensorInfo], "torch.Tensor"]

FOUR_BIT = ".weight.quant_state.bitsandbytes__"
"""Followed by nf4 or fp4: the blob that marks a 4-bit weight. An int8 weight is marked by `.SCB`."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one parameter or buffer is made from stored bytes."""

    sources: tuple[TensorInfo, ...]
    fuse: Callable[[Window, torch.dtype], torch.Tensor] | None = None
    """None: the one source is the tensor, whatever its dtype."""

    @property
    def nbytes(self) -> int:
        return sum(source.nbytes for source in self.sources)

    def read(self, window: Window, dtype: torch.dtype) -> torch.Tensor:
        """The tensor on the CPU: fused ones in `dtype` and new memory, others as stored and without a copy."""
        return self.fuse(window, dtype) if self.fuse else window(self.sources[0])


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight as bitsandbytes stores it: `parts` are keyed `weight`, `SCB`, or by quant-state name, `absmax`."""

    parts: Mapping[str, TensorInfo]

    @property
    def four_bit(self) -> bool:
        return "SCB" not in self.parts

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


@dataclass(slots=True)
class Matches:
    plain: dict[str, Recipe] = field(default_factory=dict)
    """Parameter or buffer name → recipe."""
    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)
    """Module name → its weight."""
    unexpected: list[str] = field(default_factory=list)
    """Stored names that the model has no use for."""


def match(model: torch.nn.Module, tensors: Mapping[str, TensorInfo]) -> Matches:
    """Finds the stored tensors of every parameter of `model`, as its class names them before any conversion."""
    from transformers import PreTrainedModel

    plain, parts = set_quantized_apart(tensors)
    quantized = {module: QuantizedWeight(found) for module, found in parts.items()}
    rename = _transformers_names(model) if isinstance(model, PreTrainedModel) else _same_names(model)
    return rename(plain, quantized)


def set_quantized_apart(tensors: Mapping[str, T]) -> tuple[dict[str, T], dict[str, dict[str, T]]]:
    """(tensors by name, parts of quantized weights by module name and part), told by the stored names alone."""
    markers = {name[: -len(".SCB")] for name in tensors if name.endswith(".SCB")}
    markers |= {name.partition(FOUR_BIT)[0] for name in tensors if FOUR_BIT in name}
    parts: dict[str, dict[str, T]] = {module: {} for module in sorted(markers)}
    plain: dict[str, T] = {}
    for name, tensor in tensors.items():
        module, part = _quantized_part(name, markers)
        if module is None:
            plain[name] = tensor
        else:
            parts[module][part] = tensor
    return plain, parts


def _quantized_part(name: str, modules: set[str]) -> tuple[str | None, str]:
    module, _, last = name.rpartition(".")
    if module in modules and last in ("weight", "SCB", "weight_format"):
        return module, last
    module, separator, part = name.partition(".weight.")
    return (module, part) if separator and module in modules else (None, "")


Rename = Callable[[Mapping[str, TensorInfo], Mapping[str, QuantizedWeight]], Matches]


def _same_names(model: torch.nn.Module) -> Rename:
    def rename(plain: Mapping[str, TensorInfo], quantized: Mapping[str, QuantizedWeight]) -> Matches:
        known = set(model.state_dict())
        matches = Matches(unexpected=[name for name in plain if name not in known])
        matches.plain = {name: Recipe((tensor,)) for name, tensor in plain.items() if name in known}
        matches.quantized = dict(quantized)
        return matches

    return rename


def _transformers_names(model: Any) -> Rename:
    """The order and the rules of transformers' own loader, without its tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known = model.state_dict()
    prefix = model.base_model_prefix

    def target(name: str) -> tuple[str, str | None]:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], prefix, known)
        return renamed, pattern

    def rename(plain: Mapping[str, TensorInfo], quantized: Mapping[str, QuantizedWeight]) -> Matches:
        matches = Matches()
        fusions: dict[str, _Fusion] = {}
        weights = {f"{module}.weight": weight for module, weight in quantized.items()}
        for name in sorted([*plain, *weights], key=dot_natural_key):
            renamed, pattern = target(name)
            if name in weights:
                matches.quantized[renamed.removesuffix(".weight")] = weights[name]
            elif renamed not in known:
                matches.unexpected.append(name)
            elif pattern is None:
                matches.plain[renamed] = Recipe((plain[name],))
            else:
                fusion = fusions.setdefault(renamed, _Fusion(model, by_pattern[pattern], renamed))
                fusion.inputs.append((name, pattern, plain[name]))
        for fusion in fusions.values():
            matches.plain.update(fusion.recipes(known))
        return matches

    return rename


class _Fusion:
    """One use of a transformers converter: several stored tensors become one parameter, or one becomes several."""

    def __init__(self, model: Any, converter: Any, target: str) -> None:
        self.model = model
        self.converter = converter
        self.target = target
        self.inputs: list[tuple[str, str, TensorInfo]] = []

    def recipes(self, known: Iterable[str]) -> dict[str, Recipe]:
        sources = tuple(tensor for _, _, tensor in self.inputs)
        return {name: Recipe(sources, self._reader(name)) for name in self._targets(known)}

    def _targets(self, known: Iterable[str]) -> Sequence[str]:
        patterns = self.converter.target_patterns
        if len(patterns) == 1:
            return [self.target]
        names = set(known)
        siblings = [self.target.replace(patterns[0], pattern, 1) for pattern in patterns]
        return [name for name in siblings if name in names]

    def _reader(self, name: str) -> Callable[[Window, torch.dtype], torch.Tensor]:
        def read(window: Window, dtype: torch.dtype) -> torch.Tensor:
            converter = copy.deepcopy(self.converter)
            for stored, pattern, tensor in self.inputs:
                cast = window(tensor).to(dtype)
                converter.add_tensor(self.target, stored, pattern, lambda cast=cast: cast)
            made = converter.convert(self.target, model=self.model, config=self.model.config)
            result: torch.Tensor = made[name][0] if isinstance(made[name], list) else made[name]
            return result

        return read
