"""Which stored tensor of a model each tensor of an adapter changes, told from both headers before any byte is read."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from bigpipe.bigmodel.architecture import Architecture, ModuleSpec, TensorSpec
from bigpipe.bigmodel.checkpoint import CASTABLE, AdapterDescription, ModelDescription, require_tensors
from bigpipe.bigmodel.formats import agree, match_stored
from bigpipe.errors import InvalidCheckpoint, UsageError, first_few

from .arithmetic import Added, Change, Dora, LowRank, Pair, Replaced, Rows, Unchanged
from .method import Lora, read_lora

PREFIX = "base_model.model."
"""What peft puts before the names of a model's modules."""
PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector"
    r"|token_adapter\.trainable_tokens_delta)"
)
Shape = tuple[int, ...]
THE_MODEL = "give the model that it was trained on"
Held = tuple[str, str, Shape]
"""A tensor of an adapter: name, dtype, shape."""
Part = tuple[int, str]
"""Which of several adapters, and the name of a tensor of it."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A change of one stored tensor."""

    target: str
    """The model's name of what is changed."""
    stored: str
    """The stored name; of a packed weight that of its module, with `.weight`."""
    change: Change
    parts: tuple[Part, ...]
    """The adapters' tensors that it takes."""
    apart: bool = False
    """Is the changed tensor stored under the model's name, and not in place of the one that it was tied to?"""

    @property
    def name(self) -> str:
        """Return the name under which the changed tensor is stored."""
        return self.target if self.apart else self.stored


@dataclass(slots=True)
class _OfModule:
    """What an adapter holds for one module: part → (name, dtype, shape)."""

    found: dict[str, Held] = field(default_factory=dict)

    def pair(self, *ends: str) -> tuple[Held, Held] | None:
        pair = [self.found[end] for end in ends if end in self.found]
        return (pair[0], pair[1]) if len(pair) == 2 else None


def copies(adapter: AdapterDescription) -> list[str]:
    """Return the names of those tensors that are the model's own weights, which are no part of what was trained: peft
    stores an embedding or a head beside the adapter on it, and both where the vocabulary was resized."""
    saved = tuple(map(str, adapter.config.get("modules_to_save") or ()))

    def is_copy(name: str) -> bool:
        module, is_weight = name.removesuffix(".weight"), name.endswith(".weight")
        if not is_weight or PART.fullmatch(name) or PART.fullmatch(module) or ".modules_to_save." in name:
            return False
        return not module.removesuffix(".base_layer").endswith(saved)

    return [name for name in adapter.tensors or {} if is_copy(name)]


def bind(
    adapter: AdapterDescription, described: ModelDescription, architecture: Architecture, memo: Path | None = None
) -> list[Bound]:
    """Return the changes that an adapter makes to a model's stored tensors, in the order of the model's modules.

    Raise UsageError for a method that is not done here, and for an adapter that was made for another model, naming what
    differs; InvalidCheckpoint for one that does not agree with its own config, or a model that does not with its.
    """
    lora = read_lora(adapter)
    architecture = agree(described, architecture, memo).architecture
    modules, whole = _sorted_apart(adapter)
    names = _names_of_class(modules, whole, described, architecture, memo)
    trained = {today: name for name, today in names.items()}
    binding = _Binding(adapter, lora, architecture, match_stored(described, architecture, memo).made, trained)
    modules = {names.get(name, name): held for name, held in modules.items()}
    return list(binding.changes(modules, {names.get(name, name): held for name, held in whole.items()}))


def require_made_for(
    adapter: AdapterDescription, described: ModelDescription, architecture: Architecture, memo: Path | None
) -> None:
    """Raise as `bind` does for a method that is not done here, and for an adapter that was made for another model, but
    not for what alone cannot be merged: matrices of parameters, of convolutions, and of weights that are put together
    as a model is loaded."""
    binding = _Binding(adapter, read_lora(adapter), agree(described, architecture, memo).architecture, {})
    binding.compare(*_sorted_apart(adapter))


def _sorted_apart(adapter: AdapterDescription) -> tuple[dict[str, _OfModule], dict[str, Held]]:
    """Return what it holds by module, and the tensors that replace others by the names of those. What a module was
    before a copy of it was trained, which peft saves beside that where the vocabulary was resized, is neither."""
    modules: dict[str, _OfModule] = {}
    whole: dict[str, Held] = {}
    for name, (dtype, shape) in require_tensors(adapter).items():
        if dtype not in CASTABLE:
            cause = f"{adapter.where}: {name} is stored as {dtype}, and an adapter's tensors are floats"
            raise InvalidCheckpoint(cause, "fetch it again, or save it anew with peft")
        own = name.removeprefix(PREFIX)
        if ".original_module." in own:
            continue
        if match := PART.fullmatch(own.removesuffix(".weight") if own.endswith("magnitude_vector.weight") else own):
            modules.setdefault(match["module"], _OfModule()).found[match["part"]] = (name, dtype, shape)
        else:
            own = own.replace(".modules_to_save.", ".").removeprefix("modules_to_save.")
            whole[own.replace(".base_layer.", ".")] = (name, dtype, shape)
    return modules, whole


def _names_of_class(
    modules: Collection[str], whole: Collection[str], described: ModelDescription, architecture: Architecture,
    memo: Path | None,
) -> dict[str, str]:  # fmt: skip
    """Return the names that the class has today for those that it does not: an adapter may be of the class as it was,
    or of its base alone (`AutoModel`), and is read as a checkpoint with such names is."""
    specs = {tensor.name for module in architecture.modules for tensor in module.tensors}
    weights = {name: f"{name}.weight" for name in modules if name not in architecture.by_name}
    strange = {**weights, **{name: name for name in whole if name not in specs}}
    if not strange:
        return {}
    outline = replace(described, tensors=dict.fromkeys(strange.values(), ("float32", (1,))), tied={})
    matching = match_stored(outline, architecture, memo)
    own = {
        stored[0]: name for name, stored in matching.made.items() if len(stored) == 1 and name not in matching.changed
    }
    found = {name: own[stored] for name, stored in strange.items() if stored in own}
    found = {name: today.removesuffix(".weight") if name in weights else today for name, today in found.items()}
    return {name: today for name, today in found.items() if today not in modules and today not in whole}


@dataclass(frozen=True, slots=True)
class _Binding:
    adapter: AdapterDescription
    lora: Lora
    architecture: Architecture
    made: Mapping[str, object]
    """The model's names → stored names."""
    trained: Mapping[str, str] = field(default_factory=dict)
    """The model's names → those that they had as the adapter was trained, where these are others: its config has
    them."""

    def changes(self, modules: Mapping[str, _OfModule], whole: Mapping[str, Held]) -> Iterator[Bound]:
        """Embeddings are replaced first, and then changed: peft saves those whose tokens it changed too."""
        self._refuse_parameters()
        self._refuse_unknown(modules, whole)
        for name, tensor in whole.items():
            yield self._replaced(name, *tensor)
            yield from self._left(name, whole)
        order = {module.name: index for index, module in enumerate(self.architecture.modules)}
        for name in sorted(modules, key=order.__getitem__):
            yield from self._of_module(self.architecture.by_name[name], modules[name])

    def compare(self, modules: Mapping[str, _OfModule], whole: Mapping[str, Held]) -> None:
        """Raise UsageError for names that the model does not have, and for shapes that are not those of its own;
        InvalidCheckpoint for another rank than the config's."""
        # The matrices of several parameters of one module are named as if they lay within each other
        named = [(name.replace(".base_layer", ""), parts) for name, parts in modules.items()]
        self._refuse_unknown(dict.fromkeys(name for name, _ in named), whole)
        for name, parts in named:
            module = self.architecture.by_name[name]
            embedding = parts.pair("lora_embedding_A", "lora_embedding_B")
            pair, weight = embedding or parts.pair("lora_A.weight", "lora_B.weight"), _matrix(module)
            if pair is not None and weight is not None:
                self._turned(module, weight, pair, embedding is not None)
        for target, (name, _, shape) in whole.items():
            self._require_shape(target, name, shape)

    def _refuse_parameters(self) -> None:
        if self.lora.parameters:
            cause = f"{self.adapter.where}: target_parameters ({first_few(self.lora.parameters)}) is not merged here"
            raise UsageError(cause, "merge it with peft (`merge_and_unload`), and bring the model that it saves")

    def _refuse_unknown(self, modules: Collection[str], whole: Collection[str]) -> None:
        strange = [name for name in modules if name not in self.architecture.by_name]
        strange += [name for name in whole if name not in self.architecture.specs]
        if not strange:
            return
        cure, kind = THE_MODEL, self.adapter.config.get("task_type")
        if not [name for name in modules if name not in self.architecture.by_name]:
            cure = f"save the model as the class that has them first (its task_type is {kind}), or train without them"
        raise self._other(f"{self.architecture.class_name} has no {first_few(strange, 3)}", cure)

    def _stored(self, target: str) -> tuple[str, bool]:
        """Return the stored name of a parameter of the model's, and whether another name of it is the stored one."""
        found = self.made.get(target)
        kept = self.architecture.aliases.get(target, target)
        group = next((group for group in self.architecture.tied if target in group), (target,))
        own = next((self.made[name] for name in (target, kept, *group) if name in self.made), found)
        sources = list(own) if isinstance(own, list | tuple) else []
        if len(sources) != 1:
            cause = f"{target} of {self.architecture.class_name} is put together from other tensors as it is loaded"
            raise UsageError(cause, "merge it with peft (`merge_and_unload`): its stored tensors cannot be added to")
        return str(sources[0]), len(group) > 1

    def _replaced(self, target: str, name: str, dtype: str, shape: Shape) -> Bound:
        self._require_shape(target, name, shape)
        stored, tied = self._stored(target)
        if not shape:
            raise UsageError(f"{self.adapter.where}: {name} is a single number, which is not merged here", "use peft")
        # What lies under an adapter is the model's own, which peft leaves tied.
        apart = tied and target in self.architecture.aliases and ".base_layer." not in name
        return Bound(target, stored, Replaced(dtype, math.prod(shape[1:])), ((0, name),), apart)

    def _require_shape(self, target: str, name: str, shape: Shape) -> None:
        if shape != (wanted := self.architecture.specs[target].shape):
            error = self._misshapen(target, wanted, f"{name} is {list(shape)}")
            embedding = self.architecture.specs.get(f"{self.architecture.input_embedding}.weight")
            if embedding is not None and wanted == embedding.shape and shape[1:] == wanted[1:]:
                resized = f"`resize_token_embeddings({shape[0]})` and save it with the tokenizer beside the adapter"
                error.cure = f"give the model with the adapter's vocabulary: {resized}"
            raise error

    def _left(self, target: str, whole: Mapping[str, object]) -> Iterator[Bound]:
        """What was tied to a module of `modules_to_save`: peft trains a copy of that, and leaves the others what they
        were; with `ensure_weight_tying` it saves them too."""
        config, module = self.adapter.config, self.trained.get(target, target).rpartition(".")[0]
        saved = any(module.endswith(str(name)) for name in config.get("modules_to_save") or ())
        if not saved or target in self.architecture.aliases:
            return
        for name in next((group for group in self.architecture.tied if target in group), ()):
            if name != target and name not in whole:
                yield Bound(name, self._stored(target)[0], Unchanged(), (), apart=True)

    def _of_module(self, module: ModuleSpec, parts: _OfModule) -> Iterator[Bound]:
        weight = _matrix(module)
        if weight is None:
            cause = f"{self.adapter.where}: changes {module.name}, a {module.class_name}, which is not merged here"
            raise UsageError(cause, "merge it with peft (`merge_and_unload`)")
        stored, _ = self._stored(weight.name)
        embedding = parts.pair("lora_embedding_A", "lora_embedding_B")
        if (pair := embedding or parts.pair("lora_A.weight", "lora_B.weight")) is not None:
            change, names = self._low_rank(module, weight, pair, embedding is not None)
            if magnitude := parts.found.get("lora_magnitude_vector"):
                self._check_magnitude(module, magnitude, change)
                yield Bound(weight.name, stored, Dora(change, magnitude[1]), (*names, (0, magnitude[0])))
            else:
                yield Bound(weight.name, stored, change, names)
        if bias := parts.found.get("lora_B.bias"):
            yield self._bias(module, *bias)
        if rows := parts.found.get("token_adapter.trainable_tokens_delta"):
            yield self._rows(module, weight, stored, *rows)
        known = {"lora_B.bias", "token_adapter.trainable_tokens_delta"}
        if pair is None and not known.intersection(parts.found):
            cause = f"{self.adapter.where}: of {module.name} there is only {first_few(sorted(parts.found))}"
            raise InvalidCheckpoint(cause, "fetch it again, or save it anew with peft")

    def _low_rank(
        self,
        module: ModuleSpec,
        weight: TensorSpec,
        pair: tuple[Held, Held],
        embedding: bool,
    ) -> tuple[LowRank, tuple[Part, Part]]:
        (a_name, a_dtype, _), (b_name, b_dtype, _) = pair
        turned, (rows, columns) = self._turned(module, weight, pair, embedding), weight.shape
        trained = self._trained(module)
        one = Pair(self.lora.rank(trained), a_dtype, b_dtype, self.lora.scaling(trained))
        return LowRank(rows, columns, (one,), turned=turned, rounded=embedding), ((0, a_name), (0, b_name))

    def _turned(self, module: ModuleSpec, weight: TensorSpec, pair: tuple[Held, Held], embedding: bool) -> bool:
        """Is the weight held as [inputs, outputs]? Raise UsageError where a pair's matrices are for another one, and
        InvalidCheckpoint where they are not of the config's rank."""
        (a_name, _, a_shape), (_, _, b_shape) = pair
        turned = embedding or module.class_name == "Conv1D"
        inputs, outputs = weight.shape if turned else weight.shape[::-1]
        if len(a_shape) != 2 or len(b_shape) != 2 or a_shape[1] != inputs or b_shape[0] != outputs:
            raise self._misshapen(module.name, weight.shape, f"its matrices are {list(a_shape)} and {list(b_shape)}")
        if not a_shape[0] == b_shape[1] == (rank := self.lora.rank(self._trained(module))):
            where = self.adapter.where
            cause = f"{where}: {a_name} is {list(a_shape)}, and its config says rank {rank} for {module.name}"
            raise InvalidCheckpoint(cause, "its adapter_config.json belongs to other weights: fetch both again")
        return turned

    def _check_magnitude(self, module: ModuleSpec, magnitude: Held, change: LowRank) -> None:
        name, _, shape = magnitude
        outputs = change.columns if change.turned else change.rows
        if not self.lora.use_dora or math.prod(shape) != outputs:
            cause = f"{self.adapter.where}: {name} is {list(shape)}, and {module.name} has {outputs} outputs"
            raise InvalidCheckpoint(
                cause, "its adapter_config.json (use_dora) belongs to other weights: fetch both again"
            )

    def _bias(self, module: ModuleSpec, name: str, dtype: str, shape: Shape) -> Bound:
        spec = next((tensor for tensor in module.tensors if tensor.name == f"{module.name}.bias"), None)
        if spec is None:
            cause = f"{self.adapter.where}: lora_bias adds to a bias, and {module.name} has none"
            raise UsageError(
                cause, "peft does not merge that either: run the model by peft, or train without lora_bias"
            )
        if spec.shape != shape:
            raise self._misshapen(spec.name, spec.shape, f"{name} is {list(shape)}")
        added = Added(dtype, self.lora.scaling(self._trained(module)))
        return Bound(spec.name, self._stored(spec.name)[0], added, ((0, name),))

    def _rows(self, module: ModuleSpec, weight: TensorSpec, stored: str, name: str, dtype: str, shape: Shape) -> Bound:
        indices = self.lora.rows(self._trained(module), module.name == self.architecture.input_embedding)
        if shape != (len(indices), weight.shape[1]) or any(index >= weight.shape[0] for index in indices):
            told = f"{name} is {list(shape)}, and trainable_token_indices names {len(indices)} rows"
            raise self._misshapen(module.name, weight.shape, told)
        return Bound(weight.name, stored, Rows(dtype, shape[1], indices), ((0, name),))

    def _trained(self, module: ModuleSpec) -> str:
        """Return the name by which the adapter's config knows a module."""
        return self.trained.get(module.name, module.name)

    def _misshapen(self, target: str, wanted: Shape, found: str) -> UsageError:
        return self._other(f"{target} of {self.architecture.class_name} is {list(wanted)}, and {found}")

    def _other(self, cause: str, cure: str = THE_MODEL) -> UsageError:
        trained = self.adapter.base_model
        told = f"; it was trained on {trained}" if trained else ""
        return UsageError(f"{self.adapter.where} was made for another model: {cause}{told}", cure)


def _matrix(module: ModuleSpec) -> TensorSpec | None:
    """The weight of a module that holds a matrix."""
    weight = next((tensor for tensor in module.tensors if tensor.name == f"{module.name}.weight"), None)
    return weight if weight is not None and len(weight.shape) == 2 else None


def combined(adapters: list[list[Bound]], weights: tuple[float, ...], combination: str) -> list[Bound]:
    """Return the changes of several adapters as one adapter's. Raise UsageError for what cannot be weighed: only pairs
    of matrices can, and for linear only those of equal rank."""
    joined: dict[str, Bound] = {}
    for number, (bounds, weight) in enumerate(zip(adapters, weights, strict=True)):
        for bound in bounds:
            if not isinstance(bound.change, LowRank):
                kind = type(bound.change).__name__.lower()
                cause = (
                    f"{bound.target}: only LoRA's pairs of matrices can be weighed among adapters, and this is {kind}"
                )
                raise UsageError(cause, "merge that adapter alone, one after the other", field="weights")
            pair = replace(bound.change.pairs[0], weight=weight)
            before = joined.get(bound.target)
            pairs = (*before.change.pairs, pair) if before and isinstance(before.change, LowRank) else (pair,)
            if combination == "linear" and len({each.rank for each in pairs}) > 1:
                cause = f"{bound.target}: ranks {first_few([str(each.rank) for each in pairs])} differ"
                raise UsageError(cause, "combine with cat, which takes any ranks", field="combination")
            own = [(number, name) for _, name in bound.parts]
            parts = (*(before.parts if before else ()), *own)
            change = replace(bound.change, pairs=pairs, combination="linear" if combination == "linear" else "cat")
            joined[bound.target] = replace(bound, change=change, parts=parts)
    return list(joined.values())
