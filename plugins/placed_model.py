"""What `dispatch` writes and `distributed-infer` reads: a placement, and how a model is loaded into it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bigpipe.bigmodel.placement import Placement
from bigpipe.orchestrator.stage import StageContext

from .sources import sources_of

if TYPE_CHECKING:
    import torch

PLACEMENT = "placement.json"


def read_placement(artifact: Path) -> Placement:
    return Placement.from_json(json.loads((artifact / PLACEMENT).read_bytes()))


def load_placed(
    placement: Placement,
    ctx: StageContext,
    *,
    dtype: str | None = None,
    as_stored: bool = False,
    rank: int = 0,
    ranks: int = 1,
) -> torch.nn.Module:
    """The model on port `model`, placed.

    dtype: wins over the placement's. as_stored: nothing is held in another dtype than it is stored in. rank, ranks: of
    those on this machine, which share its memory and own as many GPUs each.
    """
    import psutil

    from bigpipe.bigmodel.execution import host_memory, load

    memory = host_memory(placement, ctx.machine.memory, psutil.virtual_memory().available, ranks)
    return load(
        ctx.input("model"),
        placement,
        dtype=dtype,
        memory=replace(memory, cast=0) if as_stored else memory,
        first_gpu=rank * placement.gpus,
        trust=ctx.trust,
        base=ctx.base,
        trust_remote_code=sources_of(ctx).trust_remote_code,
    )
