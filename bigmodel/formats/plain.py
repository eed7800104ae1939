"""Checkpoints with scales beside their codes, as the plain ones that they mean: of the config's dtype, without
`quantization_config`. What is decoded is decoded as it is read; nothing is held or written for it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.checkpoint import CASTABLE, DECODED, Made, TensorInfo, describe_opened, tensor_nbytes
from bigpipe.errors import first_few

from .decoding import ACTIVATIONS
from .recognition import EIGHT_BITS, format_of

if TYPE_CHECKING:
    from bigpipe.bigmodel.checkpoint import Checkpoint, ModelDescription

    from .format import Decoded, Decoding

QUANTIZATION = ("quantization_config", "compression_config")
"""Keys of a config that say how weights are packed."""


def decoded(described: ModelDescription) -> ModelDescription:
    """Return a checkpoint as it is once its codes are decoded; itself where nothing is to be.
    Raise InvalidCheckpoint where codes and scales do not fit."""
    plain = _plain(described)
    if plain is None:
        return described
    dtype, kept = plain_dtype(described), described.tensors
    tensors = kept and {name: (made.dtype, made.shape) if made else kept[name] for name, made in plain.items()}
    return replace(described, tensors=tensors, config=_plain_config(described.config or {}, dtype))


def decode(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose codes are decoded as they are read; itself where nothing is to be.
    Raise as `decoded`."""
    plain = _plain(describe_opened(checkpoint))
    if plain is None:
        return checkpoint

    def opened(name: str, made: Decoded | None) -> TensorInfo:
        if made is None:
            return checkpoint.tensors[name]
        parts = tuple(checkpoint.tensors[part] for part in made.parts)
        return TensorInfo(name, made.dtype, made.shape, parts[0].file, -1, made=Made(parts, made.decoder))

    dtype = plain_dtype(describe_opened(checkpoint))
    return replace(
        checkpoint,
        tensors={name: opened(name, made) for name, made in plain.items()},
        config=_plain_config(checkpoint.config or {}, dtype),
    )


def left_out(described: ModelDescription) -> tuple[str, ...]:
    """Return what a user should know of decoding a checkpoint, in words; nothing where nothing is lost by it."""
    found, names = format_of(described), described.tensors or {}
    scales = [name for name in names if ACTIVATIONS.search(name)] if found.decoding else []
    words = f"scales that activations and caches were rounded by, and are not here: {first_few(scales)}"
    plain = f"{found.title}: they are taken as the numbers they are"
    return (*([words] if scales else ()), *([plain] if found is EIGHT_BITS else ()))


def decoding_memory(described: ModelDescription) -> int:
    """Return the bytes that decoding one run of rows takes at the most, what is read and the result included."""
    made = [each for each in (_plain(described) or {}).values() if each and math.prod(each.shape)]
    runs = [max(DECODED, tensor_nbytes(each.dtype, each.shape) // each.shape[0]) for each in made if each.shape]
    return 6 * DECODED + 2 * max(runs, default=0) if made else 0


def plain_dtype(described: ModelDescription) -> str:
    """Return the dtype of decoded weights: the config's, else that of most other floats, else bfloat16."""
    config = described.config or {}
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    named = [str(part.get("dtype") or part.get("torch_dtype")).removeprefix("torch.") for part in parts]
    told = [name for name in named if name in CASTABLE]
    if told:
        return told[0]
    sizes: Counter[str] = Counter()
    for dtype, shape in (described.tensors or {}).values():
        sizes[dtype] += math.prod(shape) if dtype in CASTABLE else 0
    return max(sizes, key=lambda dtype: sizes[dtype]) if +sizes else "bfloat16"


def _plain(described: ModelDescription) -> Mapping[str, Decoded | None] | None:
    """Name → how a plain tensor is made, or None for one that stays as it is; None where nothing is decoded."""
    decoding = format_of(described).decoding
    if decoding is None:
        return None
    stored = described.tensors or {}
    made = decoding.made(stored, plain_dtype(described))
    named = {each.parts[0]: name for name, each in made.items()}
    parts = {part for each in made.values() for part in each.parts}
    left = {name: named.get(name, name) for name in stored if name in named or not _dropped(name, parts, decoding)}
    return {plain: made.get(plain) for plain in left.values()}


def _dropped(name: str, parts: Collection[str], decoding: Decoding) -> bool:
    return name in parts or decoding.dropped(name)


def _plain_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config of a checkpoint that is stored plain, with the dtype that its decoded weights have."""
    kept = without_quantization(config)
    return kept if kept.get("dtype") or kept.get("torch_dtype") else {**kept, "dtype": dtype}


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that says nothing of packed weights."""
    kept = {key: value for key, value in config.items() if key not in QUANTIZATION}
    text = kept.get("text_config")
    if isinstance(text, Mapping):
        kept["text_config"] = {key: value for key, value in text.items() if key not in QUANTIZATION}
    return kept
