"""How a model lies in its files: the dtype of its weights, and the bytes of each tensor by the model's own names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigpipe.bigmodel.architecture import BUFFERS, Architecture, TensorSpec
from bigpipe.bigmodel.checkpoint import CASTABLE, ModelDescription, tensor_nbytes
from bigpipe.bigmodel.formats import format_of, match_stored, set_apart

from .placement import FLOATS


def stored_dtype(model: ModelDescription) -> str:
    """Return the dtype of the floating weights: the config's, where tensors have it, or the one of most bytes."""
    sizes: dict[str, int] = {}
    plain, _ = set_apart(model.tensors or {}, format_of(model))
    for dtype, shape in plain.values():
        if dtype in FLOATS:
            sizes[dtype] = sizes.get(dtype, 0) + tensor_nbytes(dtype, shape)
    config = model.config or {}
    named = str(config.get("dtype") or config.get("torch_dtype"))
    return named if named in (sizes or FLOATS) else max(sizes, key=lambda dtype: sizes[dtype], default="float32")


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """Bytes on disk by the model's own tensor names."""

    plain: Mapping[str, int]
    packed: Mapping[str, int]
    """Of quantized weights, each with its scales and tables."""

    def of(self, *, plain: bool = True, skip: Collection[str] = ()) -> dict[str, int]:
        """Return those of all tensors. plain: of weights that are not quantized too; skip: names to leave out."""
        sizes = {**(self.plain if plain else {}), **self.packed}
        return {name: size for name, size in sizes.items() if name not in skip}


def stored_bytes(model: ModelDescription, architecture: Architecture, memo: Path | None = None) -> StoredBytes:
    """Return the bytes of each tensor as it is stored. The class is asked what stored names mean only where weights are
    packed: of others the size is known without. memo: of its answers."""
    tensors = model.tensors or {}
    sizes = {name: tensor_nbytes(dtype, shape) for name, (dtype, shape) in tensors.items()}
    stored_in = format_of(model)
    single, quantized = set_apart(sizes, stored_in)
    known = architecture.specs
    makes: dict[str, list[TensorSpec]] = {}
    for own, sources in match_stored(model, architecture, memo, ask=bool(quantized)).made.items():
        for source in sources:
            makes.setdefault(source, []).extend([known[own]] if own in known else [])

    def named(sizes: Mapping[str, int]) -> dict[str, int]:
        found: Counter[str] = Counter()
        for name, size in sizes.items():
            own = _own_name(name, known, architecture)
            found.update(_shares(size, makes.get(name) or ([known[own]] if own else [])))
        return dict(found)

    packed = {f"{module}.weight": sum(weight.parts.values()) for module, weight in quantized.items()}
    elsewhere: dict[str, int] = {}
    if not stored_in.computes:
        typed = {name: (tensors[name][0], size) for name, size in single.items()}
        elsewhere = _packed_bytes(typed, architecture, known)
    return StoredBytes(named(single), {**named(packed), **elsewhere})


def _shares(size: int, tensors: Sequence[TensorSpec]) -> dict[str, int]:
    """Each tensor's part of bytes that lie together, by their elements."""
    shares: dict[str, int] = {}
    left, elements = size, sum(tensor.elements for tensor in tensors)
    for tensor in tensors:
        shares[tensor.name] = left * tensor.elements // max(elements, 1)
        left, elements = left - shares[tensor.name], elements - tensor.elements
    return shares


def _packed_bytes(
    stored: Mapping[str, tuple[str, int]], architecture: Architecture, known: Mapping[str, TensorSpec]
) -> dict[str, int]:
    """Parameter → its share of what lies in its module packed: codes, scales, zero points, orders.

    Tools name these differently (GPTQ and AWQ `qweight qzeros scales g_idx`, fp8 `weight_scale_inv`, MXFP4 `…_blocks
    …_scales`, one by one for experts that the class holds together), but they lie where the weight lies. Parameters of
    one module share its bytes by their elements. stored: name → (dtype, bytes).
    """
    plain: set[str] = set()
    bytes_of: dict[str, int] = {}
    for name, (dtype, size) in stored.items():
        own = _own_name(name, known, architecture)
        if own is not None and (dtype in CASTABLE or known[own].buffer):
            plain.add(own)
        elif not BUFFERS.search(name):
            module = _module_of(name, architecture)
            bytes_of[module] = bytes_of.get(module, 0) + size
    found: dict[str, int] = {}
    for module, size in bytes_of.items():
        packed = [t for t in architecture.by_name[module].tensors if not t.buffer and t.name not in plain]
        found.update(_shares(size, packed))
    return found


def _module_of(stored: str, architecture: Architecture) -> str:
    """The innermost module of the model that a stored name lies in; "" is the root."""
    inner = ""
    for name in architecture.spellings(stored):
        part = name.rpartition(".")[0]
        while part and part not in architecture.by_name:
            part = part.rpartition(".")[0]
        inner = max(inner, part, key=len)
    return inner


def _own_name(stored: str, known: Collection[str], architecture: Architecture) -> str | None:
    """The model's name of a stored tensor."""
    return next((name for name in architecture.spellings(stored) if name in known), None)
