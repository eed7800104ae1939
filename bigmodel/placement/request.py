"""What somebody asks of a placement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bigpipe.errors import UsageError

FLOATS = ("float32", "float16", "bfloat16", "float64")
MODES = ("auto", "balanced", "balanced_low_0", "sequential", "optimal")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRequest:
    """Raises UsageError for a mode or a dtype that there is not."""

    device_map: str | Mapping[str, int | str] = "auto"
    """auto (the same as balanced), balanced, balanced_low_0, sequential as in accelerate; optimal: the fewest predicted
    seconds per token; or name prefix → device, the longest prefix decides."""
    max_memory: Mapping[int | str, int | str] | None = None
    """Bytes of weights and buffers per device; devices not in it are not used. None: what the machine has, less what
    generating takes, and the disk."""
    no_split_module_classes: Sequence[str] | None = None
    """Blocks that stay on one device; None: the model's own."""
    dtype: str | None = None
    """What floats are loaded as; None: as stored."""
    special_dtypes: Mapping[str, str] = field(default_factory=dict)
    """Tensor name → dtype."""
    batch_size: int = 1
    sequence_length: int = 2048
    """Of the generation that room is kept for."""

    def __post_init__(self) -> None:
        for name in (self.dtype, *self.special_dtypes.values()):
            if name is not None and name not in FLOATS:
                raise UsageError(f"dtype {name!r} is not one that weights are loaded as", f"use {', '.join(FLOATS)}")
        if isinstance(self.device_map, str) and self.device_map not in MODES:
            modes = ", ".join(MODES)
            raise UsageError(f"device_map {self.device_map!r} is not a mode", f"use one of {modes}, or a map")

    @property
    def mode(self) -> str | None:
        """None: a map that somebody wrote."""
        return self.device_map if isinstance(self.device_map, str) else None

    def changed(self, change: Mapping[str, Any]) -> PlacementRequest:
        """With other values; `max_memory.KEY` is one of its entries."""
        caps = {str(key): size for key, size in (self.max_memory or {}).items()}
        fields: dict[str, Any] = {}
        for option, value in change.items():
            name, _, key = option.partition(".")
            if key:
                caps[key] = value
                fields[name] = caps
            else:
                fields[name] = value
        return replace(self, **fields)
