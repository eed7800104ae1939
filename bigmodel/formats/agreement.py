"""Do a config and the stored tensors belong together? Told from headers, by the rules of transformers' loader.

    agree(described, architecture) -> Agreement     what is left over; or InvalidCheckpoint

Shapes and dtypes must be those of the class, and all that it computes with must be stored. What is stored and belongs
to nothing is named, where the rest is whole without it: another head, another tower, layers for predicting several
tokens. It is refused where what it belongs to is there: a bias, an adapter, a norm that the class would leave out, or
layers beyond those that the config has.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.architecture import BUFFERS, COMPILED, Architecture, Matching, ask_matching
from bigpipe.bigmodel.checkpoint import CASTABLE, tensor_nbytes
from bigpipe.errors import InvalidCheckpoint, first_few

from .decoding import OF_ACTIVATIONS
from .matrices import matrix_shape
from .packed import PackedWeight, set_apart, uncomputed
from .plain import decoded, left_out
from .recognition import format_of

if TYPE_CHECKING:
    from bigpipe.bigmodel.checkpoint import ModelDescription

    from .format import StoredTensor

    Stored = Mapping[str, tuple[str, tuple[int, ...]]]

WRAPPERS = {f"{COMPILED}.": "torch.compile", "module.": "DataParallel or DistributedDataParallel"}
"""What the names of weights begin with → what was around the model that they were saved from."""
CURE = "check that config.json belongs to these weights"
SAVE = "fetch the model again, or save it anew"
HARMLESS = re.compile(rf"\.({OF_ACTIVATIONS}|(cos|sin)_cached)$|{BUFFERS.pattern}")
"""Scales of activations and of caches, and buffers that a class makes itself."""
FURTHER = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
"""Fields of a config that tell of layers behind the last one: they predict further tokens, and nothing here does."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of a checkpoint that fits its config."""

    architecture: Architecture
    """Without the ties of tensors that are stored one by one: they may differ, and transformers then unties them."""
    unused: tuple[str, ...] = ()
    """Stored tensors that belong to nothing."""
    untied: tuple[str, ...] = ()
    """Names that would share another's tensor, and are stored beside it."""
    left: tuple[str, ...] = ()
    """What decoding its weights leaves out, in words."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what a user should know, in words."""
        words = [f"stored, and used by nothing in {self.architecture.class_name}: {first_few(self.unused)}"]
        stored = f"{first_few(self.untied)}: stored beside what the config ties it to, and counted by itself"
        return (*self.left, *(words if self.unused else ()), *([stored] if self.untied else ()))


def agree(
    described: ModelDescription, architecture: Architecture, memo: Path | None = None, *, ask: bool = True
) -> Agreement:
    """Return how a checkpoint, whose tensors are known, fits the class of its config. memo: of answers about classes.
    ask: may the class be built, where names do not tell? Otherwise what is missing or left over there is not known.

    Raise InvalidCheckpoint, naming tensors, shapes and the field of the config, where it does not, and UsageError for
    packed weights that the class puts together.
    """
    left, described = left_out(described), decoded(described)
    if described.tensors is None or architecture.outlined or not (found := format_of(described)).computes:
        return Agreement(architecture, left=left)
    plain, packed = set_apart(described.tensors, found)
    matching = match_stored(described, architecture, memo, ask=ask)
    where = f"{described.path}: " if described.path else ""
    alias = {name: plain[kept] for name, kept in described.tied.items() if kept in plain}
    _check_shapes(where, {**plain, **alias}, matching, architecture)
    _check_packed(where, packed, architecture, matching)
    if matching.missing:
        raise InvalidCheckpoint(
            f"{where}no weights are stored for {first_few(matching.missing)} of {architecture.class_name}",
            cure_of_missing(_names(plain, described, packed)),
        )
    used = [source for sources in matching.made.values() for source in sources]
    refuse_strangers(where, matching.unused, used, architecture.by_name, architecture.class_name, architecture.config)
    return replace(_untied(architecture, matching, described.tied), left=left)


def cure_of_missing(stored: Collection[str]) -> str:
    """Return what to do about weights that are missing. stored: the names that there are."""
    for prefix, wrapper in WRAPPERS.items():
        if stored and all(name.startswith(prefix) for name in stored):
            return f"the names begin with {prefix!r}, which {wrapper} put there: save the model inside of it"
    named = "`architectures` in config.json, or `architecture` or model= for one of your own"
    return f"check that the class is the one that was saved ({named}); its weights would be random"


def refuse_strangers(
    where: str,
    unused: Collection[str],
    used: Iterable[str],
    modules: Collection[str],
    class_name: str,
    config: Mapping[str, Any],
) -> None:
    """Raise InvalidCheckpoint for stored tensors that a class leaves out, although what they belong to is there.
    unused: names of what makes nothing of it; used: of the others; modules: names of the class's."""
    prefixes = {name.partition(".")[0] for name in used} if unused else set()
    parents = {module.rpartition(".")[0] for module in modules if module}

    def is_strange(name: str) -> bool:
        """Does it lie in a block or a leaf that is there, or in a block beyond the last?"""
        path, beyond = _deepest(name, modules, prefixes)
        if not path:
            return False
        further = any(key in found for found in _configs(config) for key in FURTHER if found.get(key))
        last = beyond.isdecimal() and f"{path}.0" in modules and not further
        return path not in parents or any(part.isdecimal() for part in path.split(".")) or last

    if strange := [name for name in unused if not HARMLESS.search(name) and is_strange(name)]:
        raise InvalidCheckpoint(
            f"{where}{first_few(strange)} belongs to nothing in {class_name}, and the model is not whole without it",
            "check that config.json names the class, the options (biases, norms) and the number of layers that these"
            " weights were saved with; adapters are merged first",
        )


def _deepest(name: str, modules: Collection[str], prefixes: Collection[str]) -> tuple[str, str]:
    """(the innermost module that a stored name lies in, the next part of its path); "" is the root. The name may lack
    the base model's prefix, or have it where the class does not; prefixes: of stored names that are used."""
    first, _, rest = name.partition(".")
    bodies = [module for module in modules if module and "." not in module and f"{module}.{first}" in modules]
    found = ("", "")
    for spelling in (name, *(f"{body}.{name}" for body in bodies), *([rest] if first in prefixes else [])):
        path, beyond = spelling.rpartition(".")[0], ""
        while path and path not in modules:
            path, _, beyond = path.rpartition(".")
        found = max(found, (path, beyond), key=lambda each: len(each[0]))
    return found


def _configs(config: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _configs(value)


def _names(plain: Stored, described: ModelDescription, packed: Iterable[str]) -> list[str]:
    """What is stored, by the names that it has once it is decoded."""
    return [*plain, *described.tied, *(f"{module}.weight" for module in packed)]


def _told(names: Collection[str], architecture: Architecture) -> Matching:
    """What the names alone tell."""
    specs = architecture.specs
    made: dict[str, list[str]] = {}
    unused: list[str] = []
    for name in names:
        *own_prefix, _ = architecture.spellings(name)  # whether a prefix may be taken off, the class knows
        own = next((own for own in own_prefix if own in specs), None)
        if own is not None:
            made.setdefault(own, [name])
        elif not HARMLESS.search(name):
            unused.append(name)
    tied = {name for group in architecture.tied if made.keys() & group for name in group}
    missing = [name for name, spec in specs.items() if not spec.buffer and name not in made and name not in tied]
    return Matching(made=made, changed=(), unused=unused, missing=missing)


def match_stored(
    described: ModelDescription, architecture: Architecture, memo: Path | None, *, ask: bool = True
) -> Matching:
    """Return which stored tensors, by the names that they have once they are decoded, make which parameters; a packed
    weight counts as its module's `weight`. The tensors must be known; memo and ask as for `agree`."""
    plain, packed = set_apart(described.tensors or {}, format_of(described))
    names = _names(plain, described, packed)
    matching = _told(names, architecture)
    if (matching.missing or matching.unused) and architecture.library != "custom":
        asked = _asked(names, described, architecture, memo) if ask else None
        matching = asked or replace(matching, missing=(), unused=())
    return matching


def packed_modules(described: ModelDescription, architecture: Architecture, memo: Path | None) -> set[str]:
    """Return the modules whose weights are stored packed, by the names that the class has: many checkpoints are stored
    without its prefix. The tensors must be known; memo as for `agree`."""
    _, packed = set_apart(described.tensors or {}, format_of(described))
    made = match_stored(described, architecture, memo).made if packed else {}
    return {
        name.removesuffix(".weight")
        for name, stored in made.items()
        if any(source.removesuffix(".weight") in packed for source in stored)
    }


def _asked(
    names: Collection[str], described: ModelDescription, architecture: Architecture, memo: Path | None
) -> Matching | None:
    """What the class says; None where it is not one of transformers that a config names."""
    if architecture.library != "transformers" or described.config is None or "auto_map" in described.config:
        return None
    return ask_matching(described.config, names, memo)


def _check_shapes(where: str, stored: Stored, matching: Matching, architecture: Architecture) -> None:
    specs = architecture.specs
    used = Counter(source for sources in matching.made.values() for source in sources)
    for name, sources in matching.made.items():
        parts = [stored[source] for source in sources if source in stored]
        if name not in specs or len(parts) != len(sources) or not specs[name].persistent:
            continue
        spec, (dtype, shape) = specs[name], parts[0]
        if name in matching.changed and used[sources[0]] == 1:
            count = sum(math.prod(shape) for _, shape in parts)
            if count != spec.elements:
                raise InvalidCheckpoint(
                    f"{where}{sources[0]} and what makes {name} with it hold {count:,} elements, and"
                    f" {architecture.class_name} has {spec.elements:,} there, {list(spec.shape)}",
                    CURE,
                )
        elif name not in matching.changed and shape != spec.shape:
            raise InvalidCheckpoint(
                f"{where}{sources[0]} is {list(shape)}, and {name} of {architecture.class_name} is {list(spec.shape)}"
                f"{_field(shape, spec.shape, architecture.config)}",
                CURE,
            )
        if spec.floating and not spec.buffer and "float" not in dtype:
            raise InvalidCheckpoint(
                f"{where}{sources[0]} is stored as {dtype}, and {name} of {architecture.class_name} holds floats",
                "start from weights in float32, float16 or bfloat16, or bring the quantization_config of these",
            )


def _field(stored: tuple[int, ...], wanted: tuple[int, ...], config: Mapping[str, Any]) -> str:
    """The fields of a config that a size comes from which differs, in words."""
    sizes = {there for here, there in zip(stored, wanted, strict=False) if here != there}
    numbers = ((name, value) for part in _configs(config) for name, value in part.items() if type(value) is int)
    fields = [f"{name} {value}" for name, value in numbers if value in sizes and not name.endswith("_token_id")]
    return f" ({first_few(fields, 3)} in its config)" if fields else ""


def _check_packed(
    where: str,
    packed: Mapping[str, PackedWeight[tuple[str, tuple[int, ...]]]],
    architecture: Architecture,
    matching: Matching,
) -> None:
    for parameter in matching.changed:
        if found := [source for source in matching.made.get(parameter, ()) if source.removesuffix(".weight") in packed]:
            raise uncomputed(where + found[0].removesuffix(".weight"), parameter, architecture.class_name)
    for name, weight in packed.items():
        own = next((own for own in architecture.spellings(name) if own in architecture.by_name), None)
        module = architecture.by_name.get(own or "")
        if module is None or not module.linear:
            continue
        packing = weight.packing.as_stored(weight.parts)
        parts = {part.suffix: part for part in packing.stored(matrix_shape(module), "float16")}
        if "weight" in weight.parts and not _holds_codes(*weight.parts["weight"], wanted := parts["weight"]):
            (rows, columns), (dtype, shape) = matrix_shape(module), weight.parts["weight"]
            raise InvalidCheckpoint(
                f"{where}{name}.weight is {list(shape)} of {dtype}, and {own} of {architecture.class_name},"
                f" {rows} × {columns}, would be {list(wanted.shape)} of {wanted.dtype}"
                f"{_field((), (rows, columns), architecture.config)}",
                CURE,
            )
        for part in (part for part in parts.values() if part.loaded is None):
            if (why := _lacks(part, weight.parts.get(part.suffix), packing.by_rows)) is not None:
                raise InvalidCheckpoint(
                    f"{where}{name}.{part.suffix} {why}, without which its codes are no numbers", SAVE
                )


def _holds_codes(dtype: str, shape: tuple[int, ...], wanted: StoredTensor) -> bool:
    """A column of bytes may be stored as one of wider numbers (`bnb_4bit_quant_storage`): what counts are its bytes."""
    as_column = wanted.shape[1:] == shape[1:] == (1,) and tensor_nbytes(dtype, shape) == wanted.nbytes
    return (dtype, shape) == (wanted.dtype, wanted.shape) or as_column


def _lacks(wanted: StoredTensor, found: tuple[str, tuple[int, ...]] | None, by_rows: bool) -> str | None:
    """Why what is stored beside codes is not what they are multiplied with; None where it is. by_rows: there is one for
    each row; of blocks, nobody knows here how long they are."""
    if found is None:
        return "is not stored"
    dtype, shape = found
    if wanted.suffix != "weight" and dtype not in (CASTABLE if wanted.dtype in CASTABLE else (wanted.dtype,)):
        return f"is {dtype}, not {wanted.dtype}"
    if len(shape) != len(wanted.shape):
        return f"has {len(shape)} dimensions, not {len(wanted.shape)}"
    if by_rows and math.prod(shape) != math.prod(wanted.shape):
        return f"is {list(shape)}, not {list(wanted.shape)}"
    return None


def _untied(architecture: Architecture, matching: Matching, shared: Mapping[str, str]) -> Agreement:
    """shared: alias → stored name, of tensors that a file holds once."""
    apart = {
        name
        for kept, *aliases in architecture.tied
        for name in aliases
        if name in matching.made
        and kept in matching.made
        and not shared.keys() & {*matching.made[name], *matching.made[kept]}
    }
    if not apart:
        return Agreement(architecture, tuple(matching.unused))
    groups = (tuple(name for name in group if name not in apart) for group in architecture.tied)
    tied = tuple(group for group in groups if len(group) > 1)
    return Agreement(replace(architecture, tied=tied), tuple(matching.unused), tuple(sorted(apart)))
