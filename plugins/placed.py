"""Models where `dispatch` placed them: what they take of a machine, what they compute in, how they are loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.orchestrator.stage import ForecastContext, StageContext

from .library import sources_of

if TYPE_CHECKING:
    import torch

    from bigpipe.bigmodel.checkpoint import ModelDescription
    from bigpipe.bigmodel.execution import HostMemory
    from bigpipe.bigmodel.placement import Limit, Placement


PLACEMENT = "placement.json"
"""What `dispatch` writes and `distributed-infer` reads."""


def read_placement(artifact: Path) -> Placement:
    from bigpipe.bigmodel.placement import Placement

    return Placement.from_json(json.loads((artifact / PLACEMENT).read_bytes()))


def memory_here(
    placement: Placement, context: ForecastContext | StageContext, processes: int = 1, available: int | None = None
) -> HostMemory:
    """Return what each of `processes` of a stage may take of its machine. available: bytes of RAM, where they are known
    better than from when the machine was looked at."""
    from bigpipe.bigmodel.execution import host_memory
    from bigpipe.bigmodel.placement import products_of

    machine, memo = context.machine, context.memo
    available = machine.memory_available if available is None else available
    return host_memory(placement, machine.memory, available, processes, lambda: products_of(machine, memo))


def computed_in(
    model: ModelDescription,
    placement: Placement,
    context: ForecastContext | StageContext,
    dtype: str | None = None,
) -> str:
    """Return the dtype that a placed model computes in. dtype: the one asked for; it wins."""
    from bigpipe.bigmodel.execution import loading_dtype

    return loading_dtype(model, placement, memory_here(placement, context), dtype)


def told_limit(limit: Limit) -> dict[str, Any]:
    """The metrics that say it."""
    return {"bound_by": limit.bound_by, "limit_tokens_per_second": round(limit.tokens_per_second, 3)}


def load_placed(
    placement: Placement,
    context: StageContext,
    *,
    dtype: str | None = None,
    as_stored: bool = False,
    rank: int = 0,
    ranks: int = 1,
    port: str = "model",
) -> torch.nn.Module:
    """The model on a port, placed; that on port `model` with the adapter on port `adapter`, if one is wired. dtype:
    wins over the placement's. as_stored: nothing is held in another dtype than it is stored in. rank, ranks: of those
    on this machine, which share its memory and own as many GPUs each."""
    import psutil

    from bigpipe.bigmodel.execution import load

    if dtype is not None:
        placement = replace(placement, compute_dtype=None)
    memory = memory_here(placement, context, ranks, psutil.virtual_memory().available)
    return load(
        context.input(port),
        placement,
        adapter=context.input("adapter") if port == "model" and "adapter" in context.inputs else None,
        dtype=dtype,
        memory=replace(memory, cast=0) if as_stored else memory,
        first_gpu=rank * placement.gpus,
        trust=context.trust,
        base=context.base,
        trust_remote_code=sources_of(context).trust_remote_code,
    )
