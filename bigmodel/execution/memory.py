"""What a loaded model may take of this machine's RAM, and the dtype that follows from it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from bigpipe.bigmodel.checkpoint import CASTABLE, ModelDescription, tensor_nbytes
from bigpipe.bigmodel.formats import PLAIN, format_of, set_apart
from bigpipe.bigmodel.placement import Placement, stored_dtype

FREE_SHARE = 0.6
"""Of the memory available, what all processes here may fill with weights cast to another dtype."""
TOTAL_SHARE = 0.5
"""Of all memory, what a model may take as float32 for a CPU to compute with it as that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """RAM that one process may fill, in bytes."""

    cast: int
    """With weights cast to another dtype than they are stored in; what is over is cast anew at each use."""
    widen: int
    """With a model as float32, where nobody asks for a dtype."""


def host_memory(placement: Placement, total: int, available: int, processes: int = 1) -> HostMemory:
    """Return what each of `processes` may fill on a machine with `total` and `available` bytes of RAM."""
    cap = placement.max_memory.get("cpu") or total
    return HostMemory(cast=min(int(available * FREE_SHARE / processes), cap), widen=min(int(total * TOTAL_SHARE), cap))


def loading_dtype(model: ModelDescription, placement: Placement, memory: HostMemory, dtype: str | None = None) -> str:
    """Return the dtype that floating weights are loaded as: `dtype`, the placement's, or where nobody asks for one as
    stored, or float32 where the CPU computes and holds all weights as that.

    CPUs without half-precision instructions multiply float32 several times faster. Weights that are streamed from disk
    are used as they come: a cast at each use costs more than it gains. Around packed weights everything stays as
    stored, as it does in transformers. What is free at the moment does not count: equal hardware gives equal results.
    """
    if asked := dtype or placement.dtype:
        return asked
    tensors = (model.tensors or {}).values()
    wide = sum(tensor_nbytes("float32", shape) for stored, shape in tensors if "float" in stored)
    on_cpu = set(placement.device_map.values()) == {"cpu"} and format_of(model) is PLAIN
    return "float32" if on_cpu and wide <= memory.widen else stored_dtype(model)


def cast_bytes(model: ModelDescription, dtype: str) -> int:
    """Return the bytes of the weights that loading as `dtype` casts; others are windows into their files on a CPU."""
    plain, _ = set_apart(model.tensors or {}, format_of(model))
    return sum(
        tensor_nbytes(dtype, shape) for stored, shape in plain.values() if stored in CASTABLE and stored != dtype
    )
