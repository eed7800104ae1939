"""What a placement means on this machine: where each weight lives and computes, what RAM it fills, in which dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bigpipe.bigmodel.checkpoint import CASTABLE, ModelDescription, tensor_nbytes
from bigpipe.bigmodel.formats import PLAIN, decoded, format_of, set_apart
from bigpipe.bigmodel.placement import (
    HALVES,
    Device,
    Placement,
    Products,
    as_map,
    computing_dtype,
    one_device,
    products_here,
    stored_dtype,
)
from bigpipe.errors import DoesNotFit, UsageError, first_few

if TYPE_CHECKING:
    import torch

DeviceMap = Mapping[str, "int | str | torch.device"]
"""Module or parameter name → home. The longest name that leads to a weight decides; "" is the rest."""
FREE_SHARE = 0.6
"""Of the memory available, what all processes here may fill with weights cast to another dtype."""
TOTAL_SHARE = 0.5
"""Of all memory, what a model may take as float32 for a CPU to compute with it as that."""
SMALL = 2**28
"""Bytes as float32 of a model that is computed as that without asking whether it is faster: asking costs more."""
Measured = Callable[[], Products | None]
"""How fast the cores multiply; None where nobody can tell."""


class Homes:
    """A placement on this machine."""

    def __init__(self, placement: Placement, first_gpu: int = 0) -> None:
        """first_gpu: added to the map's GPU numbers, a rank's own. Raise DoesNotFit for a GPU that is not there."""
        import torch

        self.placement = placement
        self.first_gpu = first_gpu
        self.main = torch.device("cpu")
        """Where everything without a GPU of its own computes."""
        if gpus := [home + first_gpu for home in placement.device_map.values() if isinstance(home, int)]:
            found = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if max(gpus) >= found:
                raise DoesNotFit(
                    f"the device map names GPU {max(gpus)}, and this machine has {found or 'none'}",
                    "place the model for this machine's devices, for example with max_memory: {cpu: …, disk: …}",
                )
            self.main = torch.device("cuda", min(gpus))

    def execution(self, name: str) -> torch.device:
        """Return where the module or parameter computes: its GPU, else the first GPU of the map, else the CPU."""
        import torch

        home = self.home(name)
        return torch.device("cuda", home + self.first_gpu) if isinstance(home, int) else self.main

    def home(self, name: str) -> Device | None:
        """Return where the module or parameter lives; None where no entry of the map leads to it."""
        with suppress(KeyError):
            return self.placement.device_of(name)
        return None

    def check_covers(self, names: Iterable[str]) -> None:
        """Raise UsageError, listing what no entry of the map leads to."""
        if missing := [name for name in names if self.home(name) is None]:
            cause = f"the device map covers no device for {first_few(missing)}"
            raise UsageError(cause, 'add an entry for each, or "": cpu for all the rest')


def as_placement(placement: Placement | DeviceMap | str | int | torch.device | None) -> Placement:
    """Return the placement that a device map means; without one, everything in RAM. Raise UsageError for a device that
    has no such name, or a mode in place of a map."""
    if isinstance(placement, Placement):
        return placement
    written = as_map("cpu" if placement is None else placement)
    if isinstance(written, str):
        cure = f"pass bigpipe.place(…, device_map={written!r}) for a mode, or a map such as {{'': 'disk'}}"
        raise UsageError(f"placement {written!r} is neither a Placement nor a map", cure)
    device_map = {name: one_device(home) for name, home in written.items()}
    return Placement(device_map=device_map, weights={}, max_memory={}, strategy="custom")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """RAM that one process may fill, in bytes."""

    cast: int
    """With weights cast to another dtype than they are stored in; what is over is cast anew at each use."""
    widen: int
    """With a model as float32, where nobody asks for a dtype and the CPU computes faster in that."""
    experts: int = 0
    """With experts that stay because they are used most often, where the CPU computes."""
    products: Measured = products_here
    """Asked where there is a choice."""


def host_memory(
    placement: Placement, total: int, available: int, processes: int = 1, products: Measured = products_here
) -> HostMemory:
    """Return what each of `processes` may fill on a machine with `total` and `available` bytes of RAM. A placement that
    says what to compute in counts weights as stored, and none is held as anything else."""
    cap, free = placement.max_memory.get("cpu") or total, int(available * FREE_SHARE / processes)
    return HostMemory(
        cast=0 if placement.compute_dtype else min(free, cap),
        widen=min(int(total * TOTAL_SHARE), cap),
        experts=min(free, placement.kept_experts),
        products=products,
    )


def loading_dtype(model: ModelDescription, placement: Placement, memory: HostMemory, dtype: str | None = None) -> str:
    """Return the dtype that floating weights compute in: `dtype`, the placement's, or where nobody asks for one as
    stored, or float32 where a CPU that holds all weights as that multiplies faster, or nobody can tell.

    For weights that are streamed the placement says it. Around packed weights everything stays as stored, as it does in
    transformers. What is free at the moment does not count: equal hardware gives equal results.
    """
    if asked := dtype or placement.compute_dtype or placement.dtype:
        return asked
    model = decoded(model)
    tensors = (model.tensors or {}).values()
    wide = sum(tensor_nbytes("float32", shape) for stored, shape in tensors if "float" in stored)
    on_cpu = set(placement.device_map.values()) == {"cpu"} and format_of(model) is PLAIN
    stored = stored_dtype(model)
    if not on_cpu or stored not in HALVES or wide > memory.widen:
        return stored
    measured = memory.products() if wide > SMALL else None
    return computing_dtype(stored, 1, measured)[0] if measured else "float32"


def cast_bytes(model: ModelDescription, dtype: str) -> int:
    """Return the bytes of the weights that loading as `dtype` casts; others are windows into their files on a CPU."""
    plain, stored = decoded(model), model.tensors or {}
    single, _ = set_apart(plain.tensors or {}, format_of(plain))
    return sum(
        tensor_nbytes(dtype, shape)
        for name, (own, shape) in single.items()
        if own in CASTABLE and (own != dtype or stored.get(name) != (own, shape))
    )
