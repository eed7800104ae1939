"""Where each part of a model goes: GPUs, the CPU's memory, the disk.

    place("owner/name", device_map="auto", max_memory={0: "22GiB", "cpu": "48GiB"}) -> Placement

`models` looks at a model where it lies, `stored` at how its files hold it; `placement` is what is asked and the answer,
as values and a picture; `budget` is what each device may hold and what a map puts there, `headroom` what generating
takes of it, `tree` the bytes of every module. `greedy` fills devices in the model's order, as accelerate's
`infer_auto_device_map` does; `strategies` evens out GPUs, as its `get_balanced_memory` does, and chooses; `optimal`
searches for the fastest at given `speeds`, over `units`; `fitting` says why something does not fit, and what would;
`streaming` what a forward moves; `products` and `computing` choose what a CPU computes in; `together` how many batches
share a stream, and `limits` how fast that can be at the most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .devices import Device, devices_of, one_device
    from .fitting import find_misfits
    from .headroom import beyond_headroom
    from .limits import Limit, Work, limit_here, limit_of
    from .models import place, place_model
    from .placement import Placement, PlacementRequest, as_map
    from .products import HALVES, Products, computing_dtype, gathers, products_here, products_of
    from .speeds import Speeds
    from .stored import stored_dtype
    from .strategies import place_architecture
    from .streaming import Streamed, streamed
    from .together import Together, batches_together
    from .tree import INDIVISIBLE, prefixes

__getattr__, __all__ = face(__name__)
