"""A model as a tree of parts with their bytes, tied tensors counted once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property

from bigpipe.bigmodel.architecture import Architecture, TensorSpec, expert_tensors
from bigpipe.bigmodel.checkpoint import tensor_nbytes

INDIVISIBLE = frozenset({"MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer"})
"""torch's own modules whose forward reaches for the weights of their children without calling them."""


class Tree:
    """Parts of a model by name: modules, and tensors that hang directly on a module that was split.

    A tensor's bytes belong to its storage: tied names share one. `size` counts a storage where the model's order meets
    it first, so that sizes of siblings add up to their parent's.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        no_split: Iterable[str] | None = None,
        dtype: str | None = None,
        special_dtypes: Mapping[str, str] | None = None,
        tensor_bytes: Mapping[str, int] | None = None,
        cache: Mapping[str, int] | None = None,
    ) -> None:
        """cache: tensor → bytes of keys and values that lie where it is used; None: only weights and buffers count."""
        self.architecture = architecture
        self.cache = cache
        self.no_split = frozenset(architecture.no_split if no_split is None else no_split) | INDIVISIBLE
        self.nbytes = _bytes_by_storage(architecture, dtype, special_dtypes or {}, tensor_bytes or {})
        self._passing: dict[str, tuple[int, int]] = {}

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """Every tensor name in the model's order, tied ones under each of their names."""
        names = [tensor.name for module in self.architecture.modules for tensor in module.tensors]
        known = set(names)
        shared_modules = [name for group in self.architecture.tied for name in group if name not in known]
        extras = [name for name in self.nbytes if name not in known]
        return (*names, *shared_modules, *extras)

    def storage(self, tensor: str) -> str:
        return self.architecture.aliases.get(tensor, tensor)

    @cached_property
    def _under(self) -> Mapping[str, tuple[str, ...]]:
        """Part → the tensors in it."""
        under: dict[str, list[str]] = {}
        for tensor in self.tensors:
            for part in prefixes(tensor):
                under.setdefault(part, []).append(tensor)
        return {part: tuple(names) for part, names in under.items()}

    @cached_property
    def size(self) -> Mapping[str, int]:
        """Part → bytes; "" is the whole model."""
        sizes: Counter[str] = Counter()
        met: set[str] = set()
        for tensor in self.tensors:
            storage = self.storage(tensor)
            size = 0 if storage in met else self.nbytes.get(storage, 0)
            met.add(storage)
            for part in prefixes(tensor):
                sizes[part] += size
        return sizes

    @cached_property
    def cached(self) -> Mapping[str, int]:
        """Part → bytes of keys and values that lie where the part computes."""
        return _summed(self.cache or {})

    @cached_property
    def staying(self) -> Mapping[str, int]:
        """Part → bytes that lie where it computes even if streamed: its cache, and buffers that no checkpoint holds."""
        made = {} if self.cache is None else {tensor: self.nbytes[tensor] for tensor in self.made}
        return _summed(Counter(self.cache or {}) + Counter(made))

    def load(self, part: str) -> int:
        """Bytes of a part with its keys and values."""
        return self.size[part] + self.cached[part]

    @cached_property
    def made(self) -> tuple[str, ...]:
        """Buffers that no checkpoint holds: they lie where they are used, whatever a device map says."""
        return tuple(tensor.name for tensor in self.architecture.tensors() if tensor.buffer and not tensor.persistent)

    def storages(self, part: str) -> frozenset[str]:
        return frozenset(self.storage(tensor) for tensor in self._under.get(part, ()))

    def tensors_of(self, part: str) -> tuple[str, ...]:
        return self._under.get(part, ())

    def union_size(self, parts: Iterable[str]) -> int:
        """Bytes of several parts together."""
        storages = frozenset().union(*(self.storages(part) for part in parts))
        return sum(self.nbytes.get(storage, 0) for storage in storages)

    @cached_property
    def _experts(self) -> frozenset[str]:
        """Storages of experts that are brought one by one."""
        return frozenset(map(self.storage, expert_tensors(self.architecture)))

    def passing(self, layer: str) -> tuple[int, int]:
        """Return the bytes that pass where a layer is streamed: all but its experts; its experts. Of a table none."""
        if layer not in self._passing:
            self._passing[layer] = (0, 0) if self.is_table(layer) else self.passing_of(self.tensors_of(layer))
        return self._passing[layer]

    def passing_of(self, tensors: Iterable[str]) -> tuple[int, int]:
        """Return the bytes of these tensors of a layer: of all that are no experts', and of experts."""
        storages = {self.storage(tensor) for tensor in tensors}
        experts = sum(self.nbytes.get(storage, 0) for storage in storages & self._experts)
        return sum(self.nbytes.get(storage, 0) for storage in storages) - experts, experts

    def is_table(self, part: str) -> bool:
        """A plain embedding: its rows are looked up, so it need not be streamed to be used."""
        module = self.architecture.by_name.get(part)
        return module is not None and module.class_name == "Embedding"

    def can_split(self, part: str) -> bool:
        module = self.architecture.by_name.get(part)
        return module is not None and bool(module.children) and module.class_name not in self.no_split

    def split(self, part: str) -> list[str]:
        """Parameters, children, then buffers: everything in the part, each name once."""
        module = self.architecture.by_name[part]
        parameters = [tensor.name for tensor in module.tensors if not tensor.buffer]
        buffers = [tensor.name for tensor in module.tensors if tensor.buffer]
        known = {*parameters, *module.children, *buffers}
        depth = len(part) + 1 if part else 0
        below = {tensor: tensor[:depth] + tensor[depth:].split(".")[0] for tensor in self.tensors_of(part)}
        extras = [tensor for tensor, child in below.items() if child not in known and tensor not in known]
        return [*parameters, *module.children, *buffers, *extras]

    def layers(self, parts: Iterable[str]) -> Iterator[str]:
        """The parts that move as one, in order: what cannot be split."""
        for part in parts:
            if self.can_split(part):
                yield from self.layers(self.split(part))
            else:
                yield part

    def ties(self, part: str) -> list[str]:
        """Tensors outside the part that share a storage with one inside it."""
        inside = self._under.get(part, ())
        names = set(inside)
        return [
            other
            for tensor in inside
            for group in self._groups.get(tensor, ())
            for other in group
            if other not in names
        ]

    @cached_property
    def _groups(self) -> Mapping[str, tuple[tuple[str, ...], ...]]:
        groups: dict[str, tuple[tuple[str, ...], ...]] = {}
        for group in self.architecture.tied:
            for name in group:
                groups[name] = (*groups.get(name, ()), group)
        return groups


def tied_as_loaded(architecture: Architecture, dtype: str | None, special_dtypes: Mapping[str, str]) -> Architecture:
    """Return it with those names tied alone that are loaded in one dtype: others are tensors apart from then on."""
    tensors = architecture.specs

    def loaded(tensor: TensorSpec) -> str:
        special = special_dtypes.get(tensor.name) if tensor.floating else None
        return special or (architecture.dtype_of(tensor, dtype) if dtype else tensor.dtype)

    def alike(group: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        found: dict[str, list[str]] = {}
        for name in group:  # one that is not there is of a module that has two names
            tensor = tensors.get(name) or tensors.get(group[0])
            found.setdefault(loaded(tensor) if tensor else "", []).append(name)
        yield from (tuple(names) for names in found.values() if len(names) > 1)

    tied = tuple(names for group in architecture.tied for names in alike(group))
    return architecture if tied == architecture.tied else replace(architecture, tied=tied)


def prefixes(name: str) -> Iterator[str]:
    """`a.b.c` → "", `a`, `a.b`, `a.b.c`."""
    yield ""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        yield ".".join(parts[:count])


def _summed(sizes: Mapping[str, int]) -> Counter[str]:
    """Part → the sizes of the tensors in it."""
    sums: Counter[str] = Counter()
    for tensor, size in sizes.items():
        for part in prefixes(tensor):
            sums[part] += size
    return sums


def _bytes_by_storage(
    architecture: Architecture, dtype: str | None, special_dtypes: Mapping[str, str], tensor_bytes: Mapping[str, int]
) -> dict[str, int]:
    """Storage name → bytes as loaded. `tensor_bytes` are true sizes and overrule what the dtype would say."""
    nbytes = {
        tensor.name: _loaded_bytes(architecture, tensor, special_dtypes.get(tensor.name), dtype)
        for tensor in architecture.tensors()
    }
    return nbytes | {name: size for name, size in tensor_bytes.items() if name not in architecture.aliases}


def _loaded_bytes(architecture: Architecture, tensor: TensorSpec, special: str | None, dtype: str | None) -> int:
    if special is not None and tensor.floating:
        return tensor_nbytes(special, tensor.shape)
    return tensor_nbytes(architecture.dtype_of(tensor, dtype) if dtype else tensor.dtype, tensor.shape)
