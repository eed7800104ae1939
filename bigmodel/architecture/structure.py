"""What a model consists of: modules, tensors and ties, as a value for sizes, quantization and placement."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal

from bigpipe.sizes import counted

Head = Literal["auto", "none"]
"""auto: the class the config names, with its head. none: the bare `AutoModel`, which is accelerate's view."""

ATTENTION = "attention_implementation"
"""Key of a complete config: `eager` or `sdpa`, whichever the class takes by itself."""

PLAIN_TORCH = ("custom", "timm")
"""`Architecture.library` of classes that are not of transformers, nor by its rules."""
OUTLINED = "headers"
"""`Architecture.library` of an outline: guessed from the names of stored tensors."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A parameter or buffer. `dtype` is torch's name for it in a model built as float32."""

    name: str
    """Full name, as in a state dict."""
    shape: tuple[int, ...]
    dtype: str
    buffer: bool = False
    persistent: bool = True
    """Saved in checkpoints. Not so: buffers the class makes itself, and what its `_keys_to_ignore_on_save` names."""
    fixed: bool = False
    """Keeps `dtype` when the model is built in another one: integers, and floats whose code names their dtype."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def floating(self) -> bool:
        return "float" in self.dtype


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    name: str
    """Full name; "" is the root."""
    class_name: str
    children: tuple[str, ...] = ()
    """Full names."""
    tensors: tuple[TensorSpec, ...] = ()
    """The direct ones, parameters first."""
    linear: bool = False
    """What bitsandbytes converts: exactly `torch.nn.Linear`, or transformers' `Conv1D`; in classes that are not of
    transformers also what is made from `torch.nn.Linear` and computes as it does."""
    akin: bool = False
    """Made from `torch.nn.Linear`, in such a class, but it, or what holds it, computes with its weight in its own way:
    nothing converts it."""


@dataclass(frozen=True, slots=True)
class CachedTensor:
    """Tensors alike that a generating model keeps of a sequence: `elements` + `per_token` · tokens elements each."""

    count: int
    elements: int
    """Of a state, which does not grow."""
    per_token: float
    """No whole number where several tokens are compressed into one; sizes are then upper bounds."""
    window: int | None
    """Tokens after which it grows no more."""
    itemsize: int
    """Bytes per element; 0: as the keys, in whatever dtype these are kept."""
    viewed_per_token: float
    """Elements per token of the prompt that it is a view into until the first step; 0 where it stands by itself."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Architecture:
    class_name: str
    modules: tuple[ModuleSpec, ...]
    """In `named_modules()` order: a parent before its children."""
    no_split: tuple[str, ...] = ()
    """Class names of modules that must stay on one device."""
    tied: tuple[tuple[str, ...], ...] = ()
    """Groups of tensor names with one storage, the one that a checkpoint keeps first."""
    output_embedding: str | None = None
    """Module name of the head, `lm_head` or the like."""
    input_embedding: str | None = None
    keep_in_fp32: tuple[str, ...] = ()
    """Patterns of tensors that transformers loads as float32 when float16 is asked for."""
    keep_in_fp32_strict: tuple[str, ...] = ()
    """The same, for float16 and bfloat16."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Complete: what the model's config class adds to `config.json` is filled in, and common names such as
    `num_hidden_layers` stand beside the type's own."""
    library: str = "transformers"
    generates: bool = False
    """Produces tokens one by one and caches keys and values (or states) while it does."""
    cache: tuple[CachedTensor, ...] | None = None
    """What it caches, as observed; None where that is left to formulas (`footprint.kvcache`)."""

    def __repr__(self) -> str:
        return f"<Architecture {self.class_name}: {counted(len(self.modules), 'module')}>"

    @property
    def outlined(self) -> bool:
        """Is this a guess from the names of stored tensors?"""
        return self.library == OUTLINED

    @cached_property
    def by_name(self) -> Mapping[str, ModuleSpec]:
        return {module.name: module for module in self.modules}

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor by its name, tied ones by each of theirs. Order of `named_modules()`."""
        return {tensor.name: tensor for module in self.modules for tensor in module.tensors}

    @cached_property
    def aliases(self) -> Mapping[str, str]:
        """Tied tensor name → the name whose bytes it shares."""
        return {alias: kept for kept, *aliases in self.tied for alias in aliases}

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor once: a tied one under its kept name. Order of `named_modules()`."""
        for module in self.modules:
            yield from (tensor for tensor in module.tensors if tensor.name not in self.aliases)

    def spellings(self, stored: str) -> list[str]:
        """Return how the model may call a stored tensor: as it is, or with the base model's prefix added or taken off.
        `from_pretrained` does so too: a base model's weights load into a model with a head, and the other way round."""
        bodies = [child.rpartition(".")[2] for child in self.by_name[""].children]
        return [stored, *(f"{body}.{stored}" for body in bodies), stored.partition(".")[2]]

    def dtype_of(self, tensor: TensorSpec, dtype: str) -> str:
        """The dtype a tensor has once the model is loaded as `dtype` by `from_pretrained`."""
        if tensor.fixed or not tensor.floating:
            return tensor.dtype
        kept = kept_in_float32(self.keep_in_fp32, self.keep_in_fp32_strict, dtype) if tensor.persistent else None
        return "float32" if kept is not None and kept.search(tensor.name) else dtype

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Architecture:
        from pydantic import TypeAdapter

        return TypeAdapter(cls).validate_python(data)


@lru_cache
def kept_in_float32(entries: tuple[str, ...], strict: tuple[str, ...], dtype: str) -> re.Pattern[str] | None:
    """Return which tensors transformers loads as float32 although `dtype` is asked for. entries, strict: a class's
    `_keep_in_fp32_modules` and `_keep_in_fp32_modules_strict`. transformers turns each into a regular expression in
    which * stands for anything, and searches for it."""
    asked = {"float16": [*entries, *strict], "bfloat16": [*strict]}.get(dtype)
    return re.compile("|".join(entry.replace("*", ".*") for entry in asked)) if asked else None


def is_named(module: str, end: str) -> bool:
    """Return whether the name of a module is this, or ends in it: `q_proj`."""
    return module == end or module.endswith(f".{end}")


def named_classes(config: Mapping[str, Any]) -> list[str]:
    """Return the classes that a config names under `architectures`, the one it was saved from first; none for what is
    no list of names."""
    found = config.get("architectures")
    return [str(name) for name in found] if isinstance(found, list) else []
