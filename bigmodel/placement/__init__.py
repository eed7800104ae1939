"""Where each part of a model goes: GPUs, the CPU's memory, the disk.

    place("owner/name", device_map="auto", max_memory={0: "22GiB", "cpu": "48GiB"}) -> Placement

`models` looks at a model where it lies; `request` is what is asked, `result` the answer as a value and a picture.
`budget` is what each device may hold, `headroom` what generating takes of it, `tree` the bytes of every module, `needs`
what a map puts where. `greedy` fills devices in the model's order, as accelerate's `infer_auto_device_map` does;
`balance` evens out GPUs, as its `get_balanced_memory` does; `strategies` chooses among their answers; `optimal`
searches for the fastest at given `speeds`; `custom` checks a map somebody wrote; `fitting` says why something does not
fit, and what would.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .devices import Device as Device, devices_of as devices_of, one_device as one_device
    from .fitting import find_misfits as find_misfits
    from .models import place as place, place_model as place_model, stored_dtype as stored_dtype
    from .request import PlacementRequest as PlacementRequest
    from .result import Placement as Placement
    from .speeds import Speeds as Speeds
    from .strategies import place_architecture as place_architecture

_FACE = {
    "Device": "devices",
    "Placement": "result",
    "PlacementRequest": "request",
    "Speeds": "speeds",
    "devices_of": "devices",
    "find_misfits": "fitting",
    "one_device": "devices",
    "place": "models",
    "place_architecture": "strategies",
    "place_model": "models",
    "stored_dtype": "models",
}


def __getattr__(name: str) -> Any:
    """Import on first use (PEP 562): who reads a device's name needs no architecture."""
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FACE[name]}"), name)
