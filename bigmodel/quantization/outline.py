"""What is asked of a quantization, and which stored tensor becomes what: told from headers before any byte is read."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from bigpipe.bigmodel.architecture import Architecture, ModuleSpec, architecture_of, ask_names, untied
from bigpipe.bigmodel.checkpoint import ModelDescription, Tensors, dtype_name, tensor_nbytes
from bigpipe.bigmodel.formats import (
    PLAIN,
    Packing,
    agree,
    converted_modules,
    decoded,
    default_skips,
    format_of,
    idle_options,
    left_out,
    matrix_shape,
    name_matcher,
    packing_of,
    read_options,
    weight_of,
)
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.writing import PlannedTensor, config_with_dtype, is_cast
from bigpipe.errors import InvalidCheckpoint, UsageError, first_few
from bigpipe.machine import cores
from bigpipe.names import SPELLINGS, as_names, did_you_mean, refuse_unknown
from bigpipe.sizes import format_transfer

DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """BitsAndBytesConfig's fields, as far as they matter to stored weights or to how those are used."""

    scheme: str
    """Name of a format."""
    llm_int8_threshold: float = 6.0
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_compute_dtype: str = "float16"
    skip_modules: Sequence[str] | None = None
    """Names or patterns of modules to leave alone. None: the output head and whatever is tied."""
    keep_in_fp32_modules: Sequence[str] = ()
    """Modules to leave alone and to store as float32."""
    dtype: str = "float16"
    """Of everything else; 4-bit weights are cast to it before they are quantized."""
    threads: int = 1
    """How many threads torch would sum with: in double quantization the mean's last bit depends on it."""
    device: str | None = None
    """Where weights are encoded: a torch device, or numpy on the CPU, which needs no torch. No byte depends on it."""
    packing: Packing = field(init=False)
    """What `scheme` does to a matrix, with those of the fields above that it takes."""

    def __post_init__(self) -> None:
        for name in ("skip_modules", "keep_in_fp32_modules"):
            if (names := getattr(self, name)) is not None:
                object.__setattr__(self, name, as_names(names))
        for name in ("dtype", "bnb_4bit_compute_dtype"):
            object.__setattr__(self, name, dtype_name(getattr(self, name)))
            if (value := getattr(self, name)) not in DTYPES:
                meant = SPELLINGS.get(value)
                cure = f"write {meant}" if meant in DTYPES else f"choose one of {', '.join(DTYPES)}"
                raise UsageError(f"{name} {value!r} is not possible", cure)
        odd = isinstance(self.llm_int8_threshold, bool) or not isinstance(self.llm_int8_threshold, int | float)
        if odd or not math.isfinite(self.llm_int8_threshold):
            raise UsageError(f"llm_int8_threshold is {self.llm_int8_threshold!r}", "give a number, such as 6.0")
        if not isinstance(self.bnb_4bit_use_double_quant, bool):
            raise UsageError(f"bnb_4bit_use_double_quant is {self.bnb_4bit_use_double_quant!r}", "give True or False")
        given = {each.name: getattr(self, each.name) for each in fields(self) if each.init}
        object.__setattr__(self, "packing", packing_of(self.scheme, **given))

    @classmethod
    def read(cls, options: Mapping[str, Any], device: str | None = None) -> Settings:
        """Return what somebody asks for, in BitsAndBytesConfig's own spellings too, with the threads that torch would
        take. Raise UsageError for an option that there is not, or that the scheme has no use for."""
        defaults = {each.name: each.default for each in fields(cls) if each.init}
        known = sorted(defaults.keys() - {"threads", "device"})
        try:  # what is left at its default asks for nothing
            told = {name: v for name, v in options.items() if dtype_name(v) != str(defaults.get(name, defaults))}
            asked = read_options(told)
        except ValueError as error:
            raise UsageError(str(error), "see `bigpipe kinds quantize`") from None
        for name in (name for name in asked if name not in known):
            guess = did_you_mean(name, known, otherwise="it takes")
            raise UsageError(f"quantize_checkpoint has no option {name!r}", guess)
        if "scheme" not in asked:
            raise UsageError("no scheme is given", "choose a format, such as scheme='int8'")
        for name in idle_options(asked["scheme"], asked):
            raise UsageError(f"{name} has no meaning for scheme {asked['scheme']}", "remove it", field=name)
        return cls(threads=torch_threads(), device=device, **asked)

    def as_config(self, architecture: Architecture) -> dict[str, Any]:
        """Return the `quantization_config` as transformers 5.23 saves it, where null means the choice that is its own:
        a list replaces that, and no other library makes one."""
        skipped: Sequence[str] | None = self.skip_modules
        if self.keep_in_fp32_modules or (skipped is None and architecture.library != "transformers"):
            skipped = [*(default_skips(architecture) if skipped is None else skipped), *self.keep_in_fp32_modules]
        return self.packing.config(None if skipped is None else list(skipped))


def torch_threads() -> int:
    """Return how many threads torch takes for itself by default, without importing it."""
    try:
        return max(1, int(os.environ["OMP_NUM_THREADS"].split(",")[0]))
    except (KeyError, ValueError):
        return cores()


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

    @property
    def encoded_dtype(self) -> str:
        """What it is encoded from."""
        return self.packing.through or self.dtype


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor that stays, perhaps in another number format."""

    source: str
    dtype: str
    outputs: tuple[PlannedTensor]


def stored_bytes(parts: Iterable[Converted | Kept]) -> int:
    return sum(tensor.nbytes for part in parts for tensor in part.outputs)


@dataclass(frozen=True, slots=True)
class Outline:
    parts: tuple[Converted | Kept, ...]
    """In the order of the stored tensors."""
    quantized: tuple[str, ...]
    """Modules, by their names in the model."""
    skipped: tuple[str, ...]
    """Linear modules that are not converted."""
    notes: tuple[str, ...] = ()
    """What is odd about the checkpoint, in words."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Stored name → the model's name for that tensor."""

    @property
    def remains(self) -> str:
        """What is not quantized, in words, and its matrices, the largest first: experts in one tensor, embeddings."""
        sizes: Counter[str] = Counter()
        matrices = set()
        for part in self.parts:
            if isinstance(part, Kept):
                name = re.sub(r"\.\d+(?=\.)", ".*", part.source)
                sizes[name] += stored_bytes([part])
                if len(part.outputs[0].shape) > 1:
                    matrices.add(name)
        told = [f"{name} {format_transfer(size)}" for name, size in sizes.most_common() if name in matrices]
        whole = f"not quantized: {format_transfer(sizes.total())} of {format_transfer(self.nbytes)}"
        return f"{whole}: {first_few(told)}" if told else whole

    @property
    def nbytes(self) -> int:
        """Of all output tensors, without file headers; right within `interval`."""
        return stored_bytes(self.parts)

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
    """Return what every stored tensor becomes. tied: alias → stored name, where the file format holds aliases.

    ask_names: gives the model's names for stored ones; asked only where stored names do not tell.
    Raise UsageError for modules that cannot be converted as asked, InvalidCheckpoint where weights and model do not
    belong together.
    """
    _refuse_unknown(architecture, settings)
    modules = converted_modules(architecture, skip_modules=settings.skip_modules, keep=settings.keep_in_fp32_modules)
    if not modules:
        raise _nothing_left(architecture, settings)
    _refuse_tied(architecture, modules)
    weights = {weight_of(module).name: module for module in modules}
    names = model_names(architecture, stored, tied, weights, ask_names)
    parted = {name for name, count in Counter(names[name] for name in stored).items() if count > 1}
    _refuse_missing(weights, {names[name] for name in stored} - parted, names, tied)
    specs = architecture.specs
    in_float32 = name_matcher(settings.keep_in_fp32_modules)
    parts: list[Converted | Kept] = []
    for source, (dtype, shape) in stored.items():
        name = names[source]
        loaded = architecture.dtype_of(specs[name], settings.dtype) if name in specs else settings.dtype
        if name in weights and name not in parted:
            parts.append(_converted(source, dtype, shape, weights[name], loaded, settings.packing))
            continue
        wanted = "float32" if in_float32(name.rpartition(".")[0]) else loaded
        planned = PlannedTensor(source, wanted if is_cast(dtype, wanted) else dtype, shape)
        parts.append(Kept(source, planned.dtype, (planned,)))
    quantized = dict.fromkeys(module.name for module in modules)
    left = [each.name for each in architecture.modules if (each.linear or each.akin) and each.name not in quantized]
    return Outline(tuple(parts), tuple(quantized), tuple(left), names=names)


def _nothing_left(architecture: Architecture, settings: Settings) -> UsageError:
    linear = [module.name for module in architecture.modules if module.linear]
    if not linear:
        cause = f"{architecture.class_name} has no linear modules, and nothing else is quantized"
        return UsageError(cause, "leave this step out", field="scheme")
    fields = [name for name in ("skip_modules", "keep_in_fp32_modules") if getattr(settings, name)]
    if not fields:
        told = f"{architecture.class_name} has no linear modules but {', '.join(linear)}, left as they are by default"
        return UsageError(f"nothing is left to quantize: {told}", "leave this step out", field="scheme")
    told = f"{' and '.join(fields)} name all of the {len(linear)} linear modules"
    cure = f"name fewer, such as {linear[-1]} alone, or leave this step out"
    return UsageError(f"nothing is left to quantize: {told}", cure, field=fields[0])


def _refuse_unknown(architecture: Architecture, settings: Settings) -> None:
    """Raise UsageError for entries that leave nothing alone: a module that is none, or one of which only what lies in
    it would count, as transformers reads names."""
    linear = [module.name for module in architecture.modules if module.linear]
    filled = [module.name for module in architecture.modules if module.tensors]
    _refuse_idle("skip_modules", settings.skip_modules or (), linear, architecture)
    _refuse_idle("keep_in_fp32_modules", settings.keep_in_fp32_modules, filled, architecture)


def _refuse_idle(field: str, entries: Sequence[str], counted: Sequence[str], architecture: Architecture) -> None:
    """counted: the modules that an entry is about."""
    names = [module.name for module in architecture.modules]
    refuse_unknown(
        field, entries, {*names, *(name.rpartition(".")[2] for name in names)}, "modules",
        "name modules as the model does, or by the ends of their names, such as lm_head",
        meant=lambda entry: any(map(name_matcher([entry]), names)),
    )  # fmt: skip
    for entry in entries:
        matches = name_matcher([entry])
        around = [name for name in names if matches(name) and any(each.startswith(f"{name}.") for each in counted)]
        if around and not any(map(matches, counted)):
            raise UsageError(
                f"{field}: {entry} names {first_few(around, 2)}, and none of the modules that lie in it",
                f"write .*{entry} to mean all of these",
                field=f"{field}.{entry}",
            )


def model_names(
    architecture: Architecture,
    stored: Iterable[str],
    tied: Iterable[str],
    weights: Iterable[str],
    ask_names: Callable[[list[str]], Mapping[str, str]] | None,
) -> dict[str, str]:
    """Return stored name or alias → the model's name for that tensor, or the same where it has none.
    weights: the model's names of matrices to convert; where stored names do not tell all of these, `ask_names` does."""
    known = set(architecture.specs).union(*architecture.tied)
    every = [*stored, *tied]
    names = {name: next((own for own in architecture.spellings(name) if own in known), name) for name in every}
    named = {names[name] for name in stored}
    pinned = architecture.keep_in_fp32 or architecture.keep_in_fp32_strict
    # Do the stored names tell which is to be converted, and which the class keeps in float32?
    told = named.issuperset(weights) and not (pinned and named - known)
    return names if told or ask_names is None else names | dict(ask_names(every))


def _converted(
    source: str, stored: str, shape: tuple[int, ...], module: ModuleSpec, dtype: str, packing: Packing
) -> Converted:
    expected = weight_of(module).shape
    if shape != expected or stored not in ("float64", "float32", "float16", "bfloat16"):
        raise InvalidCheckpoint(
            f"{source} is {stored} {list(shape)}, the model's {module.name} has a float matrix {list(expected)}",
            "check that config.json belongs to these weights",
        )
    rows, columns = matrix_shape(module)
    if not rows * columns:
        raise UsageError(f"{module.name} has no elements to quantize", f"add it to skip_modules: [{module.name}]")
    prefix, transposed = source.removesuffix(".weight"), module.class_name == "Conv1D"
    return Converted(source, prefix, stored, dtype, (rows, columns), transposed, packing)


def _refuse_tied(architecture: Architecture, modules: Sequence[ModuleSpec]) -> None:
    tied = {name for group in architecture.tied for name in group}
    if names := [module.name for module in modules if weight_of(module).name in tied]:
        cause = f"the weight of {first_few(names)} is tied to another module's and cannot be quantized alone"
        raise UsageError(cause, f"add to skip_modules: [{', '.join(names)}], or leave skip_modules out")


def _refuse_missing(
    weights: Mapping[str, ModuleSpec], found: set[str], names: Mapping[str, str], tied: Mapping[str, str]
) -> None:
    missing = [name for name in weights if name not in found]
    if not missing:
        return
    aliases = {names[alias]: kept for alias, kept in tied.items()}
    if shared := [name for name in missing if name in aliases]:
        cause = f"{first_few(shared)} shares its bytes with {aliases[shared[0]]} in this checkpoint"
        raise UsageError(cause, f"add to skip_modules: [{weights[shared[0]].name}]")
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
    architecture: what the model is; None: asked of `architecture_of`, which takes `sources`. The tensors of
    `described` must be known. Raise UsageError and InvalidCheckpoint."""
    refuse_quantized(described)
    left, described = left_out(described), decoded(described)
    if not described.says_class and architecture is None:
        raise UsageError(
            "the checkpoint has no config that names its class, so nobody knows which weights are linear layers'",
            "bring its config.json, or describe its class under `architecture`",
        )
    config, told = described.config or {}, architecture is not None
    if architecture is None:
        architecture = architecture_of(described, sources)
    described = untied(described, architecture)
    # Otherwise the description of a class does it; of a module that was given, in a file that names no class
    told_by_config = described.custom is None and described.config is not None
    notes = (*left, *agree(described, architecture, sources.memo, ask=not told).notes, *_wider(architecture, settings))
    plain = told_by_config and architecture.library == "transformers"
    names = partial(ask_names, config, memo=sources.memo) if plain else None
    outlined = outline(described.tensors or {}, described.tied, architecture, settings, names)
    quantization = {"quantization_config": settings.as_config(architecture)}
    return replace(outlined, notes=notes), replace(
        described,
        config=None if described.config is None else config_with_dtype(config, settings.dtype) | quantization,
        custom=None if told_by_config else {**(described.custom or {}), **quantization},
        tensors={tensor.name: (tensor.dtype, tensor.shape) for part in outlined.parts for tensor in part.outputs},
        format="safetensors",
        tied={},
    )


def _wider(architecture: Architecture, settings: Settings) -> Iterator[str]:
    """Modules that are stored as float32 and that the class itself does not keep so, in words."""
    is_named = name_matcher(settings.keep_in_fp32_modules)
    wider = [
        module.name
        for module in architecture.modules
        if is_named(module.name)
        and any(each.floating and architecture.dtype_of(each, settings.dtype) != "float32" for each in module.tensors)
    ]
    if wider:
        yield (
            f"stored as float32: {first_few(wider)}; transformers computes with these only where"
            f" {architecture.class_name} casts what they are given, and bigpipe casts them to the dtype that it loads"
        )


def refuse_quantized(described: ModelDescription) -> None:
    """Raise UsageError for a checkpoint that is quantized already: its codes are no numbers to be rounded again."""
    found = format_of(described)
    if found is not PLAIN and found.decoding is None:
        cause = f"the checkpoint is quantized already ({found.title})"
        raise UsageError(cause, "leave this step out, or start from the weights before they were quantized")
