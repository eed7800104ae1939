"""A placement as a value: which device holds which part, in how many bytes, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bigpipe.fit import Need
from bigpipe.sizes import format_size

from .devices import Device, devices_of

SCHEMA = "bigpipe.placement/2"
PICTURE_WIDTH = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    device_map: dict[str, Device]
    """Module or tensor name → device; the longest prefix of a name decides, "" is the rest. Covers everything."""
    weights: dict[Device, int]
    """Bytes of weights and buffers per device used; tied tensors count once."""
    max_memory: dict[Device, int | None]
    """The caps it was made for; None without a limit."""
    strategy: str
    dtype: str | None = None
    """What floating tensors are loaded as; None: as stored."""
    special_dtypes: dict[str, str] = field(default_factory=dict)
    """Parameter name → dtype, where another one is wanted."""
    no_split_module_classes: tuple[str, ...] | None = None
    """Blocks that are streamed as a whole; None: the model's own."""
    needs: dict[Device, Need] = field(default_factory=dict)
    """What each device must hold to generate: weights where they really lie (buffers that no checkpoint holds lie where
    they are used), keys and values of the layers that compute there, activations, runtime, streaming buffer."""
    streamed_bytes_per_token: int = 0
    """Stored bytes that one token moves from RAM or disk to where it computes."""
    seconds_per_token: float | None = None
    """Predicted, where the strategy weighs time: decoding one row, all weights read once."""
    explanation: tuple[str, ...] = ()
    """Sentences for people: what was decided and why."""

    @property
    def streaming(self) -> dict[Device, int]:
        """Bytes kept free on a device for the largest layer that passes through it."""
        return {device: need.streaming for device, need in self.needs.items() if need.streaming}

    @property
    def gpus(self) -> int:
        """How many GPUs one process owns: its numbers count from 0."""
        return max((home + 1 for home in self.device_map.values() if isinstance(home, int)), default=0)

    def device_of(self, name: str) -> Device:
        """Of a module or tensor. KeyError where the map does not cover it."""
        part = name
        while part not in self.device_map:
            if not part:
                raise KeyError(name)
            part = part.rpartition(".")[0]
        return self.device_map[part]

    def as_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "strategy": self.strategy,
            "dtype": self.dtype,
            "device_map": self.device_map,
            "weights": _by_text(self.weights),
            "max_memory": _by_text(self.max_memory),
            "special_dtypes": self.special_dtypes,
            "no_split_module_classes": self.no_split_module_classes and list(self.no_split_module_classes),
            "needs": {str(device): asdict(need) for device, need in self.needs.items()},
            "streamed_bytes_per_token": self.streamed_bytes_per_token,
            "seconds_per_token": self.seconds_per_token,
            "explanation": list(self.explanation),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Placement:
        no_split = data["no_split_module_classes"]
        return cls(
            device_map=dict(data["device_map"]),
            weights=_by_device(data["weights"]),
            max_memory=_by_device(data["max_memory"]),
            strategy=data["strategy"],
            dtype=data["dtype"],
            special_dtypes=dict(data["special_dtypes"]),
            no_split_module_classes=None if no_split is None else tuple(no_split),
            needs={device: Need(**parts) for device, parts in _by_device(data["needs"]).items()},
            streamed_bytes_per_token=data["streamed_bytes_per_token"],
            seconds_per_token=data["seconds_per_token"],
            explanation=tuple(data["explanation"]),
        )

    def picture(self) -> str:
        """A bar per device, as wide as its cap: `#` weights, `+` kept free for streaming; then the parts it holds."""
        devices = [*self.max_memory, *(device for device in self.weights if device not in self.max_memory)]
        return "\n".join(line for device in devices for line in self._lines(device))

    def _lines(self, device: Device) -> list[str]:
        used, kept, cap = self.weights.get(device, 0), self.streaming.get(device, 0), self.max_memory.get(device)
        scale = cap or max(sum(self.weights.values()), 1)
        bar = "#" * _columns(used, scale)
        bar += "+" * min(_columns(kept, scale), PICTURE_WIDTH - len(bar))
        of = "" if cap is None else f" of {format_size(cap)}"
        head = f"{_label(device):>6} |{bar:.<{PICTURE_WIDTH}}| {format_size(used)}{of}"
        parts = _shorten([name or "(all of it)" for name, where in self.device_map.items() if where == device])
        return [head, *([f"       {', '.join(parts)}"] if parts else [])]


def _label(device: Device) -> str:
    return f"GPU {device}" if isinstance(device, int) else device


def _columns(size: int, scale: int) -> int:
    """At least one column for anything that is there."""
    return min(PICTURE_WIDTH, max(1, round(PICTURE_WIDTH * size / scale))) if size else 0


def _shorten(names: list[str]) -> list[str]:
    """Runs of numbered parts as a range: `h.0`, `h.1`, `h.2` → `h.0-2`."""
    shortened: list[tuple[str, int | None, int | None]] = []
    for name in names:
        stem, _, last = name.rpartition(".")
        number = int(last) if last.isdigit() else None
        if number is not None and shortened and shortened[-1][0] == stem and shortened[-1][2] == number - 1:
            shortened[-1] = (stem, shortened[-1][1], number)
        else:
            shortened.append((stem, number, number) if number is not None else (name, None, None))
    return [
        stem if first is None else f"{stem}.{first}" + (f"-{last}" if last != first else "")
        for stem, first, last in shortened
    ]


def _by_text(values: Mapping[Device, Any]) -> dict[str, Any]:
    return {str(device): value for device, value in values.items()}


def _by_device(values: Mapping[str, Any]) -> dict[Device, Any]:
    """JSON has text keys only; GPUs are numbers."""
    return {devices_of(key)[0]: value for key, value in values.items()}
