"""What is asked of a placement, and the answer: which device holds which part, in how many bytes, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from bigpipe.bigmodel.checkpoint import dtype_name
from bigpipe.errors import UsageError
from bigpipe.fit import Need
from bigpipe.names import as_names
from bigpipe.sizes import format_size
from bigpipe.tables import html_table

from .devices import Device, devices_of, main_of, one_device

SCHEMA = "bigpipe.placement/4"
BY_DEVICE = ("weights", "max_memory", "needs")
MEASURED = ("seconds_per_token", "measured")
"""No two measurements are alike, and equal placements have equal JSON: it is without these."""
PICTURE_WIDTH = 40
FLOATS = ("float32", "float16", "bfloat16", "float64")
COMPUTED = ("auto", "stored", *FLOATS)
MODES = ("auto", "balanced", "balanced_low_0", "sequential", "optimal")


def as_map(device_map: object) -> Any:
    """Return a mode or a map as it is, and for a device alone (`cpu`, 0, `cuda:0`, torch's own) the map that puts
    everything there. Raise UsageError for what is none of them."""
    if isinstance(device_map, Mapping):
        for odd in (key for key in device_map if not isinstance(key, str)):
            raise UsageError(f"device_map has the key {odd!r}", "keys are names of modules or tensors, as texts")
        return device_map
    if device_map in MODES:
        return device_map
    try:
        return {"": one_device(str(device_map))}
    except UsageError:
        cause = f"device_map {device_map!r} is neither a mode, nor a device, nor a map"
        raise UsageError(cause, f"use one of {', '.join(MODES)}, cpu, disk, a GPU, or a map") from None


def _require_floats(*dtypes: str | None) -> None:
    """Raise UsageError for a dtype that floating weights would not survive."""
    for name in dtypes:
        if name is not None and name not in FLOATS:
            raise UsageError(f"dtype {name!r} is not one that weights are loaded as", f"use {', '.join(FLOATS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRequest:
    """Raises UsageError for a mode or a dtype that there is not."""

    device_map: str | Mapping[str, int | str] = "auto"
    """auto (the same as balanced), balanced, balanced_low_0, sequential as in accelerate; optimal: the fewest predicted
    seconds per token; or name prefix → device, the longest prefix decides; or one device for all."""
    max_memory: Mapping[int | str, int | str] | None = None
    """Bytes of weights and buffers per device; devices not in it are not used. None: what the machine has, less what
    generating takes, and the disk."""
    no_split_module_classes: str | Sequence[str] | None = None
    """Blocks that stay on one device; None: the model's own."""
    dtype: str | None = None
    """What floats are loaded as, torch's own too; None, or auto: as stored."""
    compute_dtype: str = "auto"
    """What a CPU computes in where it need not be what is loaded, and weights are cast at each use: `stored`, a dtype,
    or `auto`: where weights are streamed, float32 instead of a half that the CPU multiplies much more slowly."""
    special_dtypes: Mapping[str, str] = field(default_factory=dict)
    """Tensor name → dtype."""
    batch_size: int = 1
    sequence_length: int = 2048
    """Of the generation that room is kept for."""

    def __post_init__(self) -> None:
        if self.no_split_module_classes is not None:
            object.__setattr__(self, "no_split_module_classes", as_names(self.no_split_module_classes))
        object.__setattr__(self, "dtype", None if self.dtype in (None, "auto") else dtype_name(self.dtype))
        special = {name: dtype_name(dtype) for name, dtype in self.special_dtypes.items()}
        object.__setattr__(self, "special_dtypes", special)
        _require_floats(self.dtype, *self.special_dtypes.values())
        if self.compute_dtype not in COMPUTED:
            cause = f"compute_dtype {self.compute_dtype!r} is not one that weights are cast to"
            raise UsageError(cause, f"use {', '.join(COMPUTED)}")
        object.__setattr__(self, "device_map", as_map(self.device_map))

    @property
    def mode(self) -> str | None:
        """None: a map that somebody wrote."""
        return self.device_map if isinstance(self.device_map, str) else None

    def changed(self, change: Mapping[str, Any]) -> PlacementRequest:
        """With other values; `max_memory.KEY` is one of its entries."""
        values = {option: value for option, value in change.items() if "." not in option}
        caps = {option.partition(".")[2]: value for option, value in change.items() if "." in option}
        if caps:
            known = values.get("max_memory", self.max_memory) or {}
            values["max_memory"] = {str(key): size for key, size in known.items()} | caps
        return replace(self, **values)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Placement:
    """Which device holds each part of a model, and what each must hold. Its fields are those of its JSON, in
    order, but for what was measured."""

    strategy: str
    dtype: str | None = None
    """What floating tensors are loaded as; None: as stored."""
    compute_dtype: str | None = None
    """What they are cast to at each use, on a CPU; None: they are computed in as they are loaded."""
    device_map: dict[str, Device]
    """Module or tensor name → device; the longest prefix of a name decides, "" is the rest. Covers everything."""
    weights: dict[Device, int]
    """Bytes of weights and buffers per device used; tied tensors count once on each that holds one of them."""
    max_memory: dict[Device, int | None]
    """The caps it was made for; None without a limit."""
    special_dtypes: dict[str, str] = field(default_factory=dict)
    """Parameter name → dtype, where another one is wanted."""
    no_split_module_classes: tuple[str, ...] | None = None
    """Blocks that are streamed as a whole; None: the model's own."""
    needs: dict[Device, Need] = field(default_factory=dict)
    """What each device must hold to generate: weights where they really lie (buffers that no checkpoint holds lie where
    they are used), keys and values of the layers that compute there, activations, runtime, streaming buffer."""
    streamed_bytes_per_token: int = 0
    """Stored bytes that one token moves from RAM or disk to where it computes."""
    kept_experts: int = 0
    """Bytes of streamed experts that stay where they compute, those used most often: the room that is left there."""
    seconds_per_token: float | None = field(default=None, compare=False)
    """Predicted, where the strategy weighs time: decoding one row, all weights read once."""
    explanation: tuple[str, ...] = ()
    """Sentences for people: what was decided and why."""
    measured: tuple[str, ...] = field(default=(), compare=False)
    """Further ones, of what was measured of this machine."""

    def __post_init__(self) -> None:
        _require_floats(self.dtype, self.compute_dtype, *self.special_dtypes.values())

    def __repr__(self) -> str:
        sizes = ", ".join(f"{_label(device)} {format_size(size)}" for device, size in self.weights.items())
        return f"<Placement {self.strategy}: {sizes}>"

    def _repr_html_(self) -> str:
        rows = [
            (_label(device), format_size(size), _cap(self.max_memory.get(device)), self._parts(device))
            for device, size in self.weights.items()
        ]
        return html_table(repr(self), ("device", "weights", "cap", "parts"), rows, "\n".join(self.told))

    @property
    def streaming(self) -> dict[Device, int]:
        """Bytes kept free on a device for the largest layer that passes through it, on a GPU for two."""
        return {device: need.streaming for device, need in self.needs.items() if need.streaming}

    @property
    def told(self) -> tuple[str, ...]:
        """All sentences for people."""
        return (*self.explanation, *self.measured)

    @property
    def main(self) -> Device:
        """The device that runs what lies on none that computes."""
        return main_of(self.device_map.values())

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
        found = {name: value for name, value in {"schema": SCHEMA, **asdict(self)}.items() if name not in MEASURED}
        for name in BY_DEVICE:
            found[name] = {str(device): value for device, value in found[name].items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Placement:
        found = {item.name: data[item.name] for item in fields(cls) if item.name not in MEASURED}
        for name in BY_DEVICE:  # JSON has text keys only; GPUs are numbers
            found[name] = {devices_of(key)[0]: value for key, value in found[name].items()}
        no_split = found["no_split_module_classes"]
        found["no_split_module_classes"] = None if no_split is None else tuple(no_split)
        needs = {device: Need(**parts) for device, parts in found["needs"].items()}
        return cls(**{**found, "needs": needs, "explanation": tuple(found["explanation"])})

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
        parts = self._parts(device)
        return [head, *([f"       {parts}"] if parts else [])]

    def _parts(self, device: Device) -> str:
        return ", ".join(
            _shorten([name or "(all of it)" for name, where in self.device_map.items() if where == device])
        )


def _cap(size: int | None) -> str:
    return "" if size is None else format_size(size)


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
