"""The Hub's own count of a model's elements, held against what headers or index say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bigpipe.bigmodel.checkpoint import SAFETENSORS_NAMES

from .repository import Repository

COUNTED = ("model.safetensors", "model.safetensors.index.json")
"""What the Hub counts: one of these at the root of a repository. It knows nothing of `.bin` or of components."""


def difference(
    repository: Repository,
    tensors: Mapping[str, tuple[str, Sequence[int]]] | None,
    config: Mapping[str, Any] | None,
) -> str | None:
    """What the Hub counts otherwise than `tensors` (stored name → (torch dtype name, shape)), in words.

    None where they agree, where the Hub gives no counts, and where it counts something else: packed formats by the
    values that are packed in them.
    """
    counted = repository.elements
    packed = bool((config or {}).get("quantization_config"))
    if not counted or not tensors or packed or all(repository.file(name) is None for name in COUNTED):
        return None
    found: dict[str, int] = {}
    for dtype, shape in tensors.values():
        name = SAFETENSORS_NAMES.get(dtype, dtype)
        found[name] = found.get(name, 0) + math.prod(shape)
    stated = {name: count for name, count in counted.items() if count}
    if stated == {name: count for name, count in found.items() if count}:
        return None
    return f"the Hub counts {_words(stated)}, and the files hold {_words(found)}; the files are believed"


def _words(counts: Mapping[str, int]) -> str:
    return " and ".join(f"{count:,} elements of {name}" for name, count in sorted(counts.items())) or "no elements"
