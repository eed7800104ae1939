"""Which stored tensors make which parameter of a model.

Most names match as they are. transformers renames others while loading (a base model's prefix, old names) and fuses
some (the experts of a mixture become one parameter); its own rules are asked, so that what `from_pretrained` loads,
loads here the same way. A packed weight is renamed as the weight that it was.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from .tensors import TensorInfo

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Window = Callable[[TensorInfo], "torch.Tensor"]


@dataclass(frozen=True, slots=True)
class TensorRecipe:
    """How one parameter or buffer is made from stored bytes."""

    sources: tuple[TensorInfo, ...]
    fuse: Callable[[Window, torch.dtype], torch.Tensor] | None = None
    """None: the one source is the tensor, whatever its dtype."""
    stacked: tuple[tuple[TensorInfo, ...], ...] = ()
    """Of a fused one, by entry of its outermost dimension: the sources whose elements lie in it one after the other.
    Empty where it is made in another way."""

    def read(self, window: Window, dtype: torch.dtype) -> torch.Tensor:
        """Return the tensor on the CPU: fused ones in `dtype` and new memory, others as stored and without a copy."""
        return self.fuse(window, dtype) if self.fuse else window(self.sources[0])

    def entry(self, index: int) -> tuple[TensorInfo, ...]:
        """Return the stored tensors whose elements, one after the other, are this entry of the outermost dimension;
        nothing where an entry cannot be made without the others."""
        if self.fuse is None:
            made = self.sources[0].made
            return () if made and any(part.view for part in made.parts) else (self.sources[0].entry(index),)
        return self.stacked[index] if self.stacked else ()


@dataclass(slots=True)
class Matches(Generic[T]):
    plain: dict[str, TensorRecipe] = field(default_factory=dict)
    """Parameter or buffer name → recipe."""
    packed: dict[str, T] = field(default_factory=dict)
    """Module name → its packed weight."""
    unused: list[str] = field(default_factory=list)
    """Stored names of what makes nothing of the model, and that its class does not say it ignores."""


def match(model: torch.nn.Module, tensors: Mapping[str, TensorInfo], packed: Mapping[str, T]) -> Matches[T]:
    """Return the stored tensors of every parameter of `model`, as its class names them before any conversion.
    packed: weights that are no tensors by themselves, by the stored names of their modules."""
    from transformers import PreTrainedModel

    rename = _transformers_names if isinstance(model, PreTrainedModel) else _same_names
    return rename(model, tensors, packed)


def exempt(model: torch.nn.Module, what: Literal["missing", "unexpected"]) -> re.Pattern[str]:
    """Return what finds the names that may be missing from a checkpoint, or be unexpected in it, as the model's class
    says; with the buffers that transformers once stored."""
    found = list(getattr(model, f"_keys_to_ignore_on_load_{what}", None) or ())
    if what == "unexpected":
        buffers = [name for name, _ in model.named_buffers()]
        once = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}
        found += [pattern for end, pattern in once.items() if any(name.endswith(end) for name in buffers)]
    return re.compile("|".join(f"({pattern})" for pattern in found) or "(?!)")


def _same_names(model: torch.nn.Module, tensors: Mapping[str, TensorInfo], packed: Mapping[str, T]) -> Matches[T]:
    known, modules = set(model.state_dict()), {name for name, _ in model.named_modules()}
    return Matches(
        {name: TensorRecipe((tensor,)) for name, tensor in tensors.items() if name in known},
        dict(packed),
        [name for name in tensors if name not in known] + [name for name in packed if name not in modules],
    )


def _transformers_names(model: Any, tensors: Mapping[str, TensorInfo], packed: Mapping[str, T]) -> Matches[T]:
    """The order and the rules of transformers' own loader, without its tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known, prefix, ignored = model.state_dict(), model.base_model_prefix, exempt(model, "unexpected")
    matches: Matches[T] = Matches()
    fusions: dict[str, _Fusion] = {}
    weights = {f"{module}.weight": weight for module, weight in packed.items()}
    for name in sorted([*tensors, *weights], key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], prefix, known)
        if name in weights:
            matches.packed[renamed.removesuffix(".weight")] = weights[name]
        elif renamed in known and pattern is None:
            matches.plain[renamed] = TensorRecipe((tensors[name],))
        elif renamed in known:
            fusion = fusions.setdefault(renamed, _Fusion(model, by_pattern[pattern], renamed))
            fusion.inputs.append((name, pattern, tensors[name]))
        elif not (ignored.search(name) or ignored.search(renamed)):
            matches.unused.append(name)
    for fusion in fusions.values():
        matches.plain.update(fusion.recipes(known))
    return matches


@dataclass(slots=True)
class _Fusion:
    """One use of a transformers converter: several stored tensors become one parameter, or one becomes several."""

    model: Any
    converter: Any
    target: str
    inputs: list[tuple[str, str, TensorInfo]] = field(default_factory=list)
    """Stored name, the converter's pattern for it, tensor."""

    def recipes(self, known: Container[str]) -> dict[str, TensorRecipe]:
        sources = tuple(tensor for _, _, tensor in self.inputs)
        patterns = self.converter.target_patterns
        siblings = [self.target.replace(patterns[0], pattern, 1) for pattern in patterns]
        targets = [name for name in siblings if name in known] if len(patterns) > 1 else [self.target]
        return {name: TensorRecipe(sources, partial(self._read, name), self._stacked()) for name in targets}

    def _stacked(self) -> tuple[tuple[TensorInfo, ...], ...]:
        """A list of matrices becomes one tensor, of several lists the matrices of one number lie below each other."""
        from transformers.core_model_loading import Concatenate, MergeModulelist

        steps = [(type(step), getattr(step, "dim", None)) for step in self.converter.operations]
        if steps not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
            return ()
        if len(self.converter.target_patterns) > 1:
            return ()
        lists = [
            [tensor for _, pattern, tensor in self.inputs if pattern == wanted]
            for wanted in self.converter.source_patterns
        ]
        lists = [found for found in lists if found]
        return tuple(zip(*lists, strict=True)) if len({len(found) for found in lists}) == 1 else ()

    def _read(self, name: str, window: Window, dtype: torch.dtype) -> torch.Tensor:
        converter = copy.deepcopy(self.converter)
        for stored, pattern, tensor in self.inputs:
            cast = window(tensor).to(dtype)
            converter.add_tensor(self.target, stored, pattern, lambda cast=cast: cast)
        made = converter.convert(self.target, model=self.model, config=self.model.config)
        result: torch.Tensor = made[name][0] if isinstance(made[name], list) else made[name]
        return result
