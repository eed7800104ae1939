"""Where each part of a model goes: GPUs, the CPU's memory, the disk.

    place("owner/name", device_map="auto", max_memory={0: "22GiB", "cpu": "48GiB"}) -> Placement

`models` looks at a model where it lies; `budget` reads `max_memory`; `tree` knows the bytes of every module; `greedy`
fills devices in the model's order, as accelerate's `infer_auto_device_map` does; `balance` evens out GPUs, as its
`get_balanced_memory` does; `strategies` chooses among their answers; `optimal` searches for the fastest at given
`speeds`; `custom` checks a map somebody wrote; `result` is the answer as a value and a picture.
"""

from .budget import Device
from .models import place
from .result import Placement
from .speeds import Speeds
from .strategies import place_architecture

__all__ = ["Device", "Placement", "Speeds", "place", "place_architecture"]
