"""Which stored tensor becomes what: converted, cast or kept, told from headers and config before any byte is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from bigpipe.bigmodel.architecture import Architecture, ModuleSpec, TensorSpec, ask_names, describe_architecture
from bigpipe.bigmodel.checkpoint import ModelDescription, tensor_nbytes
from bigpipe.bigmodel.formats import (
    PLAIN,
    Packing,
    converted_modules,
    format_of,
    matrix_shape,
    name_matcher,
    weight_of,
)
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.writing import PlannedTensor, Tensors, config_with_dtype, is_cast
from bigpipe.errors import InvalidCheckpoint, UsageError, first_few

from .settings import Settings


@dataclass(frozen=True, slots=True)
class Converted:
    """A weight that is quantized."""

    source: str
    """Its stored name."""
    module: str
    """The stored name without `.weight`; what the new tensors' names begin with."""
    stored_dtype: str
    dtype: str
    """What it is cast to first."""
    shape: tuple[int, int]
    """(out, in)."""
    transposed: bool
    """Stored as (in, out), as transformers' Conv1D does."""
    packing: Packing
    measured: Any = None
    """What the packing has to know of the whole weight before it is encoded, once it does."""
    outputs: tuple[PlannedTensor, ...] = field(init=False)
    """The codes first. Sizes are right within the packing's `spread` until the weight is measured."""

    def __post_init__(self) -> None:
        stored = self.packing.stored(self.shape, self.dtype, self.measured)
        planned = tuple(PlannedTensor(f"{self.module}.{s.suffix}", s.dtype, s.shape) for s in stored)
        object.__setattr__(self, "outputs", planned)


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor that stays, perhaps in another number format."""

    source: str
    output: PlannedTensor

    @property
    def dtype(self) -> str:
        return self.output.dtype

    @property
    def outputs(self) -> tuple[PlannedTensor, ...]:
        return (self.output,)


@dataclass(frozen=True, slots=True)
class Outline:
    parts: tuple[Converted | Kept, ...]
    """In the order of the stored tensors."""
    quantized: tuple[str, ...]
    """Modules, by their names in the model."""
    skipped: tuple[str, ...]
    """Linear modules that are not converted."""

    @property
    def nbytes(self) -> int:
        """Of all output tensors, without file headers; right within `interval`."""
        return sum(tensor.nbytes for part in self.parts for tensor in part.outputs)

    def interval(self, settings: Settings) -> tuple[int, int]:
        """(low, high) of `nbytes`."""
        fewer, more = settings.packing.spread()
        return self.nbytes - fewer * len(self.quantized), self.nbytes + more * len(self.quantized)

    @property
    def largest_transposed(self) -> int:
        """Bytes of the largest weight that has to be held whole, because it is turned round."""
        turned = [part for part in self.parts if isinstance(part, Converted) and part.transposed]
        return max((tensor_nbytes(part.stored_dtype, part.shape) for part in turned), default=0)


def outline(
    stored: Tensors,
    tied: Mapping[str, str],
    architecture: Architecture,
    settings: Settings,
    ask_names: Callable[[list[str]], Mapping[str, str]] | None = None,
) -> Outline:
    """What every stored tensor becomes. tied: alias → stored name, where the file format holds aliases.

    ask_names: gives the model's names for stored ones; asked only where stored names do not tell.
    Raises UsageError for modules that cannot be converted as asked, InvalidCheckpoint where weights and model do not
    belong together.
    """
    modules = converted_modules(
        architecture, skip_modules=settings.skip_modules, keep=settings.keep_in_fp32_modules
    )  # fmt: skip
    _refuse_tied(architecture, modules)
    weights = {weight_of(module).name: module for module in modules}
    names = _model_names(architecture, [*stored, *tied])
    if ask_names is not None and not _tell(names, stored, weights, architecture):
        names |= ask_names([*stored, *tied])
    parted = {name for name, count in Counter(names[name] for name in stored).items() if count > 1}
    _refuse_missing(weights, {names[name] for name in stored} - parted, names, tied)
    dtype_of = _kept_dtypes(architecture, settings)
    parts: list[Converted | Kept] = []
    for source, (dtype, shape) in stored.items():
        module = weights.get(names[source])
        if module is not None and names[source] not in parted:
            held = architecture.dtype_of(weight_of(module), settings.dtype)
            parts.append(_converted(source, dtype, shape, module, held, settings))
        else:
            parts.append(Kept(source, PlannedTensor(source, dtype_of(names[source], dtype), shape)))
    converted = {module.name for module in modules}
    linear = [module.name for module in architecture.modules if module.linear]
    return Outline(
        tuple(parts),
        tuple(name for name in linear if name in converted),
        tuple(name for name in linear if name not in converted),
    )


def _tell(names: Mapping[str, str], stored: Tensors, weights: Iterable[str], architecture: Architecture) -> bool:
    """Do the names of stored tensors tell which is to be converted, and which the class keeps in float32?"""
    named = {names[name] for name in stored}
    pinned = architecture.keep_in_fp32 or architecture.keep_in_fp32_strict
    return named.issuperset(weights) and not (pinned and named - _known_names(architecture))


def _known_names(architecture: Architecture) -> set[str]:
    known = {tensor.name for module in architecture.modules for tensor in module.tensors}
    return known.union(*architecture.tied)


def _model_names(architecture: Architecture, stored: Iterable[str]) -> dict[str, str]:
    """Stored name → the model's name for that tensor, or the same where it has none."""
    known = _known_names(architecture)
    return {name: next((own for own in architecture.spellings(name) if own in known), name) for name in stored}


def _converted(
    source: str, dtype: str, shape: tuple[int, ...], module: ModuleSpec, held: str, settings: Settings
) -> Converted:
    expected = weight_of(module).shape
    if shape != expected or dtype not in ("float64", "float32", "float16", "bfloat16"):
        raise InvalidCheckpoint(
            f"{source} is {dtype} {list(shape)}, the model's {module.name} has a float matrix {list(expected)}",
            "check that config.json belongs to these weights",
        )
    rows, columns = matrix_shape(module)
    if not rows * columns:
        raise UsageError(f"{module.name} has no elements to quantize", f"add it to skip_modules: [{module.name}]")
    prefix, transposed = source.removesuffix(".weight"), module.class_name == "Conv1D"
    return Converted(source, prefix, dtype, held, (rows, columns), transposed, settings.packing)


def _kept_dtypes(architecture: Architecture, settings: Settings) -> Callable[[str, str], str]:
    """(model name, stored dtype) → the dtype to store: what `from_pretrained` would load it as."""
    specs: dict[str, TensorSpec] = {t.name: t for module in architecture.modules for t in module.tensors}
    in_fp32 = name_matcher(settings.keep_in_fp32_modules)

    def dtype_of(name: str, stored: str) -> str:
        spec = specs.get(name)
        wanted = architecture.dtype_of(spec, settings.dtype) if spec is not None else settings.dtype
        if settings.keep_in_fp32_modules and in_fp32(name.rpartition(".")[0]):
            wanted = "float32"
        return wanted if is_cast(stored, wanted) else stored

    return dtype_of


def _refuse_tied(architecture: Architecture, modules: Sequence[ModuleSpec]) -> None:
    tied = {name for group in architecture.tied for name in group}
    names = [module.name for module in modules if weight_of(module).name in tied]
    if names:
        raise UsageError(
            f"the weight of {first_few(names)} is tied to another module's and cannot be quantized alone",
            f"add to skip_modules: [{', '.join(names)}], or leave skip_modules out",
        )


def _refuse_missing(
    weights: Mapping[str, ModuleSpec], found: set[str], names: Mapping[str, str], tied: Mapping[str, str]
) -> None:
    missing = [name for name in weights if name not in found]
    if not missing:
        return
    aliases = {names[alias]: kept for alias, kept in tied.items()}
    shared = [name for name in missing if name in aliases]
    if shared:
        raise UsageError(
            f"{first_few(shared)} shares its bytes with {aliases[shared[0]]} in this checkpoint",
            f"add to skip_modules: [{weights[shared[0]].name}]",
        )
    raise InvalidCheckpoint(
        f"the checkpoint has no {first_few(missing)}, which the model's class wants to quantize",
        "check that config.json names the class these weights were saved from, or add the modules to skip_modules",
    )


def understand(
    described: ModelDescription,
    settings: Settings,
    *,
    architecture: Architecture | None = None,
    sources: Sources = Sources(),
) -> tuple[Outline, ModelDescription]:
    """Return the outline of a quantization, and the checkpoint that comes of it, sizes as of `Outline.nbytes`.

    architecture: what the model is; None: asked of `describe_architecture`, which takes `sources`. The tensors of
    `described` must be known. Raise UsageError and InvalidCheckpoint.
    """
    refuse_quantized(described)
    if described.config is None and described.custom is None and architecture is None:
        raise UsageError(
            "the checkpoint has no config that names its class, so nobody knows which weights are linear layers'",
            "bring its config.json, or describe its class under `architecture`",
        )
    config = described.config or {}
    if architecture is None:
        architecture = describe_architecture(config, custom=described.custom, sources=sources)
    plain = described.custom is None and described.config is not None and architecture.library == "transformers"
    names = partial(ask_names, config, memo=sources.memo) if plain else None
    outlined = outline(described.tensors or {}, described.tied, architecture, settings, names)
    quantization = {"quantization_config": settings.as_config(architecture)}
    return outlined, replace(
        described,
        config=None if described.config is None else config_with_dtype(config, settings.dtype) | quantization,
        custom=None if described.custom is None else {**described.custom, **quantization},
        tensors={tensor.name: (tensor.dtype, tensor.shape) for part in outlined.parts for tensor in part.outputs},
        format="safetensors",
        tied={},
    )


def refuse_quantized(described: ModelDescription) -> None:
    """Raises UsageError for a checkpoint that is quantized already: its codes are no numbers to be rounded again."""
    found = format_of(described)
    if found is not PLAIN:
        raise UsageError(
            f"the checkpoint is quantized already ({found.title})",
            "leave this step out, or start from the weights before they were quantized",
        )
