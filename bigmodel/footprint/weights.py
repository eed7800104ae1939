"""How many bytes a model's weights take, per dtype: counted from its architecture, exact to the byte.

Three views of the same tensors. `total` and `largest_layer` are accelerate's columns: every float tensor at the width
that the dtype's name promises, plus integer buffers. `loaded` is what `from_pretrained` holds in memory: tied tensors
once, modules that stay float32, the scales of packed matrices, and the head and embeddings that are never packed.
`stored` is what a checkpoint of that dtype takes on disk, less its headers, as `shard` and `quantize` write it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from bigpipe.bigmodel.architecture import Architecture, ModuleSpec, TensorSpec
from bigpipe.bigmodel.checkpoint import itemsize
from bigpipe.bigmodel.formats import PLAIN_DTYPES, Packing, converted_modules, matrix_shape, packing, weight_of, width
from bigpipe.bigmodel.memo import kept


def compute_bytes(dtype: str) -> int:
    """Bytes per activation and cached key. 8-bit floats are stored so, but computed with in 16 bits."""
    return {"float64": 8, "float32": 4}.get(dtype, 2)


@dataclass(frozen=True, slots=True)
class Weights:
    """Sizes in bytes."""

    dtype: str
    parameters: int
    """Elements, tied ones once."""
    total: int
    largest_layer: int
    loaded: int
    """Parameters and buffers, persistent or not."""
    stored: int
    buffers: int
    """Their part of `loaded`."""
    scales: int = 0
    """Scales and tables of the packed matrices, as they are held in memory."""
    largest_matrix: int = 0
    """Elements of the largest converted matrix: what a 4-bit product unpacks at once."""
    converted: int = 0
    """How many matrices are packed."""
    packing: Packing | None = None
    """How; None: not at all."""


@kept
def weigh(architecture: Architecture, dtype: str, *, double_quant: bool = False) -> Weights:
    """The bytes of a model in a plain dtype or a format. Raises UsageError for another dtype."""
    packed = packing(dtype, double_quant=double_quant)
    promised = _promised(architecture, width(dtype))
    tensors = _sized(architecture)
    held = PLAIN_DTYPES.get(dtype, "float16")
    counts = {tensor.name: size * itemsize(architecture.dtype_of(tensor, held)) for tensor, size, _ in tensors}
    matrices = _Packed(architecture, packed)
    if packed is None:
        # A cast of a checkpoint changes every float; only a loaded class keeps some of them wider
        stored = sum(
            size * itemsize(held if floating else tensor.dtype)
            for tensor, size, floating in tensors
            if tensor.persistent
        )
    else:
        saved = (tensor.name for tensor, _, _ in tensors if tensor.persistent)
        stored = sum(counts[name] for name in saved if name not in matrices.names) + matrices.stored
    plain = sum(size for name, size in counts.items() if name not in matrices.names)
    return Weights(
        dtype=dtype,
        parameters=sum(size for tensor, size, _ in tensors if not tensor.buffer),
        total=sum(promised.values()),
        largest_layer=_largest_layer(architecture, promised),
        loaded=plain + matrices.loaded,
        stored=stored,
        buffers=sum(counts[tensor.name] for tensor, _, _ in tensors if tensor.buffer),
        scales=matrices.scales,
        largest_matrix=matrices.largest,
        converted=len(matrices.names),
        packing=packed if matrices.names else None,
    )


@kept
def _sized(architecture: Architecture) -> tuple[tuple[TensorSpec, int, bool], ...]:
    """(tensor, its elements, whether they are floats) of every tensor once; worked out once for all dtypes."""
    return tuple((tensor, tensor.elements, tensor.floating) for tensor in architecture.tensors())


class _Packed:
    """Sums over the matrices that are packed; all zero where none is."""

    def __init__(self, architecture: Architecture, packing: Packing | None) -> None:
        modules = converted_modules(architecture) if packing else ()
        self.names = {weight_of(module).name for module in modules}
        self.largest = self.loaded = self.scales = self.stored = 0
        for (rows, columns), count in Counter(matrix_shape(module) for module in modules).items():
            tensors = packing.stored((rows, columns), "float16") if packing else ()
            self.largest = max(self.largest, rows * columns)
            self.loaded += count * sum(tensor.held for tensor in tensors)
            self.scales += count * sum(tensor.held for tensor in tensors[1:])
            self.stored += count * sum(tensor.nbytes for tensor in tensors)


def _promised(architecture: Architecture, bits: int) -> dict[str, int]:
    """Tensor → bytes at the width that the dtype's name promises; integers and bools keep theirs."""
    return {
        tensor.name: -(-size * (bits if floating else 8 * itemsize(tensor.dtype)) // 8)
        for tensor, size, floating in _sized(architecture)
    }


def _largest_layer(architecture: Architecture, promised: Mapping[str, int]) -> int:
    """In bytes, by accelerate's definition (`get_max_layer_size`).

    The maximum over modules that have no children or whose class is not to be split, parameters plus buffers; the
    root's own tensors count as a layer each.
    """
    sizes = {
        module.name: sum([promised.get(tensor.name, 0) for tensor in module.tensors]) for module in architecture.modules
    }
    # Parents come before their children: going backwards, a module's sum is complete when its parent asks for it
    for module in reversed(architecture.modules):
        for child in module.children:
            sizes[module.name] += sizes.get(child, 0)
    root = architecture.modules[0]
    layers = [promised.get(tensor.name, 0) for tensor in root.tensors]
    layers += [sizes[name] for child in root.children for name in _layers(architecture, child)]
    return max(layers, default=0)


def _layers(architecture: Architecture, name: str) -> list[str]:
    module: ModuleSpec | None = architecture.by_name.get(name)
    if module is None:
        return []  # the same module under a second name
    if not module.children or module.class_name in architecture.no_split:
        return [name]
    return [layer for child in module.children for layer in _layers(architecture, child)]
